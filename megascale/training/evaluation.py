"""Loss over held-out samples, the same number on every rank and in every layout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch

from megascale.data.loader import EvaluationLoader
from megascale.data.protocol import IGNORE_LABEL
from megascale.engine.protocol import Evaluable
from megascale.parallel.context_parallel import own_tokens
from megascale.parallel.mesh import ParallelMesh

AT_ONCE = 32
"""Micro-batches of one forward. A pipeline of p ranks waits (p - 1) / 32 of the time that it
computes; only ids and labels of these are held."""


@dataclass(frozen=True)
class EvaluationResult:
    """Outcome of one pass over held-out samples.

    Attributes:
        loss: mean cross-entropy, nats per target token; with several objectives the sum of their
            means.
        tokens: number of target tokens.
        utf8_bytes: bytes of text that these tokens stand for; 0 when not known.
        metrics: further numbers by name: "masked_lm_loss" and the like where there are several
            objectives, "masked_lm_accuracy" where the task measures it.
        other_losses: the part of `loss` that is not that of the tokens.
    """

    loss: float
    tokens: int
    utf8_bytes: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    other_losses: float = 0.0

    @property
    def perplexity(self) -> float:
        """exp of the tokens' loss; inf when it overflows."""
        loss = self.loss - self.other_losses
        return math.exp(loss) if loss < 700 else math.inf

    @property
    def scores(self) -> dict[str, float]:
        """Every number that says how good the model is, by name."""
        return {"loss": self.loss, "perplexity": self.perplexity, **self.metrics}

    @property
    def bits_per_byte(self) -> float | None:
        """Loss in bits over the bytes of the text: comparable between tokenizers."""
        if not self.utf8_bytes:
            return None
        return self.loss * self.tokens / (math.log(2) * self.utf8_bytes)


def evaluate(
    engine: Evaluable,
    loaders: Iterable[EvaluationLoader],
    mesh: ParallelMesh,
    device: torch.device,
    byte_lengths: np.ndarray | None = None,
) -> EvaluationResult:
    """Evaluate on every sample of `loaders`; collective.

    Args:
        byte_lengths: (V,) UTF-8 bytes that each token stands for, for bits per byte.
    """
    lengths = None if byte_lengths is None else torch.from_numpy(byte_lengths.astype(np.int64))
    names = _objectives(engine)
    total = torch.zeros(3, len(names), dtype=torch.float64)  # loss sums, targets, correct ones
    utf8_bytes = torch.zeros((), dtype=torch.float64)
    measured = 0
    with engine.evaluating():
        for loader in loaders:
            for wholes in _groups(loader):
                batches = [own_tokens(whole, mesh.cp_rank, mesh.cp_size) for whole in wholes]
                there = [{k: v.to(device) for k, v in batch.items()} for batch in batches]
                for outputs in engine.forward(there):
                    measured = len(outputs)
                    for row, output in zip(total, outputs, strict=False):
                        row += output.double().cpu()
                if lengths is not None:
                    targets = torch.cat([batch["labels"].flatten() for batch in batches])
                    utf8_bytes += lengths[targets[targets != IGNORE_LABEL]].sum()
    total = mesh.sum_over_data(total.to(device)).cpu()
    utf8_bytes = mesh.sum_over_data(utf8_bytes.to(device)).cpu()
    losses, correct = total[[0, 2]] / total[1].clamp(min=1.0)
    metrics = {}
    if len(names) > 1:
        metrics = {f"{name}_loss": float(x) for name, x in zip(names, losses, strict=True)}
    if measured == len(total):
        metrics |= {f"{name}_accuracy": float(x) for name, x in zip(names, correct, strict=True)}
    return EvaluationResult(
        float(losses.sum()), int(total[1, 0]), int(utf8_bytes), metrics, float(losses[1:].sum())
    )


def _groups(loader: EvaluationLoader) -> Iterator[Sequence[Mapping[str, torch.Tensor]]]:
    """Micro-batches, some at a time."""
    waiting = iter(loader)
    while group := list(islice(waiting, AT_ONCE)):
        yield group


def _objectives(engine: Evaluable) -> tuple[str, ...]:
    """Names of the module's objectives, in the order of its outputs."""
    names = engine.module.objectives
    assert isinstance(names, tuple), names
    return names
