"""Training a few steps on real ranks while recording everything that parity compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megascale.cli.config import all_checks
from megascale.config.load import load_config
from megascale.data.loader import BatchLoader
from megascale.engine.protocol import Engine, StepOutcome
from megascale.parallel.mesh import build_mesh
from megascale.training.assemble import assemble_engine, build_schedule
from megascale.training.datasets import open_corpora, resolve_vocab_size
from megascale.training.state import TrainState
from megascale.training.step import StepParts, train_step
from megascale.training.tasks.registry import build_task


@dataclass
class Record:
    """What one layout's run gave, in full tensors."""

    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, np.ndarray]]
    weights: dict[str, np.ndarray]
    sample_ids: list[list[int]]


class _Recorder:
    """An engine that keeps each step's gradient fragments before they are consumed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.gradients: list[list[tuple[str, tuple[int, ...], int, np.ndarray]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self, lr: float) -> StepOutcome:
        self.gradients.append(_pieces(self._engine, "grad"))
        return self._engine.step(lr)


def _pieces(engine: Engine, kind: str) -> list[tuple[str, tuple[int, ...], int, np.ndarray]]:
    return [
        (f.name, f.global_shape, f.start, f.tensor.float().numpy().copy())
        for f in engine.fragments([kind])
    ]


def record_rank(settings: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Runs on every rank: train `steps` steps from the config's own initial weights."""
    config = load_config(
        settings, checks=all_checks(), world_size=dist.get_world_size()
    )
    config = resolve_vocab_size(config, corpora := open_corpora(config))
    mesh = build_mesh("cpu")
    task = build_task(config)
    engine = _Recorder(assemble_engine(config, task, mesh, torch.device("cpu")))
    loader = BatchLoader(
        task.open_data(corpora).train,
        config.train.global_batch_size,
        config.train.micro_batch_size,
        mesh.dp_rank,
        mesh.dp_size,
        prefetch=False,
    )
    parts = StepParts(
        engine=engine,
        loader=loader,
        schedule=build_schedule(config),
        mesh=mesh,
        device=torch.device("cpu"),
        global_batch_size=config.train.global_batch_size,
        tokens_per_sample=task.tokens_per_sample(),
    )
    state = TrainState()
    losses, norms, ids = [], [], []
    for _ in range(steps):
        ids.append([i for b in loader.load(state.samples_seen) for i in b["sample_ids"].tolist()])
        result = train_step(parts, state)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    outcome = {
        "losses": losses,
        "norms": norms,
        "gradients": engine.gradients,
        "weights": _pieces(engine, "master"),
        "sample_ids": ids,
    }
    engine.close()
    return outcome


def merge(ranks: list[dict[str, Any]]) -> Record:
    """Full tensors from the ranks' pieces; every element must be there exactly once."""
    for rank in ranks[1:]:
        assert rank["losses"] == ranks[0]["losses"]
        assert rank["norms"] == ranks[0]["norms"]
    steps = range(len(ranks[0]["losses"]))
    return Record(
        losses=ranks[0]["losses"],
        norms=ranks[0]["norms"],
        gradients=[_full([piece for r in ranks for piece in r["gradients"][s]]) for s in steps],
        weights=_full([piece for r in ranks for piece in r["weights"]]),
        sample_ids=[[i for r in ranks for i in r["sample_ids"][s]] for s in steps],
    )


def _full(pieces: list[tuple[str, tuple[int, ...], int, np.ndarray]]) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    covered: dict[str, np.ndarray] = {}
    for name, shape, start, values in pieces:
        size = int(np.prod(shape))
        flat = tensors.setdefault(name, np.full(size, np.nan, dtype=np.float32))
        count = covered.setdefault(name, np.zeros(size, dtype=np.int64))
        flat[start : start + values.size] = values
        count[start : start + values.size] += 1
    for name, count in covered.items():
        assert (count == 1).all(), f"{name}: elements held {count.min()} to {count.max()} times"
    return {name: flat.reshape(_shape(pieces, name)) for name, flat in tensors.items()}


def _shape(
    pieces: list[tuple[str, tuple[int, ...], int, np.ndarray]], name: str
) -> tuple[int, ...]:
    return next(shape for other, shape, _, _ in pieces if other == name)


def relative(found: Any, expected: Any, floor: float = 0.0) -> float:
    """Largest |found - expected| over the largest |expected| (at least `floor`); NaN fails."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(found).all(), "non-finite value"
    assert np.isfinite(expected).all(), "non-finite reference"
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), floor, 1e-30))
