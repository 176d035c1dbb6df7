"""Clipping, AdamW and rounding in one pass, against torch's fused AdamW with a pass for each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megascale.engine.one_pass import OnePassAdamW
from megascale.kernels.library import LIBRARY

CPU = torch.device("cpu")
SHAPES = [(3,), (16,), (37, 5), (300, 131)]
FACTOR = 0.37


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    assert LIBRARY.enable("auto", CPU) is None
    yield
    LIBRARY.enable("never", CPU)


def masters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in SHAPES]


def optimizer_of(
    params: list[Tensor], betas: tuple[float, float] = (0.9, 0.95), **changed: bool
) -> torch.optim.AdamW:
    groups = [
        {"params": params[:2], "weight_decay": 0.0},
        {"params": params[2:], "weight_decay": 0.1, "lr": 3e-3},
    ]
    usual = {"fused": True, "foreach": False}
    return torch.optim.AdamW(groups, lr=1e-2, betas=betas, eps=1e-6, **{**usual, **changed})


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(10 + step)
    return [torch.randn(*shape, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize("betas", [(0.8, 0.95), (0.9, 0.9999)])
def test_updates_are_those_of_torch(betas: tuple[float, float]) -> None:
    own, other = masters(), masters()
    weights = {master: master.detach().bfloat16() for master in own}
    optimizer, wanted = optimizer_of(own, betas), optimizer_of(other, betas)
    one_pass = OnePassAdamW.of(optimizer, weights)
    assert one_pass is not None
    for step in range(5):
        found = gradients(step)
        before = [g.clone() for g in found]
        one_pass.step(dict(zip(own, found, strict=True)), FACTOR)
        assert all(torch.equal(a, b) for a, b in zip(found, before, strict=True))
        for master, gradient in zip(other, gradients(step), strict=True):
            master.grad = gradient * FACTOR
        wanted.step()
        for master, reference in zip(own, other, strict=True):
            torch.testing.assert_close(master, reference, rtol=1e-6, atol=1e-7)
            assert torch.equal(weights[master], master.detach().bfloat16())
            state, of_reference = optimizer.state[master], wanted.state[reference]
            assert state.keys() == of_reference.keys()
            for key, value in of_reference.items():
                assert state[key].dtype == value.dtype
                limit = 1e-6 * value.abs().max().item()
                torch.testing.assert_close(state[key], value, rtol=1e-6, atol=limit)
    # either goes on where the other stopped
    optimizer.load_state_dict(wanted.state_dict())
    for master, gradient in zip(own, gradients(9), strict=True):
        master.grad = gradient
    optimizer.step()


def test_bits_do_not_depend_on_the_place_in_a_tensor() -> None:
    """A parameter that ranks hold at different offsets is updated alike: vectors and their rest."""
    values = torch.randn(16).repeat(3)[:41]
    found = []
    for start in (0, 7):
        master = values[start : start + 33].clone().requires_grad_()
        weights = {master: torch.empty(33, dtype=torch.bfloat16)}
        optimizer = torch.optim.AdamW([master], lr=1e-2, fused=True)
        for _ in range(3):
            gradient = torch.sin(values[start : start + 33] * 3)
            OnePassAdamW(optimizer, weights).step({master: gradient}, 0.9)
        found.append(master.detach())
    assert torch.equal(found[0][7:], found[1][:26])


@pytest.mark.parametrize(
    "other", ["not fused", "amsgrad", "fp16", "sgd", "subclass", "not compiled"]
)
def test_what_it_does_not_take(other: str) -> None:
    own = masters()
    weights = {master: master.detach().bfloat16() for master in own}
    optimizer: torch.optim.Optimizer = optimizer_of(own)
    if other == "not fused":
        optimizer = optimizer_of(own, fused=False)
    elif other == "amsgrad":
        optimizer = optimizer_of(own, amsgrad=True)
    elif other == "fp16":
        weights[own[0]] = weights[own[0]].half()
    elif other == "sgd":
        optimizer = torch.optim.SGD(own, fused=True)
    elif other == "subclass":
        optimizer = type("Own", (torch.optim.AdamW,), {})(own, fused=True)
    else:
        LIBRARY.enable("never", CPU)
    assert OnePassAdamW.of(optimizer, weights) is None
