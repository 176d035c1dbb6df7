"""The loss of token predictions, with the regularisers that a run may ask for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megascale.data.protocol import IGNORE_LABEL


@dataclass(frozen=True)
class TokenLoss:
    """Sum of the cross-entropies of token predictions.

    Attributes:
        label_smoothing: share e of a target's probability that is spread evenly over the
            vocabulary (arXiv:1512.00567).
        z_loss: coefficient of log(Z)^2 of each target, Z the softmax's normaliser; keeps the
            logits from drifting (PaLM, arXiv:2204.02311, section 5).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, *, training: bool
    ) -> torch.Tensor:
        """Sum in nats over the targets, an fp32 scalar.

        Args:
            logits: (..., V) of any floating type. labels: (...) ids, -100 where there is no target.
            training: whether the regularisers count; a validation loss is the plain one.
        """
        flat, targets = logits.float().flatten(0, -2), labels.flatten()
        total = F.cross_entropy(
            flat,
            targets,
            ignore_index=IGNORE_LABEL,
            reduction="sum",
            label_smoothing=self.label_smoothing if training else 0.0,
        )
        if training and self.z_loss:
            log_z = flat.logsumexp(-1)
            total = total + self.z_loss * log_z.square()[targets != IGNORE_LABEL].sum()
        return total
