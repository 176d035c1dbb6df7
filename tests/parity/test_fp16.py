"""fp16 with dynamic loss scaling is the fp32 training, skipped overflows included.

The scale starts too high and its window is short: the first step overflows, and later ones each
time it has grown too far. Two references in fp32 on one process: the plain run (2e-2, what losing
some updates costs), and a run that loses the same updates (what fp16's rounding costs).

DeepSpeed refuses fp16 on the CPU, so its part is tested with its `is_fp16_supported` patched (its
arithmetic is torch's own there); on a GPU nothing is patched.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megascale.checkpoint.manager import CheckpointManager
from megascale.engine.protocol import StepOutcome
from megascale.training.resume import load_state
from megascale.training.state import TrainState
from megascale.training.step import train_step
from tests.distributed import Pools
from tests.parity.harness import Setup, relative, set_up
from tests.parity.test_engines import settings_of

STEPS = 50
FP16 = {
    "precision.dtype": "fp16",
    "precision.initial_loss_scale_power": 20,
    "precision.loss_scale_window": 15,
    "precision.hysteresis": 1,
}
CHANGES = {
    "optimizer.grad_clip": 0.5,
    "train.max_steps": 60,
    "train.micro_batch_size": 4,
    "model.dropout": 0.1,
    # fp16 products have no fast path on most CPUs
    "model.num_layers": 1,
    "model.hidden_size": 20,
    "model.ffn_hidden_size": 43,
}
Curve = list[tuple[float, float, bool, float]]


def _settings(prefix: Path, engine: str, stage: int, **changes: Any) -> dict[str, Any]:
    layout = {"parallel.engine": engine, "parallel.zero_stage": stage}
    return settings_of(prefix, {**CHANGES, **layout, **changes})


def _patched_set_up(settings: Mapping[str, Any], **kwargs: Any) -> Setup:
    """`set_up`, on a DeepSpeed that believes the CPU's fp16 to be supported."""
    if settings["parallel"]["engine"] != "deepspeed":
        return set_up(settings, **kwargs)
    from deepspeed.accelerator import get_accelerator

    from megascale.engine import factory

    accelerator = get_accelerator()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(accelerator), "is_fp16_supported", lambda self: True)
        patch.setattr(factory, "require_allowed", lambda config, device_type: None)
        return set_up(settings, **kwargs)


class _Spoiled:
    """An engine whose gradients are made infinite in some steps, so that it skips them."""

    def __init__(self, setup: Setup, steps: list[int]) -> None:
        self._engine, self._steps, self._count = setup.engine, steps, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self, lr: float) -> StepOutcome:
        if self._count in self._steps:
            for fragment in self._engine.fragments(["grad"]):
                fragment.tensor.fill_(math.inf)
        self._count += 1
        return self._engine.step(lr)


def _run(setup: Setup, state: TrainState, until: int) -> Curve:
    curve = []
    while state.step < until:
        result = train_step(setup.parts, state)
        curve.append((result.loss, result.grad_norm, result.skipped, result.loss_scale))
    return curve


def train_rank(settings: Mapping[str, Any], steps: int, skip: Sequence[int] = ()) -> Curve:
    """Runs on every rank: the curve of a run from its beginning, losing the updates `skip`."""
    setup = _patched_set_up(settings)
    setup.parts = replace(setup.parts, engine=_Spoiled(setup, list(skip)))
    curve = _run(setup, TrainState(), steps)
    setup.engine.close()
    return curve


def save_rank(settings: Mapping[str, Any], folder: str, steps: tuple[int, ...]) -> Curve:
    """Runs on every rank: save after each of `steps` but the last; the whole curve."""
    setup, state, curve = _patched_set_up(settings), TrainState(), []
    engine = setup.engine
    for step in steps:
        curve += _run(setup, state, step)
        if step != steps[-1]:
            saved = {"train": state.state_dict(), "engine": engine.state_dict(), "callbacks": {}}
            manager = CheckpointManager(f"{folder}/{step}")
            manager.save(step, engine.fragments(engine.state_kinds), saved, {})
    engine.close()
    return curve


