"""Training a few steps on real ranks while recording everything that parity compares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megascale.checkpoint.manager import CheckpointManager
from megascale.cli.config import all_checks
from megascale.config.load import load_config
from megascale.config.schema import Config
from megascale.data.batch_size import batch_size_schedule
from megascale.data.ledger import Ledger
from megascale.data.loader import BatchLoader, EvaluationLoader
from megascale.engine.protocol import Engine, StepOutcome
from megascale.parallel.fragment import Fragment, global_runs
from megascale.parallel.mesh import ParallelMesh
from megascale.training.assemble import (
    assemble_engine,
    build_schedule,
    evaluation_loaders,
    mesh_of,
)
from megascale.training.datasets import open_corpora, resolve_vocab_size
from megascale.training.evaluation import evaluate
from megascale.training.host import prepare_host
from megascale.training.resume import load_state
from megascale.training.state import TrainState
from megascale.training.step import StepParts, train_step
from megascale.training.tasks.base import Task
from megascale.training.tasks.registry import build_task

# name, global shape, (begin, length) of the runs in the flattened global tensor, values
Piece = tuple[str, tuple[int, ...], tuple[np.ndarray, np.ndarray], np.ndarray]


@dataclass
class Record:
    """What one layout's run gave, in full tensors."""

    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, np.ndarray]]
    weights: dict[str, np.ndarray]
    sample_ids: list[list[int]]
    valid: tuple[float, int]


class _Recorder:
    """An engine that keeps each step's gradient fragments before they are consumed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.gradients: list[list[Piece]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self, lr: float) -> StepOutcome:
        self.gradients.append(pieces_of(self._engine.fragments(["grad"])))
        return self._engine.step(lr)


def pieces_of(fragments: Iterable[Fragment]) -> list[Piece]:
    return [
        (
            f.name,
            f.global_shape,
            global_runs(f.global_shape, f.box, f.start, f.numel),
            f.tensor.float().numpy().copy(),
        )
        for f in fragments
    ]


@dataclass
class Setup:
    """One rank's assembled run, without callbacks."""

    engine: _Recorder
    parts: StepParts
    valid: list[EvaluationLoader]
    mesh: ParallelMesh


class _OtherStart:
    """A task whose module starts from other weights: what a resume must overwrite."""

    def __init__(self, task: Task, config: Config) -> None:
        self._task = task
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def fill_initial(self, fragment: Fragment) -> None:
        run = self._config.run.model_copy(update={"seed": self._config.run.seed + 1000})
        build_task(self._config.model_copy(update={"run": run})).fill_initial(fragment)


def set_up(settings: Mapping[str, Any], *, other_start: bool = False) -> Setup:
    """Build engine, loaders and step parts of `settings` on this rank."""
    config = load_config(settings, checks=all_checks(), world_size=dist.get_world_size())
    corpora = open_corpora(config)
    config = resolve_vocab_size(config, corpora)
    cpu = torch.device("cpu")
    prepare_host(config.performance, cpu)
    mesh = mesh_of(config, cpu)
    task = build_task(config)
    starting = _OtherStart(task, config) if other_start else task
    data = task.open_data(corpora)
    engine = _Recorder(assemble_engine(config, starting, mesh, cpu, None, data.train))
    train = config.train
    loader = BatchLoader(
        data.train,
        batch_size_schedule(config.train),
        train.micro_batch_size,
        mesh.dp_rank,
        mesh.dp_size,
        prefetch=False,
    )
    parts = StepParts(
        engine=engine,
        loader=loader,
        schedule=build_schedule(config),
        mesh=mesh,
        device=cpu,
        ledger=Ledger(data.train, config.data.source_paths),
    )
    valid = evaluation_loaders(data.held_out["valid"], train.micro_batch_size, mesh)
    return Setup(engine, parts, valid, mesh)


