"""Every pipeline schedule, under both engines, is the same training as one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import Pools
from tests.parity.harness import Record, merge, record_rank
from tests.parity.test_engines import assert_same, settings_of
from tests.parity.test_tensor_parallel import GPT, LLAMA, SGD

STEPS = 3
DEEP: dict[str, Any] = {"model.num_layers": 5, "train.micro_batch_size": 1}
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {**GPT, **DEEP},
    "llama": {**LLAMA, **DEEP, "optimizer.grad_clip": 0.0},
    "sgd": {**SGD, **DEEP},
}


def pipeline(schedule: str, pp: int, v: int, engine: str, stage: int) -> dict[str, Any]:
    """The settings of a pipeline."""
    return {
        "parallel.pipeline_parallel_size": pp,
        "parallel.virtual_pipeline_stages": v,
        "parallel.pipeline_schedule": schedule,
        "parallel.engine": engine,
        "parallel.zero_stage": stage,
    }


SP: dict[str, Any] = {"parallel.tensor_parallel_size": 2, "parallel.sequence_parallel": True}
FULL, SELECTIVE = (
    {"parallel.activation_recomputation": mode} for mode in ("full", "selective")
)
UNEVEN: dict[str, Any] = {"parallel.layers_per_stage": [1, 4]}

# world, schedule, pp, stages a rank, engine, ZeRO stage, models
LAYOUTS: list[tuple[int, str, int, int, str, int, tuple[str, ...]]] = [
    (2, "gpipe", 2, 1, "torch", 0, ("gpt",)),
    (2, "1f1b", 2, 1, "torch", 0, ("gpt", "llama", "sgd")),
    (2, "interleaved", 2, 2, "torch", 0, ("gpt",)),
    (2, "interleaved_zero_bubble", 2, 2, "torch", 0, ("gpt", "llama")),
    (2, "zbv", 2, 2, "torch", 0, ("gpt", "llama")),
    (2, "dualpipev", 2, 2, "torch", 0, ("gpt",)),
    (2, "1f1b", 2, 1, "deepspeed", 1, ("gpt", "llama", "sgd")),
    (2, "zbv", 2, 2, "deepspeed", 1, ("gpt", "llama")),
    (2, "interleaved", 2, 2, "deepspeed", 1, ("gpt",)),
    (4, "1f1b", 2, 1, "torch", 1, ("gpt",)),
    (4, "zbv", 2, 2, "torch", 1, ("gpt",)),
    (4, "interleaved", 2, 2, "torch", 2, ("gpt",)),
    (4, "1f1b", 2, 1, "torch", 3, ("gpt", "llama")),
    (4, "1f1b", 4, 1, "torch", 0, ("gpt",)),
    (4, "interleaved_zero_bubble", 2, 2, "deepspeed", 1, ("gpt",)),
]


# What is combined with a pipeline: world, pipeline, more settings, models
COMBINATIONS: list[tuple[int, tuple, dict[str, Any], tuple[str, ...]]] = [
    (4, ("1f1b", 2, 1, "torch", 0), SP, ("gpt", "llama")),
    (4, ("zbv", 2, 2, "torch", 0), SP, ("gpt",)),
    (4, ("1f1b", 2, 1, "deepspeed", 1), SP, ("gpt",)),
    (4, ("interleaved", 2, 2, "torch", 1), SP | FULL, ("llama",)),
    (2, ("1f1b", 2, 1, "torch", 1), FULL | UNEVEN, ("gpt",)),
    (2, ("zbv", 2, 2, "torch", 0), SELECTIVE, ("gpt",)),
    (2, ("interleaved_zero_bubble", 2, 1, "torch", 0), FULL, ("gpt",)),
    (2, ("dualpipev", 2, 2, "deepspeed", 1), SELECTIVE, ("llama",)),
]


@pytest.fixture(scope="module")
def references(pools: Pools, token_prefix: Path) -> dict[str, Record]:
    return {
        name: merge(
            pools(1).run(record_rank, settings=settings_of(token_prefix, changes), steps=STEPS)
        )
        for name, changes in MODELS.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout[:6])))
def test_same_training(
    pools: Pools, token_prefix: Path, references: dict[str, Record], layout: tuple
) -> None:
    world, *parallel, names = layout
    for name in names:
        settings = settings_of(token_prefix, {**MODELS[name], **pipeline(*parallel)})
        found = merge(
            pools(world).run(record_rank, settings=settings, steps=STEPS, evaluate_every=2)
        )
        assert_same(found, references[name])


@pytest.mark.parametrize("case", COMBINATIONS, ids=lambda case: "-".join(map(str, case[1])))
def test_combined(
    pools: Pools, token_prefix: Path, references: dict[str, Record], case: tuple
) -> None:
    world, parallel, more, names = case
    for name in names:
        changes = {**MODELS[name], **pipeline(*parallel), **more}
        settings = settings_of(token_prefix, changes)
        found = merge(pools(world).run(record_rank, settings=settings, steps=STEPS))
        assert_same(found, references[name])