def resume_rank(settings: Mapping[str, Any], folder: str, steps: int) -> Curve:
    """Runs on every rank: the rest of the curve after a checkpoint."""
    setup = _patched_set_up(settings, other_start=True)
    reader, notes = CheckpointManager(folder).open_newest_intact()
    assert reader is not None, notes
    state, _ = load_state(reader, setup.engine, setup.mesh)
    reader.close()
    curve = _run(setup, state, steps)
    setup.engine.close()
    return curve


def _skips(curve: Curve) -> list[int]:
    return [step for step, (_, _, skipped, _) in enumerate(curve) if skipped]


def _losses(curve: Curve) -> list[float]:
    return [loss for loss, *_ in curve]


@pytest.fixture(scope="module")
def references(pools: Pools, token_prefix: Path) -> Callable[[tuple[int, ...]], Curve]:
    """The single process in fp32, losing the given updates."""
    settings = _settings(token_prefix, "torch", 0)

    @functools.cache
    def reference(skip: tuple[int, ...]) -> Curve:
        return pools(1).run(train_rank, settings=settings, steps=STEPS, skip=skip)[0]

    return reference


@pytest.mark.parametrize(
    ("world", "engine", "stage", "tensor"),
    [
        (1, "torch", 0, 1),
        (2, "torch", 0, 1),
        (2, "torch", 3, 1),
        (2, "torch", 0, 2),
        (2, "deepspeed", 3, 1),
    ],
)
def test_fp16_follows_fp32(
    pools: Pools,
    token_prefix: Path,
    references: Callable[[tuple[int, ...]], Curve],
    world: int,
    engine: str,
    stage: int,
    tensor: int,
) -> None:
    changes = {**FP16, "parallel.tensor_parallel_size": tensor}
    settings = _settings(token_prefix, engine, stage, **changes)
    curves = pools(world).run(train_rank, settings=settings, steps=STEPS)
    assert curves == [curves[0]] * world
    found, exact = curves[0], references(())
    skips = _skips(found)
    alike = references(tuple(skips))
    assert skips[0] == 0, "the first step overflows"
    assert 2 <= len(skips) < STEPS / 5
    assert relative(_losses(found), _losses(exact)) < 2e-2
    assert relative(_losses(found), _losses(alike)) < 1e-3
    for (_, norm, skipped, scale), (_, exact_norm, *_) in zip(found, alike, strict=True):
        assert scale == 2.0 ** round(math.log2(scale))
        assert math.isinf(norm) if skipped else relative(norm, exact_norm) < 5e-3


@pytest.mark.parametrize(("engine", "stage"), [("torch", 0), ("torch", 2), ("deepspeed", 2)])
def test_resume_is_bit_identical_with_skipped_steps(
    pools: Pools, token_prefix: Path, tmp_path: Path, engine: str, stage: int
) -> None:
    """Saved before the first update (all steps skipped, no optimizer state yet) and later."""
    changes = {**FP16, "precision.hysteresis": 2, "precision.loss_scale_window": 3}
    settings = _settings(token_prefix, engine, stage, **changes)
    folder = str(tmp_path)
    straight = pools(2).run(save_rank, settings=settings, folder=folder, steps=(1, 6, 12))
    assert straight[0] == straight[1]
    skips = _skips(straight[0])
    assert skips[0] == 0
    assert skips[-1] > 6, "a step is skipped after the second checkpoint too"
    for step in (1, 6):
        resumed = pools(2).run(resume_rank, settings=settings, folder=f"{folder}/{step}", steps=12)
        assert resumed == [straight[0][step:]] * 2


def test_a_loss_scale_of_the_user_is_kept(pools: Pools, token_prefix: Path) -> None:
    """Static: an overflow is skipped and changes nothing, so at 2^40 nothing is ever learned."""
    for scale, learns in ((2.0**12, True), (2.0**40, False)):
        changes = {"precision.dtype": "fp16", "precision.loss_scale": scale}
        settings = _settings(token_prefix, "torch", 0, **changes)
        curve = pools(1).run(train_rank, settings=settings, steps=4)[0]
        assert [c[3] for c in curve] == [scale] * 4
        assert _skips(curve) == ([] if learns else [0, 1, 2, 3])
