"""A resumed run is the run that never stopped.

The resuming side builds its model from another init seed, so nothing can be right by accident.
Same layout: bit-identical losses and gradient norms, with dropout and accumulation on. Another
world size, stage or engine: 1e-5 in fp32; in bf16 the tolerance of tests/parity/test_engines.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import Pools
from tests.parity.harness import relative, resume_rank, save_rank
from tests.parity.test_engines import LAYOUTS, settings_of

AT_STEP, STEPS = 4, 8
CHANGES = {"model.dropout": 0.1, "optimizer.grad_clip": 0.5}
# from -> to: both ways between engines, stages up and down, more and fewer ranks
ELSEWHERE = [
    (("torch", 0, 1), ("deepspeed", 3, 4)),
    (("torch", 2, 4), ("torch", 0, 1)),
    (("torch", 3, 2), ("deepspeed", 1, 4)),
    (("deepspeed", 1, 4), ("deepspeed", 3, 2)),
    (("deepspeed", 2, 2), ("torch", 1, 4)),
    (("deepspeed", 3, 4), ("torch", 0, 2)),
    (("deepspeed", 3, 2), ("deepspeed", 2, 1)),
]


def _settings(prefix: Path, engine: str, stage: int, dtype: str) -> dict[str, object]:
    changes = {
        **CHANGES,
        "parallel.engine": engine,
        "parallel.zero_stage": stage,
        "precision.dtype": dtype,
    }
    return settings_of(prefix, changes)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("engine", "stage"), LAYOUTS)
def test_same_layout_is_bit_identical(
    pools: Pools, token_prefix: Path, tmp_path: Path, engine: str, stage: int, dtype: str
) -> None:
    settings = _settings(token_prefix, engine, stage, dtype)
    folder = str(tmp_path)
    straight = pools(2).run(
        save_rank, settings=settings, folder=folder, at_step=AT_STEP, steps=STEPS
    )
    resumed = pools(2).run(resume_rank, settings=settings, folder=folder, steps=STEPS)
    assert len(straight[0]) == STEPS - AT_STEP
    assert resumed == straight


@pytest.mark.parametrize("optimizer", [{"optimizer.name": "sgd", "optimizer.lr": 0.1}])
@pytest.mark.parametrize(("engine", "stage"), [("torch", 0), ("torch", 3), ("deepspeed", 2)])
def test_sgd_momentum_survives(
    pools: Pools,
    token_prefix: Path,
    tmp_path: Path,
    engine: str,
    stage: int,
    optimizer: dict[str, object],
) -> None:
    changes = {**optimizer, "parallel.engine": engine, "parallel.zero_stage": stage}
    settings = settings_of(token_prefix, changes)
    folder = str(tmp_path)
    straight = pools(2).run(
        save_rank, settings=settings, folder=folder, at_step=AT_STEP, steps=STEPS
    )
    assert pools(2).run(resume_rank, settings=settings, folder=folder, steps=STEPS) == straight


@pytest.mark.parametrize(("source", "target"), ELSEWHERE)
def test_another_layout_continues_the_same_training(
    pools: Pools,
    token_prefix: Path,
    tmp_path: Path,
    source: tuple[str, int, int],
    target: tuple[str, int, int],
) -> None:
    folder = str(tmp_path)
    engine, stage, world = source
    straight = pools(world).run(
        save_rank,
        settings=_settings(token_prefix, engine, stage, "fp32"),
        folder=folder,
        at_step=AT_STEP,
        steps=STEPS,
    )
    engine, stage, world = target
    settings = _settings(token_prefix, engine, stage, "fp32")
    resumed = pools(world).run(resume_rank, settings=settings, folder=folder, steps=STEPS)
    assert resumed == [resumed[0]] * world
    for (loss, norm), (expected_loss, expected_norm) in zip(resumed[0], straight[0], strict=True):
        assert relative(loss, expected_loss) < 1e-5
        assert relative(norm, expected_norm) < 1e-5
