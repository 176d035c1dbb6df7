from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from megascale.training.losses import TokenLoss

V = 5
LABELS = torch.tensor([[1, 4, -100], [0, -100, 2]])


def logits() -> torch.Tensor:
    return torch.randn(2, 3, V, generator=torch.Generator().manual_seed(1)).requires_grad_()


def by_hand(smoothing: float, z: float) -> float:
    total = 0.0
    for row, label in zip(logits().flatten(0, 1).tolist(), LABELS.flatten().tolist(), strict=True):
        if label == -100:
            continue
        log_z = math.log(sum(math.exp(x) for x in row))
        target = [smoothing / V + (1 - smoothing) * (index == label) for index in range(V)]
        total += sum(q * (log_z - x) for q, x in zip(target, row, strict=True)) + z * log_z**2
    return total


@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.01), (0.2, 0.05)])
def test_by_hand_and_plain_in_evaluation(smoothing: float, z: float) -> None:
    loss = TokenLoss(smoothing, z)
    assert loss(logits(), LABELS, training=True).item() == pytest.approx(by_hand(smoothing, z))
    assert loss(logits(), LABELS, training=False).item() == pytest.approx(by_hand(0, 0))


def test_the_default_is_torch_s_cross_entropy_to_the_last_bit() -> None:
    ours, theirs = logits(), logits()
    TokenLoss()(ours, LABELS, training=True).backward()
    F.cross_entropy(theirs.flatten(0, 1), LABELS.flatten(), reduction="sum").backward()
    assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


def test_positions_without_target_have_no_gradient_and_half_precision_is_summed_in_fp32() -> None:
    x = logits()
    TokenLoss(0.1, 0.1)(x, LABELS, training=True).backward()
    assert x.grad is not None
    assert torch.equal(x.grad[LABELS == -100], torch.zeros(2, V))
    assert (x.grad[LABELS != -100] != 0).all()
    total = TokenLoss(0.1, 0.1)(logits().half(), LABELS, training=True)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(by_hand(0.1, 0.1), rel=1e-3)


def test_no_target_at_all_is_zero() -> None:
    labels = torch.full((2, 3), -100)
    total = TokenLoss(0.1, 0.1)(logits(), labels, training=True)
    assert total.item() == 0.0
