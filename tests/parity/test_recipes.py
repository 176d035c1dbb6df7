"""A growing batch, offloading and averaged weights are the same training in every layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megascale.checkpoint.manager import CheckpointManager
from megascale.training.callbacks.average import WeightAverageCallback
from megascale.training.resume import load_state
from megascale.training.state import TrainState
from megascale.training.step import train_step
from tests.distributed import Pools
from tests.parity.harness import (
    Record,
    full_tensors,
    merge,
    pieces_of,
    record_rank,
    resume_rank,
    save_rank,
    set_up,
)
from tests.parity.test_engines import assert_same, settings_of

STEPS, AT_STEP = 6, 3
RAMP = {"train.batch_size_ramp": {"start": 4, "increment": 4, "samples": 24}}
GROWING = {**RAMP, "train.global_batch_size": 16, "train.micro_batch_size": 2}
REGULARISED = {"train.label_smoothing": 0.1, "train.z_loss": 1e-3}
OFFLOAD = {"parallel.offload_optimizer": True, "optimizer.grad_clip": 0.5}


def _settings(prefix: Path, engine: str, stage: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    layout = {"parallel.engine": engine, "parallel.zero_stage": stage}
    return settings_of(prefix, {**layout, **changes})


@pytest.fixture(scope="module")
def grown(pools: Pools, token_prefix: Path) -> Record:
    """The single process with a ramp."""
    settings = _settings(token_prefix, "torch", 0, {**GROWING, **REGULARISED})
    return merge(pools(1).run(record_rank, settings=settings, steps=STEPS))


LAYOUTS = [
    ("torch", 0, {}),
    ("torch", 3, {}),
    ("torch", 0, {"parallel.tensor_parallel_size": 2}),
    ("deepspeed", 1, {"parallel.tensor_parallel_size": 2}),
    ("deepspeed", 2, {"parallel.offload_optimizer": True}),
    ("deepspeed", 3, {"parallel.offload_optimizer": True}),
]


@pytest.mark.parametrize(("engine", "stage", "more"), LAYOUTS)
def test_a_growing_batch(
    pools: Pools,
    token_prefix: Path,
    grown: Record,
    engine: str,
    stage: int,
    more: dict[str, bool],
) -> None:
    settings = _settings(token_prefix, engine, stage, {**GROWING, **REGULARISED, **more})
    found = merge(pools(2).run(record_rank, settings=settings, steps=STEPS))
    assert [len(ids) for ids in grown.sample_ids] == [4, 4, 8, 12, 16, 16]
    assert [i for ids in grown.sample_ids for i in ids] == list(range(60))
    assert_same(found, grown)


@pytest.mark.parametrize(("engine", "stage"), [("torch", 1), ("deepspeed", 3)])
def test_a_growing_batch_resumes_bit_identically(
    pools: Pools, token_prefix: Path, tmp_path: Path, engine: str, stage: int
) -> None:
    settings, folder = _settings(token_prefix, engine, stage, GROWING), str(tmp_path)
    straight = pools(2).run(
        save_rank, settings=settings, folder=folder, at_step=AT_STEP, steps=STEPS
    )
    assert pools(2).run(resume_rank, settings=settings, folder=folder, steps=STEPS) == straight


@pytest.fixture(scope="module")
def clipped(pools: Pools, token_prefix: Path) -> Record:
    """The single process with clipping, nothing offloaded."""
    settings = _settings(token_prefix, "torch", 0, {"optimizer.grad_clip": 0.5})
    return merge(pools(1).run(record_rank, settings=settings, steps=STEPS))


# stage 3 without its weights is among the layouts of the growing batch
OFFLOADED: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"parallel.pipeline_parallel_size": 2}),
    (2, {}),
    (3, {"parallel.offload_parameters": True}),
]


@pytest.mark.parametrize(("stage", "more"), OFFLOADED)
def test_offloading(
    pools: Pools,
    token_prefix: Path,
    tmp_path: Path,
    clipped: Record,
    stage: int,
    more: dict[str, Any],
) -> None:
    """On the CPU the host is the device: this proves the path through DeepSpeed, not the saving."""
    settings = _settings(token_prefix, "deepspeed", stage, {**OFFLOAD, **more})
    assert_same(merge(pools(2).run(record_rank, settings=settings, steps=STEPS)), clipped)
    folder = str(tmp_path)
    straight = pools(2).run(
        save_rank, settings=settings, folder=folder, at_step=AT_STEP, steps=STEPS
    )
    assert pools(2).run(resume_rank, settings=settings, folder=folder, steps=STEPS) == straight


def average_rank(
    settings: Mapping[str, Any], folder: str, steps: int, save_at: int, resume: bool
) -> list[Any]:
    """Runs on every rank: train with an average of the weights; its fragments at the end."""
    setup, state, reader = set_up(settings, other_start=resume), TrainState(), None
    manager = CheckpointManager(folder)
    if resume:
        reader, _ = manager.open_newest_intact()
        assert reader is not None
        state, _ = load_state(reader, setup.engine, setup.mesh)
    average = WeightAverageCallback(setup.engine, 0.7, reader)
    while state.step < steps:
        average.on_step_end(None, train_step(setup.parts, state))  # type: ignore[arg-type]
        if state.step == save_at and not resume:
            saved = {"train": state.state_dict(), "engine": setup.engine.state_dict()}
            fragments = [*setup.engine.fragments(setup.engine.state_kinds), *average.fragments()]
            manager.save(state.step, fragments, {**saved, "callbacks": {}}, {})
    setup.engine.close()
    return pieces_of(average.fragments())


def _average(pools: Pools, world: int, **kwargs: Any) -> dict[str, np.ndarray]:
    ranks = pools(world).run(average_rank, steps=STEPS, save_at=AT_STEP, **kwargs)
    return full_tensors([piece for rank in ranks for piece in rank])


def test_an_average_of_the_weights(pools: Pools, token_prefix: Path, tmp_path: Path) -> None:
    """Held in fragments of any layout; by hand on the single process; resumed bit-identically."""
    by_layout = {}
    for world, engine, stage in ((1, "torch", 0), (2, "torch", 0), (2, "torch", 3)):
        settings = _settings(token_prefix, engine, stage, {})
        folder = str(tmp_path / f"{world}{engine}{stage}")
        straight = _average(pools, world, settings=settings, folder=folder, resume=False)
        resumed = _average(pools, world, settings=settings, folder=folder, resume=True)
        for name, values in straight.items():
            assert np.array_equal(values, resumed[name]), name
        by_layout[world, stage] = straight
    settings = _settings(token_prefix, "deepspeed", 3, {})
    by_layout[2, "deepspeed"] = _average(
        pools, 2, settings=settings, folder=str(tmp_path / "1torch0"), resume=True
    )
    (expected,) = pools(1).run(by_hand_rank, settings=_settings(token_prefix, "torch", 0, {}))
    for layout, found in by_layout.items():
        for name, values in expected.items():
            assert np.abs(found[name] - values).max() < 1e-5, (layout, name)


def by_hand_rank(settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Runs on the rank: 0.7 * average + 0.3 * weights over the weights before and after steps."""
    setup, state = set_up(settings), TrainState()
    average: dict[str, np.ndarray] = {}
    for step in range(STEPS + 1):
        if step:
            train_step(setup.parts, state)
        for name, values in full_tensors(pieces_of(setup.engine.fragments(["master"]))).items():
            average[name] = 0.7 * average.get(name, values) + 0.3 * values
    setup.engine.close()
    return average
