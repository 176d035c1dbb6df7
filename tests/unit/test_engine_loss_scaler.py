from __future__ import annotations

import pytest

from megascale.engine.loss_scaler import LossScaler, LossScaling
from megascale.errors import UserError

DYNAMIC = LossScaling(initial_scale=16.0, dynamic=True, window=3, hysteresis=2, min_scale=4.0)


def scales(scaling: LossScaling, overflows: str) -> list[float]:
    """The scale before each step and after the last; "x" overflows."""
    scaler = LossScaler(scaling)
    seen = [scaler.scale]
    for letter in overflows:
        scaler.update(overflow=letter == "x")
        seen.append(scaler.scale)
    return seen


@pytest.mark.parametrize(
    ("overflows", "expected"),
    [
        ("......", [16, 16, 16, 32, 32, 32, 64]),
        ("..x...", [16, 16, 16, 16, 16, 16, 32]),  # tolerated, but the window starts anew
        ("xx", [16, 16, 8]),
        ("x.x.x", [16, 16, 16, 8, 8, 4]),  # tolerance comes back with a doubling only
        ("x...x", [16, 16, 16, 16, 32, 32]),
        ("x...xx", [16, 16, 16, 16, 32, 32, 16]),
        ("xxx...x", [16, 16, 8, 4, 4, 4, 8, 8]),
    ],
)
def test_moves_by_hand(overflows: str, expected: list[float]) -> None:
    assert scales(DYNAMIC, overflows) == expected


def test_it_never_falls_below_its_smallest_value() -> None:
    assert scales(LossScaling(6.0, True, 5, 1, 4.0), "x") == [6, 4]
    with pytest.raises(UserError, match=r"scale 4\n.*min_loss_scale"):
        scales(DYNAMIC, "xxxx")


def test_a_static_scale_stays() -> None:
    assert scales(LossScaling(initial_scale=8.0), "..x.xx") == [8.0] * 7
    assert LossScaler(LossScaling()).state_dict() == {}


@pytest.mark.parametrize("stop", range(9))
def test_state_continues_bit_identically(stop: int) -> None:
    overflows = ".x..x...x"
    first, second = LossScaler(DYNAMIC), LossScaler(DYNAMIC)
    for letter in overflows[:stop]:
        first.update(overflow=letter == "x")
    second.load_state_dict(first.state_dict())
    for letter in overflows[stop:]:
        first.update(overflow=letter == "x")
        second.update(overflow=letter == "x")
        assert second.state_dict() == first.state_dict()
    assert first.scale == scales(DYNAMIC, overflows)[-1]


def test_the_state_of_a_run_without_scaling_changes_nothing() -> None:
    scaler = LossScaler(DYNAMIC)
    scaler.load_state_dict({"deepspeed.global_steps": 7})
    assert scaler.scale == 16
    static = LossScaler(LossScaling(initial_scale=8.0))
    static.load_state_dict(scaler.state_dict())
    assert static.scale == 8
