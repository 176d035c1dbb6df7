"""Layouts stay the same training over many steps, in fp32 and in bf16.

The long form is `megascale verify layout CONFIG --steps 200`; its figures are in docs/numerics.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import Pools
from tests.parity.harness import merge, record_rank, relative
from tests.parity.test_engines import settings_of

MODEL: dict[str, Any] = {
    "model.hidden_size": 24,
    "model.ffn_hidden_size": 51,
    "model.seq_length": 16,
    "model.dropout": 0.1,
    "data.split": [0.97, 0.03],
    "train.micro_batch_size": 2,
    "train.max_steps": 60,
    "schedule.name": "constant",
}
# world, engine, stage, tp, sequence parallel, recomputation
LAYOUTS = [(2, "torch", 0, 2, True, "none"), (4, "deepspeed", 2, 2, True, "full")]


def _run(pools: Pools, prefix: Path, layout: tuple, steps: int, dtype: str) -> Any:
    world, engine, stage, tp, sequence, mode = layout
    changes = {
        **MODEL,
        "precision.dtype": dtype,
        "parallel.engine": engine,
        "parallel.zero_stage": stage,
        "parallel.tensor_parallel_size": tp,
        "parallel.sequence_parallel": sequence,
        "parallel.activation_recomputation": mode,
    }
    settings = settings_of(prefix, changes)
    return merge(pools(world).run(record_rank, settings=settings, steps=steps))


SINGLE = (1, "torch", 0, 1, False, "none")


@pytest.fixture(scope="module")
def singles(pools: Pools, token_prefix: Path) -> dict[str, Any]:
    return {
        "fp32": _run(pools, token_prefix, SINGLE, 20, "fp32"),
        "bf16": _run(pools, token_prefix, SINGLE, 50, "bf16"),
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout)))
def test_fp32_over_20_steps(
    pools: Pools, token_prefix: Path, singles: dict[str, Any], layout: tuple
) -> None:
    found, expected = _run(pools, token_prefix, layout, 20, "fp32"), singles["fp32"]
    assert found.sample_ids == expected.sample_ids
    for ours, theirs in zip(found.losses, expected.losses, strict=True):
        assert relative(ours, theirs) < 1e-5
    for ours, theirs in zip(found.norms, expected.norms, strict=True):
        assert relative(ours, theirs) < 1e-5
    for name, theirs in expected.weights.items():
        assert abs(found.weights[name] - theirs).max() < 1e-5, name


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout)))
def test_bf16_does_not_drift(
    pools: Pools, token_prefix: Path, singles: dict[str, Any], layout: tuple
) -> None:
    found, expected = _run(pools, token_prefix, layout, 50, "bf16"), singles["bf16"]
    assert expected.losses[-1] < expected.losses[0]  # it learns: there is something to drift from
    for ours, theirs in zip(found.losses, expected.losses, strict=True):
        assert relative(ours, theirs) < 2e-2
    for ours, theirs in zip(found.norms, expected.norms, strict=True):
        assert relative(ours, theirs) < 5e-2
