"""One rank's part of a recorded run: every gradient and weight of every step, in files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from megascale.parallel.mesh import ParallelMesh
from megascale.training.assemble import assemble_step
from megascale.training.state import TrainState
from megascale.training.step import train_step
from megascale.verification.collectives import CollectiveCounter
from megascale.verification.outputs import OutputSums, pooled
from megascale.verification.storages import live_bytes
from megascale.wide import wide_dtype


@dataclass(frozen=True)
class Part:
    """What one rank held of one tensor in every step.

    Attributes:
        kind: "grad" (before clipping) or "master" (after the update).
        line: the line of the tensor-parallel plan that cut it.
    """

    kind: str
    name: str
    global_shape: tuple[int, ...]
    box: Box
    start: int
    numel: int
    line: str

    @property
    def key(self) -> str:
        """Name of the tensor in the rank's file: (rows of `kept_rows`, numel)."""
        return f"{self.kind}/{self.name}"


START = -1
"""The "step" of the weights before the first one."""

OUTPUT_STEPS = 2
"""Steps of which outputs of modules are summed: the second one shows weights that are stale."""

TENSOR_STEPS = 20
"""Gradients and weights are kept of so many steps and of the last one; losses and norms of all."""


def kept_rows(kind: str, steps: int) -> list[int]:
    """The steps of which a run of `steps` steps keeps tensors of a kind, in order."""
    last = [steps - 1] if steps > TENSOR_STEPS else []
    first = [START] if kind == "master" else []
    return [*first, *range(min(steps, TENSOR_STEPS)), *last]


class RecordingEngine:
    """An engine that keeps copies of gradients before, and of masters after, each step.

    Args:
        steps: of the whole run.
    """

    def __init__(self, engine: Engine, steps: int) -> None:
        self._engine, self._steps = engine, steps
        self._step = 0
        self.parts: dict[str, Part] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.outputs = [OutputSums() for _ in range(min(steps, OUTPUT_STEPS))]
        self._keep("master", START)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], total_targets: torch.Tensor
    ) -> torch.Tensor:
        """See `Engine.forward_backward`."""
        with self._watching():
            return self._engine.forward_backward(micro_batches, total_targets)

    def _watching(self) -> AbstractContextManager[None]:
        if self._step < len(self.outputs):
            return self.outputs[self._step].watching(self._engine.module)
        return nullcontext()

    def step(self, lr: float) -> StepOutcome:
        """See `Engine.step`."""
        self._keep("grad", self._step)
        outcome = self._engine.step(lr)
        self._keep("master", self._step)
        self._step += 1
        return outcome

    def _keep(self, kind: str, step: int) -> None:
        rows = kept_rows(kind, self._steps)
        if step not in rows:
            return
        row = rows.index(step)
        for fragment in self._engine.fragments([kind], replicas=True):
            part = self._part(fragment, len(rows))
            if (part.start, part.numel) != (fragment.start, fragment.numel):
                raise RuntimeError(f"{part.key} lies elsewhere in step {step} than before")
            self.tensors[part.key][row] = fragment.tensor.detach()

    def _part(self, fragment: Fragment, rows: int) -> Part:
        """The description of a fragment; its place is made when it is first seen."""
        found = self.parts.get(f"{fragment.kind}/{fragment.name}")
        if found is None:
            found = _describe(fragment, self._engine)
            self.parts[found.key] = found
            # a step without the fragment stays NaN, which no comparison passes
            self.tensors[found.key] = torch.full(
                (rows, fragment.numel), torch.nan, dtype=wide_dtype(fragment.tensor.dtype)
            )
        return found


def _describe(fragment: Fragment, engine: Engine) -> Part:
    return Part(
        kind=fragment.kind,
        name=fragment.name,
        global_shape=fragment.global_shape,
        box=fragment.box,
        start=fragment.start,
        numel=fragment.numel,
        line=engine.placements[fragment.name].rule,
    )


def record_run(
    config: Config, device: torch.device, steps: int, folder: Path, *, count_sent: bool = True
) -> None:
    """Train `steps` steps and write this rank's record below `folder`. Collective.

    Args:
        count_sent: whether the last step's collectives are counted, which makes it slower.
    """
    parts = assemble_step(config, device, wrap=partial(RecordingEngine, steps=steps))
    recorder, mesh = parts.engine, parts.mesh
    assert isinstance(recorder, RecordingEngine)
    state = TrainState()
    losses, norms, samples = [], [], []
    counter = CollectiveCounter(mesh)
    for step in range(steps):
        batches = parts.loader.load(state.samples_seen)
        samples.append([i for batch in batches for i in batch["sample_ids"].tolist()])
        # the last step stands for all: the first ones build states and buffers
        with counter if count_sent and step == steps - 1 else nullcontext():
            result = train_step(parts, state)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"rank_{mesh.rank:05d}.safetensors", "wb") as stream:
        write_tensors(stream, recorder.tensors)
    curve = {
        "losses": losses,
        "norms": norms,
        "samples": samples,
        "dp_rank": mesh.dp_rank,
        "outputs": [_counting(outputs.sums, recorder.module, mesh) for outputs in recorder.outputs],
        "sent": {" ".join(key): size for key, size in sorted(counter.bytes.items())},
        "held": asdict(live_bytes(recorder)),
        "parts": [asdict(part) for part in recorder.parts.values()],
    }
    (folder / f"rank_{mesh.rank:05d}.json").write_text(json.dumps(curve))
    parts.loader.close()
    recorder.close()
    mesh.close()


