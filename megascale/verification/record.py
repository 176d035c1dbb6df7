"""One rank's part of a recorded run: every gradient and weight of every step, in files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megascale.checkpoint.storage import Storage
from megascale.checkpoint.tensor_file import TensorFile, write_tensors
from megascale.config.schema import Config
from megascale.engine.protocol import Engine, MicroBatch, StepOutcome
from megascale.parallel.fragment import Box, Fragment, global_runs
from megascale.training.assemble import assemble_step
from megascale.training.state import TrainState
from megascale.training.step import train_step
from megascale.verification.collectives import CollectiveCounter
from megascale.verification.outputs import OutputSums, pooled
from megascale.verification.storages import live_bytes
from megascale.wide import widen


@dataclass(frozen=True)
class Part:
    """What one rank held of one tensor at one step.

    Attributes:
        step: 0-based step, or START.
        kind: "grad" (before clipping) or "master" (after the update).
        line: the line of the tensor-parallel plan that cut it.
    """

    step: int
    kind: str
    name: str
    global_shape: tuple[int, ...]
    box: Box
    start: int
    numel: int
    line: str

    @property
    def key(self) -> str:
        """Name of the tensor in the rank's file."""
        return f"{self.step}/{self.kind}/{self.name}"


START = -1
"""The "step" of the weights before the first one."""

TENSOR_STEPS = 20
"""Gradients and weights are kept of so many steps and of the last one; losses and norms of all."""


class RecordingEngine:
    """An engine that keeps copies of gradients before, and of masters after, each step.

    Args:
        steps: of the whole run.
    """

    def __init__(self, engine: Engine, steps: int) -> None:
        self._engine, self._steps = engine, steps
        self._step = 0
        self.parts: list[Part] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self.outputs = OutputSums()
        self._keep("master", START)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], total_targets: torch.Tensor
    ) -> torch.Tensor:
        """See `Engine.forward_backward`."""
        watching = self.outputs.watching(self._engine.module) if not self._step else nullcontext()
        with watching:
            return self._engine.forward_backward(micro_batches, total_targets)

    def step(self, lr: float) -> StepOutcome:
        """See `Engine.step`."""
        kept = self._step < TENSOR_STEPS or self._step == self._steps - 1
        if kept:
            self._keep("grad", self._step)
        outcome = self._engine.step(lr)
        if kept:
            self._keep("master", self._step)
        self._step += 1
        return outcome

    def _keep(self, kind: str, step: int) -> None:
        for fragment in self._engine.fragments([kind], replicas=True):
            part = _describe(step, fragment, self._engine)
            self.parts.append(part)
            self.tensors[part.key] = widen(fragment.tensor.detach()).cpu().clone()


def _describe(step: int, fragment: Fragment, engine: Engine) -> Part:
    return Part(
        step=step,
        kind=fragment.kind,
        name=fragment.name,
        global_shape=fragment.global_shape,
        box=fragment.box,
        start=fragment.start,
        numel=fragment.numel,
        line=engine.placements[fragment.name].rule,
    )


def record_run(config: Config, device: torch.device, steps: int, folder: Path) -> None:
    """Train `steps` steps and write this rank's record below `folder`. Collective."""
    parts = assemble_step(config, device, wrap=partial(RecordingEngine, steps=steps))
    recorder = parts.engine
    assert isinstance(recorder, RecordingEngine)
    state = TrainState()
    losses, norms, samples = [], [], []
    counter = CollectiveCounter(parts.mesh)
    for step in range(steps):
        batches = parts.loader.load(state.samples_seen)
        samples.append([i for batch in batches for i in batch["sample_ids"].tolist()])
        # the last step stands for all: the first ones build states and buffers
        with counter if step == steps - 1 else nullcontext():
            result = train_step(parts, state)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    mesh = parts.mesh
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"rank_{mesh.rank:05d}.safetensors", "wb") as stream:
        write_tensors(stream, recorder.tensors)
    curve = {
        "losses": losses,
        "norms": norms,
        "samples": samples,
        "dp_rank": mesh.dp_rank,
        "outputs": recorder.outputs.sums,
        "sent": {" ".join(key): size for key, size in sorted(counter.bytes.items())},
        "held": asdict(live_bytes(recorder)),
        "parts": [asdict(part) for part in recorder.parts],
    }
    (folder / f"rank_{mesh.rank:05d}.json").write_text(json.dumps(curve))
    parts.loader.close()
    recorder.close()
    mesh.close()