def run_steps(setup: Setup, state: TrainState, steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the next `steps` steps."""
    results = [train_step(setup.parts, state) for _ in range(steps)]
    return [(result.loss, result.grad_norm) for result in results]


def record_rank(settings: Mapping[str, Any], steps: int, evaluate_every: int = 0) -> dict[str, Any]:
    """Runs on every rank: train from the config's own initial weights and record everything.

    With `evaluate_every`, a validation runs between steps: it must not change the training.
    """
    setup = set_up(settings)
    state = TrainState()
    curve, ids, valid = [], [], []
    for step in range(steps):
        batches = setup.parts.loader.load(state.samples_seen)
        ids.append([i for batch in batches for i in batch["sample_ids"].tolist()])
        curve += run_steps(setup, state, 1)
        if evaluate_every and step % evaluate_every == 0:
            evaluate(setup.engine, setup.valid, setup.mesh, setup.parts.device)
    valid = evaluate(setup.engine, setup.valid, setup.mesh, setup.parts.device)
    outcome = {
        "losses": [loss for loss, _ in curve],
        "norms": [norm for _, norm in curve],
        "gradients": setup.engine.gradients,
        "weights": pieces_of(setup.engine.fragments(["master"])),
        "sample_ids": ids,
        "dp_rank": setup.mesh.dp_rank,
        "valid": (valid.loss, valid.tokens),
    }
    setup.engine.close()
    return outcome


def save_rank(
    settings: Mapping[str, Any], folder: str, at_step: int, steps: int
) -> list[tuple[float, float]]:
    """Train `steps` steps, writing a checkpoint after `at_step`; the curve after it."""
    setup = set_up(settings)
    state = TrainState()
    run_steps(setup, state, at_step)
    engine = setup.engine
    saved = {
        "train": state.state_dict(),
        "engine": engine.state_dict(),
        "callbacks": {},
    }
    CheckpointManager(folder).save(at_step, engine.fragments(engine.state_kinds), saved, {})
    curve = run_steps(setup, state, steps - at_step)
    engine.close()
    return curve


def resume_rank(settings: Mapping[str, Any], folder: str, steps: int) -> list[tuple[float, float]]:
    """Load the newest checkpoint into a model that started elsewhere; the curve up to `steps`."""
    setup = set_up(settings, other_start=True)
    reader, notes = CheckpointManager(folder).open_newest_intact()
    assert reader is not None, notes
    state, _ = load_state(reader, setup.engine, setup.mesh)
    reader.close()
    curve = run_steps(setup, state, steps - state.step)
    setup.engine.close()
    return curve


def merge(ranks: list[dict[str, Any]]) -> Record:
    """Full tensors from the ranks' pieces; every element must be there exactly once."""
    for rank in ranks[1:]:
        assert rank["losses"] == ranks[0]["losses"]
        assert rank["norms"] == ranks[0]["norms"]
        assert rank["valid"] == ranks[0]["valid"]
    steps = range(len(ranks[0]["losses"]))
    return Record(
        losses=ranks[0]["losses"],
        norms=ranks[0]["norms"],
        gradients=[
            full_tensors([piece for r in ranks for piece in r["gradients"][s]]) for s in steps
        ],
        weights=full_tensors([piece for r in ranks for piece in r["weights"]]),
        sample_ids=[_by_dp_rank(ranks, s) for s in steps],
        valid=ranks[0]["valid"],
    )


def _by_dp_rank(ranks: list[dict[str, Any]], step: int) -> list[int]:
    """Sample ids of a step in order; ranks that share a replica must have read the same."""
    by_replica: dict[int, list[int]] = {}
    for rank in ranks:
        ids = rank["sample_ids"][step]
        assert by_replica.setdefault(rank["dp_rank"], ids) == ids
    return [i for dp_rank in sorted(by_replica) for i in by_replica[dp_rank]]


def full_tensors(pieces: list[Piece]) -> dict[str, np.ndarray]:
    """Whole tensors from their pieces; every element must be there exactly once."""
    tensors: dict[str, np.ndarray] = {}
    covered: dict[str, np.ndarray] = {}
    for name, shape, (begins, lengths), values in pieces:
        size = int(np.prod(shape))
        flat = tensors.setdefault(name, np.full(size, np.nan, dtype=np.float32))
        count = covered.setdefault(name, np.zeros(size, dtype=np.int64))
        at = 0
        for begin, length in zip(begins.tolist(), lengths.tolist(), strict=True):
            flat[begin : begin + length] = values[at : at + length]
            count[begin : begin + length] += 1
            at += length
    for name, count in covered.items():
        assert (count == 1).all(), f"{name}: elements held {count.min()} to {count.max()} times"
    return {name: flat.reshape(_shape(pieces, name)) for name, flat in tensors.items()}


def _shape(pieces: list[Piece], name: str) -> tuple[int, ...]:
    return next(shape for other, shape, _, _ in pieces if other == name)


def relative(found: Any, expected: Any, floor: float = 0.0) -> float:
    """Largest |found - expected| over the largest |expected| (at least `floor`); NaN fails."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(found).all(), "non-finite value"
    assert np.isfinite(expected).all(), "non-finite reference"
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), floor, 1e-30))
