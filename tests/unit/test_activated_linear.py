"""The product of an activation that is computed again, against autograd's own; in fp64."""

from __future__ import annotations

from typing import get_args
from unittest import mock

import pytest
import torch
from torch import Tensor

from megascale.kernels import passes
from megascale.kernels.library import LIBRARY
from megascale.models.activated_linear import Recompute
from megascale.models.mlp import MLP, ActivationName, is_gated

B, T, D, F = 2, 5, 8, 24
ACTIVATIONS: tuple[ActivationName, ...] = get_args(ActivationName)


def built(activation: ActivationName, bias: bool, recompute: Recompute) -> MLP:
    torch.manual_seed(1)
    return MLP(D, F, activation, bias, recompute).double()


def hidden() -> Tensor:
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_gradients(activation: ActivationName, bias: bool) -> None:
    found = []
    for recompute in ("never", "always", "auto"):
        mlp, x = built(activation, bias, recompute), hidden().requires_grad_()
        out = mlp(x)
        out.square().sum().backward()
        found.append([out.detach(), x.grad, *(p.grad for p in mlp.parameters())])
    assert len(found[0]) == 2 + (3 if is_gated(activation) else 2) * (2 if bias else 1)
    for kept, *again in zip(*found, strict=True):
        assert kept is not None
        for other in again:
            torch.testing.assert_close(other, kept, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_compiled_activation_and_its_gradient_come_together(
    activation: ActivationName, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LIBRARY.enable("auto", torch.device("cpu")) is None
    kernel = mock.Mock(wraps=passes.gelu_again_)
    monkeypatch.setattr(passes, "gelu_again_", kernel)
    found = []
    for recompute in ("never", "always"):
        mlp = built(activation, True, recompute).bfloat16()
        x = hidden().bfloat16().requires_grad_()
        mlp(x).float().square().sum().backward()
        found.append([x.grad, *(p.grad for p in mlp.parameters())])
    LIBRARY.enable("never", torch.device("cpu"))
    assert kernel.call_count == 1
    for kept, again in zip(*found, strict=True):
        assert kept is not None
        assert again is not None
        assert torch.equal(again, kept)


@pytest.mark.parametrize("frozen", ["up", "down", "gate"])
def test_what_is_frozen_has_no_gradient(frozen: str) -> None:
    found = []
    for recompute in ("never", "always"):
        mlp = built("swiglu", True, recompute)
        mlp.get_submodule(frozen).requires_grad_(False)
        mlp(hidden()).square().sum().backward()
        found.append({name: p.grad for name, p in mlp.named_parameters()})
    assert {n for n, g in found[1].items() if g is None} == {f"{frozen}.weight", f"{frozen}.bias"}
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("activation", "fewer"), [("gelu_tanh", 1), ("swiglu", 2)])
def test_what_is_kept_for_the_backward(activation: ActivationName, fewer: int) -> None:
    """One tensor of (B, T, F) fewer, with a gate two."""
    counts = []
    for recompute in ("never", "always"):
        wide: set[int] = set()

        def pack(tensor: Tensor, wide: set[int] = wide) -> Tensor:
            if tensor.numel() == B * T * F:
                wide.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = built(activation, True, recompute)(hidden())
        out.sum().backward()
        counts.append(len(wide))
    assert counts[0] - counts[1] == fewer
