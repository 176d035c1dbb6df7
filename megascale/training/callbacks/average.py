"""A moving average of the weights, kept beside them and saved with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from megascale.checkpoint.reader import CheckpointReader
from megascale.checkpoint.weights import EMA_KIND
from megascale.engine.protocol import Engine
from megascale.parallel.fragment import Fragment
from megascale.training.callbacks.base import Callback
from megascale.training.state import StepResult
from megascale.training.trainer import Trainer


class WeightAverageCallback(Callback):
    """Exponential moving average of the fp32 weights (arXiv:1806.05594 compares averages).

        average = decay * average + (1 - decay) * weights, after each update

    It starts from the weights that it finds. Each rank averages the fragments that it owns, so it
    costs 4 bytes a parameter over all ranks, and no communication.

    Args:
        engine: whose weights; already loaded when the run is resumed.
        decay: in [0, 1).
        reader: the checkpoint that the run resumes from; one without an average starts a new one.
    """

    name = "weight_average"

    def __init__(
        self, engine: Engine, decay: float, reader: CheckpointReader | None = None
    ) -> None:
        self._engine = engine
        self._decay = decay
        self._averages = [
            replace(fragment, kind=EMA_KIND, tensor=fragment.tensor.detach().clone())
            for fragment in self._masters()
        ]
        if reader is not None and EMA_KIND in reader.manifest.kinds:
            for fragment in self._averages:
                reader.fill(fragment)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Move the average towards the new weights; a skipped step has none."""
        if result.skipped:
            return
        with torch.no_grad():
            for average, weights in zip(self._averages, self._masters(), strict=True):
                average.tensor.lerp_(weights.tensor, 1.0 - self._decay)

    def fragments(self) -> Iterator[Fragment]:
        """The average, as fragments of the kind "ema"."""
        return iter(self._averages)

    def _masters(self) -> Iterator[Fragment]:
        return self._engine.fragments(["master"])