@dataclass
class RunRecord:
    """All ranks' records of one run, read back.

    Attributes:
        losses, norms: by step.
        samples: by step, sample ids in global order.
        agree: by step, whether all ranks reported the same loss.
        ranks: rank -> its parts by (step, kind, name).
        outputs: (mean, root mean square) of what each module put out in the first step, in the
            order of the forward.
        sent: bytes of the collectives of the last step on rank 0, by axis and kind.
        held: bytes that live on rank 0 after it: weights, masters, states.
    """

    losses: list[float]
    norms: list[float]
    samples: list[list[int]]
    agree: list[bool]
    ranks: list[dict[tuple[int, str, str], Part]]
    outputs: dict[str, tuple[float, float]]
    sent: dict[str, int]
    held: dict[str, int]
    files: list[TensorFile]

    @property
    def names(self) -> list[str]:
        """Parameter names in the order of the module."""
        return list(dict.fromkeys(part.name for rank in self.ranks for part in rank.values()))

    def has_tensors(self, step: int) -> bool:
        """Whether gradients and weights of a step were kept."""
        return step < TENSOR_STEPS or step == len(self.losses) - 1

    def copies(self, step: int, kind: str, name: str) -> Iterator[tuple[int, Part, np.ndarray]]:
        """(rank, part, values) of every rank that held some of a tensor."""
        for rank, parts in enumerate(self.ranks):
            part = parts.get((step, kind, name))
            if part is not None:
                yield rank, part, self.files[rank].read(part.key).numpy()

    def whole(self, step: int, kind: str, name: str) -> np.ndarray:
        """The global tensor, flat fp64; elements that no rank held are NaN."""
        flat: np.ndarray | None = None
        for _, part, values in self.copies(step, kind, name):
            if flat is None:
                flat = np.full(int(np.prod(part.global_shape)), np.nan)
            put(flat, part, values)
        assert flat is not None, f"no rank recorded {kind} of {name}"
        return flat

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()


def put(flat: np.ndarray, part: Part, values: np.ndarray) -> None:
    """Write a rank's values where they belong in the flattened global tensor."""
    begins, lengths = global_runs(part.global_shape, part.box, part.start, part.numel)
    at = 0
    for begin, length in zip(begins.tolist(), lengths.tolist(), strict=True):
        flat[begin : begin + length] = values[at : at + length]
        at += length


def take(flat: np.ndarray, part: Part) -> np.ndarray:
    """The values of the flattened global tensor that a rank's part covers."""
    begins, lengths = global_runs(part.global_shape, part.box, part.start, part.numel)
    runs = zip(begins.tolist(), lengths.tolist(), strict=True)
    return np.concatenate([flat[begin : begin + length] for begin, length in runs])


def read_record(folder: Path, world_size: int) -> RunRecord:
    """Read what the ranks of one run wrote."""
    storage = Storage(str(folder))
    curves = [
        json.loads((folder / f"rank_{rank:05d}.json").read_text()) for rank in range(world_size)
    ]
    ranks = [{_key(part): part for part in map(_part, curve["parts"])} for curve in curves]
    files = []
    for rank in range(world_size):
        name = f"rank_{rank:05d}.safetensors"
        files.append(TensorFile(storage.open_read(name), name, storage.size(name)))
    return RunRecord(
        losses=curves[0]["losses"],
        norms=curves[0]["norms"],
        samples=_global_samples(curves),
        agree=[
            len(set(losses)) == 1 for losses in zip(*(c["losses"] for c in curves), strict=True)
        ],
        ranks=ranks,
        outputs=pooled(curve["outputs"] for curve in curves),
        sent=curves[0]["sent"],
        held=curves[0]["held"],
        files=files,
    )


def _part(values: dict[str, Any]) -> Part:
    box = tuple((int(begin), int(end)) for begin, end in values["box"])
    return Part(**{**values, "global_shape": tuple(values["global_shape"]), "box": box})


def _key(part: Part) -> tuple[int, str, str]:
    return part.step, part.kind, part.name


def _global_samples(curves: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Sample ids of each step in the order of the data-parallel ranks, one a replica."""
    replicas = {curve["dp_rank"]: curve["samples"] for curve in curves}
    steps = range(len(curves[0]["samples"]))
    return [[i for dp in sorted(replicas) for i in replicas[dp][step]] for step in steps]
