"""Which weights of a checkpoint: the trained ones, their moving average, or a mean of several."""

from __future__ import annotations

import re

import torch

from megascale.checkpoint.manager import CheckpointManager
from megascale.checkpoint.reader import CheckpointReader
from megascale.errors import UserError
from megascale.parallel.fragment import Fragment, whole_box

EMA_KIND = "ema"
"""Kind of the moving average of the weights in a checkpoint."""


class WeightSource:
    """Reads parameters from one checkpoint, or as the mean over several of a run.

    Args:
        reader: the checkpoint, checked by the caller (`CheckpointReader.require_intact`).
        weights: "trained"; "ema", the moving average of a run with train.ema_decay; or "last-K",
            the mean over this and the K - 1 checkpoints of the run before it.

    Raises:
        UserError: other words, no average in the checkpoint, or too few or damaged checkpoints
            before it.
    """

    def __init__(self, reader: CheckpointReader, weights: str = "trained") -> None:
        self._kind, self._readers = _sources(reader, weights)

    def check_parameters(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise a UserError unless every checkpoint holds exactly these parameters."""
        for reader in self._readers:
            reader.check_parameters(shapes, (self._kind,))

    def fill(self, name: str, shape: tuple[int, ...], start: int, out: torch.Tensor) -> None:
        """Read the elements from `start` on of the flattened parameter into `out`, 1-D fp32."""
        share = 1.0 / len(self._readers)
        part = out if share == 1.0 else torch.empty_like(out)
        if share != 1.0:
            out.zero_()
        for reader in self._readers:
            reader.fill(Fragment(name, self._kind, shape, whole_box(shape), start, part))
            if share != 1.0:
                out.add_(part, alpha=share)

    def close(self) -> None:
        """Close the files of all checkpoints, the given one's too."""
        for reader in self._readers:
            reader.close()


def _sources(reader: CheckpointReader, weights: str) -> tuple[str, list[CheckpointReader]]:
    """The kind of state to read, and the checkpoints to average it over, `reader` first."""
    if weights == "trained":
        return "master", [reader]
    if weights == EMA_KIND and EMA_KIND in reader.manifest.kinds:
        return EMA_KIND, [reader]
    if weights == EMA_KIND:
        raise UserError(
            f"--weights ema: checkpoint {reader.storage.root} has no average of the weights",
            rule=f"it holds {', '.join(reader.manifest.kinds)}",
            remedy="train with train.ema_decay, or use --weights trained or last-K",
        )
    match = re.fullmatch(r"last-([1-9]\d{0,3})", weights)
    if match is None:
        raise UserError(
            f"--weights {weights}",
            rule="weights are trained, ema or last-K with K from 1 on",
            remedy="for example --weights last-3",
        )
    return "master", [reader, *_checkpoints_before(reader, int(match.group(1)) - 1)]


def _checkpoints_before(reader: CheckpointReader, count: int) -> list[CheckpointReader]:
    root = reader.storage.root.rstrip("/").rpartition("/")[0]
    manager = CheckpointManager(root or ".")
    steps = [step for step in manager.steps() if step < reader.manifest.step]
    if len(steps) < count:
        raise UserError(
            f"--weights last-{count + 1}: {len(steps)} checkpoints before step "
            f"{reader.manifest.step} in {root}",
            rule=f"the average over {count + 1} checkpoints needs {count} before this one",
            remedy="average fewer, or keep more with checkpoint.keep_last",
        )
    readers = [CheckpointReader(manager.path(step)) for step in steps[len(steps) - count :]]
    for other in readers:
        other.require_intact()
    return readers
