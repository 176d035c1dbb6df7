"""Loss over held-out samples, the same number on every rank and in every layout."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from megascale.data.loader import EvaluationLoader
from megascale.data.protocol import IGNORE_LABEL
from megascale.engine.protocol import Evaluable
from megascale.parallel.mesh import ParallelMesh


@dataclass(frozen=True)
class EvaluationResult:
    """Outcome of one pass over held-out samples.

    Attributes:
        loss: mean cross-entropy, nats per target token.
        tokens: number of target tokens.
        utf8_bytes: bytes of text that these tokens stand for; 0 when not known.
    """

    loss: float
    tokens: int
    utf8_bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss); inf when it overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

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
    total = torch.zeros(3, dtype=torch.float64)
    with engine.evaluating():
        for loader in loaders:
            for batch in loader:
                loss_sum, count = engine.forward({k: v.to(device) for k, v in batch.items()})
                total[0] += loss_sum.double().cpu()
                total[1] += count.cpu()
                if lengths is not None:
                    targets = batch["labels"]
                    total[2] += lengths[targets[targets != IGNORE_LABEL]].sum()
    total = mesh.sum_over_dp(total.to(device)).cpu()
    tokens = int(total[1])
    return EvaluationResult(float(total[0]) / max(tokens, 1), tokens, int(total[2]))
