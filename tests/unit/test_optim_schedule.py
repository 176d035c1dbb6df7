from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from megascale.errors import UserError
from megascale.optim.schedule import SCHEDULE_NAMES, LearningRateSchedule


def points(name: str, steps: list[int], **changes: Any) -> list[float]:
    settings: dict[str, Any] = {"lr": 1.0, "min_lr": 0.2, "warmup_steps": 4, "max_steps": 20}
    schedule = LearningRateSchedule(name=name, **{**settings, **changes})
    return [schedule.lr_at(step) for step in steps]


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
def test_warmup_is_linear_and_reaches_lr_with_its_last_update(name: str) -> None:
    assert points(name, [0, 1, 2, 3]) == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert points(name, [0], warmup_steps=0) == pytest.approx([1.0])
    assert points(name, [0], warmup_steps=1) == pytest.approx([1.0])


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("constant", {}, {4: 1.0, 19: 1.0, 500: 1.0}),
        ("linear", {}, {4: 1.0, 8: 0.8, 12: 0.6, 19: 0.25, 20: 0.2, 99: 0.2}),
        ("linear", {"decay_steps": 12}, {4: 1.0, 8: 0.6, 12: 0.2, 19: 0.2}),
        ("linear", {"min_lr": 0.0, "warmup_steps": 0}, {0: 1.0, 5: 0.75, 20: 0.0}),
        ("cosine", {}, {4: 1.0, 12: 0.6, 16: 0.6 - 0.4 / math.sqrt(2), 20: 0.2, 99: 0.2}),
        ("cosine", {"decay_steps": 8}, {4: 1.0, 6: 0.6, 8: 0.2, 19: 0.2}),
        ("wsd", {}, {4: 1.0, 18: 1.0, 19: 0.6, 20: 0.2, 99: 0.2}),
        ("wsd", {"decay_steps": 8}, {12: 1.0, 14: 0.8, 16: 0.6, 19: 0.3, 20: 0.2}),
        ("wsd", {"max_steps": 5}, {4: 1.0, 5: 0.2}),
        ("inverse_sqrt", {}, {4: math.sqrt(4 / 5), 15: 0.5, 63: 0.25, 99: 0.2, 999: 0.2}),
        ("inverse_sqrt", {"warmup_steps": 0}, {0: 1.0, 3: 0.5, 24: 0.2}),
    ],
)
def test_points_by_hand(name: str, changes: dict[str, Any], expected: dict[int, float]) -> None:
    assert points(name, list(expected), **changes) == pytest.approx(list(expected.values()))


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
def test_all_warmup_is_a_run_too(name: str) -> None:
    if name == "wsd":
        with pytest.raises(UserError, match="warmup_steps=20, decay_steps=2"):
            points(name, [0], warmup_steps=20)
    else:
        assert points(name, [19], warmup_steps=20) == pytest.approx([1.0])


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
def test_never_rises_after_the_warmup_and_stays_in_bounds(name: str) -> None:
    rates = points(name, list(range(60)), min_lr=0.1)
    assert all(later <= earlier for earlier, later in pairwise(rates[3:]))
    assert all(0.1 <= rate <= 1.0 for rate in rates[3:])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "polynomial"}, "'polynomial'.*\n.*inverse_sqrt"),
        ({"warmup_steps": 21}, "warmup_steps=21, max_steps=20"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"max_steps": 0, "warmup_steps": 0}, "max_steps=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"min_lr": 1.5}, "min_lr=1.5"),
        ({"min_lr": -0.1}, "min_lr=-0.1"),
        ({"decay_steps": 3}, "decay_steps=3, warmup_steps=4"),
        ({"decay_steps": 0, "warmup_steps": 0}, "decay_steps=0"),
        ({"name": "constant", "decay_steps": 5}, "no decay span"),
        ({"name": "inverse_sqrt", "decay_steps": 5}, "no decay span"),
        ({"name": "wsd", "decay_steps": 17}, "warmup_steps=4, decay_steps=17, max_steps=20"),
        ({"name": "wsd", "decay_steps": 0}, "decay_steps=0"),
    ],
)
def test_impossible_schedules_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        points(**{"name": "linear", "steps": [0], **changes})
