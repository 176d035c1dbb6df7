"""Layers that recompute, and whose inputs wait in another memory, have the gradients of the others.

There is no GPU here: a copy as NumPy arrays stands in for another memory, and torch's own move to
the host's, a no-op for tensors that are there, runs too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megascale.models.dropout import sample_keys
from megascale.models.gpt import GPT, GPTConfig
from megascale.parallel import activation_checkpoint
from megascale.parallel.activation_checkpoint import Mode, recompute

SHAPE = (2, 12, 16)


def _gradients(modes: Sequence[Mode]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    config = GPTConfig(
        vocab_size=11,
        num_layers=len(modes),
        hidden_size=SHAPE[-1],
        num_attention_heads=4,
        num_kv_heads=2,
        ffn_hidden_size=24,
        seq_length=SHAPE[1],
        dropout=0.2,
        attention_dropout=0.2,
        position_embedding="rope",
    )
    model = GPT(config)
    recompute(model.layers.values(), modes)
    ids = torch.arange(24).view(SHAPE[:2]) % 11
    output = model(ids, dropout_keys=sample_keys(3, torch.arange(2)))
    (output * torch.arange(16)).sum().backward()
    found = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(
    "modes",
    [("full",) * 3, ("offload",) * 3, ("offload", "full", "none"), ("full", "selective", "none")],
    ids="-".join,
)
def test_the_same_gradients(modes: Sequence[Mode]) -> None:
    for found, expected in zip(_gradients(modes), _gradients(("none",) * 3), strict=True):
        assert torch.equal(found, expected)


def test_what_is_offloaded_is_the_inputs_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[tuple[int, ...]] = []

    def elsewhere(pin_memory: bool, device_type: str) -> saved_tensors_hooks:
        assert (pin_memory, device_type) == (False, "cpu")

        def pack(tensor: torch.Tensor) -> np.ndarray:
            there.append(tuple(tensor.shape))
            return tensor.detach().numpy().copy()

        def unpack(array: Any) -> torch.Tensor:
            return torch.from_numpy(array)

        return saved_tensors_hooks(pack, unpack)

    expected = _gradients(("none",) * 3)
    monkeypatch.setattr(activation_checkpoint, "save_on_cpu", elsewhere)
    for found, gradient in zip(_gradients(("offload", "none", "offload")), expected, strict=True):
        assert torch.equal(found, gradient)
    hidden = [shape for shape in there if shape == SHAPE]
    assert len(hidden) == 2
    small = [np.prod(shape) for shape in there if shape != SHAPE]  # positions, keys of samples
    assert sum(small) < SHAPE[0] * SHAPE[1] * 3
