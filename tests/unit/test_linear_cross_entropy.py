"""The fused head and loss against the plain ones, in fp64, where a mistake is no rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megascale.parallel import linear_cross_entropy as fused
from megascale.parallel.linear_cross_entropy import LossTerms, linear_cross_entropy
from megascale.training.losses import TokenLoss

N, D, V = 50, 8, 37


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several groups of several blocks of several portions, the last ones incomplete."""
    monkeypatch.setattr(fused, "BLOCK_ELEMENTS", V * 9)
    monkeypatch.setattr(fused, "GROUP_BYTES", V * 8 * 17)
    monkeypatch.setattr(fused, "FEW_ELEMENTS", V * 3)


def inputs(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Hidden states, weight and bias; large enough that probabilities are far from even."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((N, D), (V, D), (V,))
    drawn = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [values.to(dtype).requires_grad_() for values in drawn]


def labels() -> torch.Tensor:
    drawn = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(4))
    drawn[[0, 7, 49]] = -100
    return drawn


def plain(
    values: list[torch.Tensor], loss: TokenLoss, softcap: float | None, training: bool = True
) -> torch.Tensor:
    logits = F.linear(*values)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return loss(logits, labels(), training=training)


def by_product(
    values: list[torch.Tensor], loss: TokenLoss, softcap: float | None, training: bool = True
) -> torch.Tensor:
    hidden, weight, *bias = values
    return loss.of_product(
        hidden, weight, bias[0] if bias else None, softcap, labels=labels(), training=training
    )


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1), (0.2, 0.05)])
def test_loss_and_gradients_are_the_plain_ones(
    smoothing: float, z: float, bias: bool, softcap: float | None
) -> None:
    _compare(TokenLoss(smoothing, z, fused=True), bias, softcap)


def _compare(loss: TokenLoss, bias: bool, softcap: float | None) -> None:
    values = inputs()[: 3 if bias else 2]
    expected, found = plain(values, loss, softcap), by_product(values, loss, softcap)
    assert found.item() == pytest.approx(expected.item(), rel=1e-13)
    wanted = torch.autograd.grad(3 * expected, values)
    for ours, theirs in zip(torch.autograd.grad(3 * found, values), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_regularisers_count_in_training_only() -> None:
    loss = TokenLoss(0.1, 0.1, fused=True)
    found = by_product(inputs(), loss, None, training=False)
    assert found.item() == pytest.approx(plain(inputs(), TokenLoss(), None).item(), rel=1e-13)


def test_no_token_and_no_target() -> None:
    hidden, weight, bias = inputs()
    for count, label in ((0, 0), (5, -100)):
        part, targets = hidden[:count], torch.full((count,), label)
        loss = linear_cross_entropy(part, weight, bias, targets, LossTerms(V, z_loss=0.1))
        assert loss.item() == 0.0
        for grad in torch.autograd.grad(loss, [weight, bias]):
            assert torch.equal(grad, torch.zeros_like(grad))


def test_half_precision_loses_no_more_than_the_plain_path() -> None:
    values = inputs(torch.bfloat16)
    exact = [value.detach().double().requires_grad_() for value in values]
    expected = plain(exact, TokenLoss(), None)
    wanted = torch.autograd.grad(expected, exact)

    def error(loss: torch.Tensor) -> tuple[float, ...]:
        assert loss.dtype == torch.float32
        grads = torch.autograd.grad(loss, values)
        off = [(g.double() - w).norm() / w.norm() for g, w in zip(grads, wanted, strict=True)]
        return (abs(loss.item() / expected.item() - 1), *map(float, off))

    ours = error(by_product(values, TokenLoss(fused=True), None))
    theirs = error(plain(values, TokenLoss(), None))
    for own, other in zip(ours, theirs, strict=True):
        assert own < 1.5 * other + 2**-10


def test_nothing_is_kept_without_gradients() -> None:
    hidden, weight, _ = inputs()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, None, labels(), LossTerms(V))
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(
        F.cross_entropy(hidden @ weight.t(), labels(), reduction="sum").item(), rel=1e-13
    )
