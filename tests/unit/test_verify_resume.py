"""The verdict of `megascale verify resume`: each thing that can differ is named."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from megascale.verification.resume import StepRecord, compare_resume

STEPS = [
    StepRecord(
        step=step,
        loss=5.0 - step,
        grad_norm=1.0 + step,
        lr=0.1 * step,
        loss_scale=8.0,
        skipped=step == 3,
        samples=[4 * step, 4 * step + 1],
    )
    for step in (1, 2, 3, 4)
]


def _verdict(same_layout: bool, **changes: Any) -> Any:
    """Of a run resumed after step 2 whose last step is changed."""
    found = [STEPS[2], replace(STEPS[3], **changes)]
    return compare_resume(STEPS, found, same_layout=same_layout, limit=1e-5)


@pytest.mark.parametrize("same_layout", [True, False])
def test_the_same_steps_are_the_same(same_layout: bool) -> None:
    verdict = _verdict(same_layout)
    assert (verdict.problem, verdict.identical, verdict.loss, verdict.norm) == ("", True, 0.0, 0.0)


@pytest.mark.parametrize("same_layout", [True, False])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"samples": [17, 16]}, "step 4: other samples, or in another order"),
        ({"lr": 0.4001}, "step 4: lr 0.4001 instead of 0.4"),
        ({"loss_scale": 16.0}, "step 4: loss_scale 16.0 instead of 8.0"),
        ({"skipped": True}, "step 4: skipped True instead of False"),
        ({"loss": 1.001}, "step 4: loss 1.001 instead of 1.0"),
        ({"loss": math.nan}, "step 4: loss nan instead of 1.0"),
        ({"grad_norm": 5.001}, "step 4: grad_norm 5.001 instead of 5.0"),
        ({"grad_norm": math.inf}, "step 4: grad_norm inf instead of 5.0"),
    ],
)
def test_what_differs_is_named_with_its_step(
    same_layout: bool, changes: dict[str, Any], says: str
) -> None:
    verdict = _verdict(same_layout, **changes)
    assert verdict.problem.startswith(says)
    assert not verdict.identical


def test_one_bit_counts_in_the_same_layout_only() -> None:
    changed = math.nextafter(1.0, 2.0)
    assert "loss 1.0000000000000002" in _verdict(True, loss=changed).problem
    elsewhere = _verdict(False, loss=changed)
    assert elsewhere.problem == ""
    assert not elsewhere.identical
    assert 0 < elsewhere.loss < 1e-15


def test_a_run_that_trained_nothing_proves_nothing() -> None:
    verdict = compare_resume(STEPS, [], same_layout=True, limit=1e-5)
    assert verdict.problem == "no step was trained after the resume"
    assert not verdict.identical
