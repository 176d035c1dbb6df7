"""Proving that a run that was killed and continued elsewhere is the run that never stopped."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megascale.checkpoint.manager import CheckpointManager
from megascale.config.schema import Config
from megascale.training.assemble import assemble_step
from megascale.training.resume import load_state
from megascale.training.state import TrainState
from megascale.training.step import StepParts, train_step

OTHER_SEED = 1000
"""Added to run.seed for the weights that a resuming model starts from, before it loads."""


@dataclass(frozen=True)
class StepRecord:
    """One step of one run: what must be the same after a resume.

    Attributes:
        samples: sample ids of the global batch, in order of the data-parallel ranks.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    loss_scale: float
    skipped: bool
    samples: list[int]


@dataclass(frozen=True)
class ResumeVerdict:
    """Outcome of a comparison.

    Attributes:
        loss, norm: largest relative differences over the steps after the resume.
        identical: every number is the same to the last bit.
        problem: "" when all agree within the tolerance, else the first thing that does not.
    """

    loss: float
    norm: float
    identical: bool
    problem: str


def straight_run(config: Config, device: torch.device, steps: int, out: Path) -> None:
    """Train `steps` steps and write their records to `out`. Collective."""
    parts = assemble_step(config, device)
    _write(out, _steps(parts, TrainState(), steps))
    parts.loader.close()


def killed_run(config: Config, device: torch.device, at_step: int, folder: Path) -> None:
    """Train `at_step` steps, save, train one more, and end by SIGKILL. Collective."""
    parts = assemble_step(config, device)
    state = TrainState()
    _steps(parts, state, at_step)
    engine = parts.engine
    saved = {"train": state.state_dict(), "engine": engine.state_dict(), "callbacks": {}}
    CheckpointManager(str(folder)).save(
        at_step,
        engine.fragments(engine.state_kinds),
        saved,
        {},
        replicas=engine.fragments(engine.state_kinds, replicas=True),
    )
    _steps(parts, state, 1)  # nothing of it may be seen afterwards
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def resumed_run(config: Config, device: torch.device, steps: int, folder: Path, out: Path) -> None:
    """Load the newest checkpoint into a model of another seed and train up to `steps`."""
    run = config.run.model_copy(update={"seed": config.run.seed + OTHER_SEED})
    parts = assemble_step(config, device, weights_of=config.model_copy(update={"run": run}))
    manager = CheckpointManager(str(folder))
    reader, notes = manager.open_newest_intact()
    assert reader is not None, notes
    state, _ = load_state(reader, parts.engine, parts.mesh)
    reader.close()
    _write(out, _steps(parts, state, steps - state.step))
    parts.loader.close()


def compare_resume(
    expected: Sequence[StepRecord], found: Sequence[StepRecord], *, same_layout: bool, limit: float
) -> ResumeVerdict:
    """Compare a resumed run with the one that never stopped.

    Args:
        expected: every step of the straight run. found: the steps after the resume.
        same_layout: then every bit must agree; else loss and norm within `limit`, relative.
    """
    by_step = {record.step: record for record in expected}
    loss = norm = 0.0
    problem = "" if found else "no step was trained after the resume"
    identical = bool(found)
    for record in found:
        other = by_step[record.step]
        away = [
            abs(a - b) / max(abs(b), 1e-30) if a != b else 0.0
            for a, b in ((record.loss, other.loss), (record.grad_norm, other.grad_norm))
        ]
        loss, norm = (b if not b <= a else a for a, b in zip((loss, norm), away, strict=True))
        exact = record == other
        identical = identical and exact
        first = _first_difference(record, other, away, 0.0 if same_layout else limit)
        if first and not problem:
            problem = f"step {record.step}: {first}"
    return ResumeVerdict(loss, norm, identical, problem)


def _first_difference(
    found: StepRecord, expected: StepRecord, away: Sequence[float], limit: float
) -> str:
    if found.samples != expected.samples:
        return "other samples, or in another order"
    for name in ("lr", "loss_scale", "skipped"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        if ours != theirs:
            return f"{name} {ours} instead of {theirs}"
    for name, size in zip(("loss", "grad_norm"), away, strict=True):
        if not size <= limit:
            ours, theirs = getattr(found, name), getattr(expected, name)
            return f"{name} {ours!r} instead of {theirs!r} (relative {size:.1e})"
    return ""


def read_steps(path: Path) -> list[StepRecord]:
    """What `straight_run` or `resumed_run` wrote."""
    return [StepRecord(**row) for row in json.loads(path.read_text())]


def _steps(parts: StepParts, state: TrainState, count: int) -> list[StepRecord]:
    records = []
    mesh = parts.mesh
    for _ in range(count):
        batches = parts.loader.load(state.samples_seen)
        ours = [i for batch in batches for i in batch["sample_ids"].tolist()]
        everyone: list[tuple[int, list[int]]] = [(0, [])] * mesh.world_size
        dist.all_gather_object(everyone, (mesh.dp_rank, ours))
        replicas = dict(everyone)
        result = train_step(parts, state)
        records.append(
            StepRecord(
                step=result.step,
                loss=result.loss,
                grad_norm=result.grad_norm,
                lr=result.lr,
                loss_scale=result.loss_scale,
                skipped=result.skipped,
                samples=[i for rank in sorted(replicas) for i in replicas[rank]],
            )
        )
    return records


def _write(out: Path, records: list[StepRecord]) -> None:
    if dist.get_rank() == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps([asdict(record) for record in records]))
