"""Every optimizer is the same training in every layout that it is not refused in.

LAMB over shards sums the squares of its norms over the ranks; what needs whole matrices is refused
there, and `test_what_is_refused_is_wrong` shows by how much it would be off.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megascale.engine import factory
from tests.distributed import Pools
from tests.parity.harness import Record, merge, record_rank, relative, resume_rank, save_rank
from tests.parity.test_engines import assert_same, settings_of

STEPS, AT_STEP = 6, 3
OPTIMIZERS: dict[str, dict[str, Any]] = {
    # lion takes the sign of what may be zero but for rounding: only its loss is compared
    "lion": {"optimizer.name": "lion", "optimizer.lr": 1e-3},
    "lamb": {"optimizer.name": "lamb", "optimizer.lr": 1e-2},
    "adafactor": {"optimizer.name": "adafactor", "optimizer.lr": 1e-2},
    "muon": {"optimizer.name": "muon", "optimizer.lr": 1e-3},
    "layer_lr_decay": {"optimizer.layer_lr_decay": 0.5},
}
RESUMED = [
    ("lion", "torch", 2, 1),
    ("lion", "deepspeed", 3, 1),
    ("lamb", "torch", 1, 1),
    ("lamb", "torch", 0, 2),
    ("adafactor", "torch", 0, 1),
    ("muon", "torch", 0, 1),
    ("layer_lr_decay", "deepspeed", 2, 1),
]
LAYOUTS = [
    ("lion", "torch", 2, 1),
    ("lion", "deepspeed", 1, 1),
    ("lion", "deepspeed", 3, 1),
    ("lamb", "torch", 0, 1),
    ("lamb", "torch", 1, 1),
    ("lamb", "torch", 3, 1),
    ("lamb", "torch", 0, 2),
    ("lamb", "torch", 2, 2),
    ("adafactor", "torch", 0, 1),
    ("muon", "torch", 0, 1),
    ("layer_lr_decay", "torch", 1, 1),
    ("layer_lr_decay", "deepspeed", 2, 1),
    ("layer_lr_decay", "deepspeed", 3, 1),
]


def _settings(
    prefix: Path, optimizer: str, engine: str, stage: int, tensor: int = 1
) -> dict[str, Any]:
    layout = {
        "parallel.engine": engine,
        "parallel.zero_stage": stage,
        "parallel.tensor_parallel_size": tensor,
    }
    settings = settings_of(prefix, {**OPTIMIZERS[optimizer], **layout})
    if settings["optimizer"].get("name", "adamw") not in ("adamw", "lamb", "muon"):
        settings["optimizer"].pop("eps")
    return settings


def _run(pools: Pools, world: int, settings: dict[str, Any]) -> Record:
    return merge(pools(world).run(record_rank, settings=settings, steps=STEPS))


@pytest.fixture(scope="module")
def references(pools: Pools, token_prefix: Path) -> dict[str, Record]:
    """Each optimizer on the single process."""
    return {name: _run(pools, 1, _settings(token_prefix, name, "torch", 0)) for name in OPTIMIZERS}


@pytest.mark.parametrize(("optimizer", "engine", "stage", "tensor"), LAYOUTS)
def test_same_training(
    pools: Pools,
    token_prefix: Path,
    references: dict[str, Record],
    optimizer: str,
    engine: str,
    stage: int,
    tensor: int,
) -> None:
    expected = references[optimizer]
    world = 4 if tensor > 1 and stage else 2
    found = _run(pools, world, _settings(token_prefix, optimizer, engine, stage, tensor))
    if optimizer in ("lion", "muon"):
        # sign() and bf16 Newton-Schulz turn rounding into steps
        assert relative(found.losses, expected.losses) < 1e-4
        assert relative(found.norms, expected.norms) < 1e-3
    else:
        assert_same(found, expected)


def test_each_optimizer_trains_in_its_own_way(references: dict[str, Record]) -> None:
    last = {name: record.losses[-1] for name, record in references.items()}
    assert len(set(last.values())) == len(last)
    for name, record in references.items():
        assert record.losses[-1] < record.losses[0] - 0.005, name


@pytest.mark.parametrize(("optimizer", "engine", "stage", "tensor"), RESUMED)
def test_resume_is_bit_identical(
    pools: Pools,
    token_prefix: Path,
    tmp_path: Path,
    optimizer: str,
    engine: str,
    stage: int,
    tensor: int,
) -> None:
    settings, folder = _settings(token_prefix, optimizer, engine, stage, tensor), str(tmp_path)
    straight = pools(2).run(
        save_rank, settings=settings, folder=folder, at_step=AT_STEP, steps=STEPS
    )
    assert pools(2).run(resume_rank, settings=settings, folder=folder, steps=STEPS) == straight


def _record_refused(settings: dict[str, Any]) -> dict[str, Any]:
    """Runs on every rank: train in a layout that the table refuses."""
    from tests.parity import harness

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "require_allowed", lambda config, device_type: None)
        patch.setattr(harness, "all_checks", tuple)
        return record_rank(settings=settings, steps=STEPS)


@pytest.mark.parametrize(
    ("optimizer", "engine", "stage"),
    [("muon", "torch", 1), ("adafactor", "torch", 1), ("lamb", "deepspeed", 1)],
)
def test_what_is_refused_is_wrong(
    pools: Pools,
    token_prefix: Path,
    references: dict[str, Record],
    optimizer: str,
    engine: str,
    stage: int,
) -> None:
    """Else the row of the table should go: the update itself is off, by parts of its length."""
    settings = _settings(token_prefix, optimizer, engine, stage)
    found = merge(pools(2).run(_record_refused, settings=settings))
    untrained = _settings(token_prefix, "adafactor", "torch", 0)
    start = merge(pools(1).run(record_rank, settings=untrained, steps=0))
    expected = references[optimizer].weights
    assert _distance(found.weights, expected) > 0.01 * _distance(expected, start.weights)


def _distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    return math.sqrt(sum(float(((one[name] - other[name]) ** 2).sum()) for name in one))