def _counting(
    sums: dict[str, list[float]], module: torch.nn.Module, mesh: ParallelMesh
) -> dict[str, list[float]]:
    """Without the outputs of heads that look at a token which another rank holds."""
    if not mesh.cp_rank:
        return sums
    named = module.named_modules()
    heads = tuple(name for name, part in named if getattr(part, "of_first_token", False))
    return {name: kept for name, kept in sums.items() if not name.startswith(heads)}


@dataclass
class RunRecord:
    """All ranks' records of one run, read back.

    Attributes:
        losses, norms: by step.
        samples: by step, sample ids in global order.
        agree: by step, whether all ranks reported the same loss.
        ranks: rank -> its parts by (kind, name).
        outputs: of the first steps, (mean, root mean square) of what each module put out, in the
            order of the forward.
        sent: bytes of the collectives of the last step on rank 0, by axis and kind.
        held: bytes that live on rank 0 after it: weights, masters, states.
    """

    losses: list[float]
    norms: list[float]
    samples: list[list[int]]
    agree: list[bool]
    ranks: list[dict[tuple[str, str], Part]]
    outputs: list[dict[str, tuple[float, float]]]
    sent: dict[str, int]
    held: dict[str, int]
    files: list[TensorFile]

    @property
    def names(self) -> list[str]:
        """Parameter names in the order of the module."""
        return list(dict.fromkeys(part.name for rank in self.ranks for part in rank.values()))

    def has_tensors(self, step: int) -> bool:
        """Whether gradients and weights of a step were kept."""
        return step in self.rows("grad")

    def rows(self, kind: str) -> list[int]:
        """The step of each row of `blocks` and `whole_block`."""
        return kept_rows(kind, len(self.losses))

    def blocks(
        self, kind: str, name: str, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[int, Part, np.ndarray]]:
        """(rank, part, (rows, numel) values) of every rank that held some of a tensor.

        Args:
            first, last: the half-open interval of rows; all by default.
        """
        end = len(self.rows(kind)) if last is None else last
        for rank, parts in enumerate(self.ranks):
            part = parts.get((kind, name))
            if part is not None:
                count = (end - first) * part.numel
                flat = self.files[rank].read(part.key, first * part.numel, count)
                yield rank, part, flat.numpy().reshape(end - first, part.numel)

    def copies(self, step: int, kind: str, name: str) -> Iterator[tuple[int, Part, np.ndarray]]:
        """(rank, part, values) of every rank that held some of a tensor after a step."""
        row = self.rows(kind).index(step)
        for rank, part, values in self.blocks(kind, name, row, row + 1):
            yield rank, part, values[0]

    def whole(self, step: int, kind: str, name: str) -> np.ndarray:
        """The global tensor, flat fp64; elements that no rank held are NaN."""
        row = self.rows(kind).index(step)
        whole = joined(self.blocks(kind, name, row, row + 1))
        assert whole is not None, f"no rank recorded {kind} of {name}"
        return whole[0]

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()


def joined(blocks: Iterable[tuple[int, Part, np.ndarray]]) -> np.ndarray | None:
    """(rows, elements of the global tensor) fp64 from the ranks' parts; NaN where nobody has any.

    Several ranks may hold the same elements: the last one's count. None without a part.
    """
    whole: np.ndarray | None = None
    for _, part, values in blocks:
        if whole is None:
            whole = np.full((len(values), math.prod(part.global_shape)), np.nan)
        if part.numel == whole.shape[1]:
            whole[:] = values
        else:
            whole[:, places(part)] = values
    return whole


def places(part: Part) -> np.ndarray:
    """Where the elements of a rank's part lie in the flattened global tensor."""
    begins, lengths = global_runs(part.global_shape, part.box, part.start, part.numel)
    ends = np.cumsum(lengths)
    return np.arange(part.numel) + np.repeat(begins - (ends - lengths), lengths)


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
        outputs=[pooled(sums) for sums in zip(*(c["outputs"] for c in curves), strict=True)],
        sent=curves[0]["sent"],
        held=curves[0]["held"],
        files=files,
    )


def _part(values: dict[str, Any]) -> Part:
    box = tuple((int(begin), int(end)) for begin, end in values["box"])
    return Part(**{**values, "global_shape": tuple(values["global_shape"]), "box": box})


def _key(part: Part) -> tuple[str, str]:
    return part.kind, part.name


def _global_samples(curves: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Sample ids of each step in the order of the data-parallel ranks, one a replica."""
    replicas = {curve["dp_rank"]: curve["samples"] for curve in curves}
    steps = range(len(curves[0]["samples"]))
    return [[i for dp in sorted(replicas) for i in replicas[dp][step]] for step in steps]
