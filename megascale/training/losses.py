"""The loss of token predictions, with the regularisers that a run may ask for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megascale.config.schema import Config
from megascale.data.protocol import IGNORE_LABEL
from megascale.parallel.cross_entropy import vocab_parallel_cross_entropy, whole_vocabulary
from megascale.parallel.linear_cross_entropy import LossTerms, linear_cross_entropy
from megascale.wide import widen


@dataclass(frozen=True)
class VocabularyPart:
    """The part of the vocabulary whose logits a rank has.

    Attributes:
        first_id: its first id. vocab_size: V of the whole. group: the ranks that share it.
    """

    first_id: int
    vocab_size: int
    group: dist.ProcessGroup


@dataclass(frozen=True)
class TokenLoss:
    """Sum of the cross-entropies of token predictions.

    Attributes:
        label_smoothing: share e of a target's probability that is spread evenly over the
            vocabulary (arXiv:1512.00567).
        z_loss: coefficient of log(Z)^2 of each target, Z the softmax's normaliser; keeps the
            logits from drifting (PaLM, arXiv:2204.02311, section 5).
        part: where the vocabulary is cut over ranks, the part that this rank has.
        fused: whether `of_product` works on a block of tokens at a time, without whole logits.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    part: VocabularyPart | None = None
    fused: bool = False

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, *, training: bool
    ) -> torch.Tensor:
        """Sum in nats over the targets, an fp32 scalar.

        Args:
            logits: (..., V), or V_local of the part, of any floating type.
            labels: (...) ids, -100 where there is no target.
            training: whether the regularisers count; a validation loss is the plain one.
        """
        smoothing, z_loss = (self.label_smoothing, self.z_loss) if training else (0.0, 0.0)
        targets = labels.flatten()
        if self.part is not None:
            return vocab_parallel_cross_entropy(
                logits.flatten(0, -2),
                targets,
                first_id=self.part.first_id,
                group=self.part.group,
                label_smoothing=smoothing,
                z_loss=z_loss,
                vocab_size=self.part.vocab_size,
            )
        flat = widen(logits).flatten(0, -2)
        total = F.cross_entropy(
            flat, targets, ignore_index=IGNORE_LABEL, reduction="sum", label_smoothing=smoothing
        )
        if z_loss:
            log_z = flat.logsumexp(-1)
            total = total + z_loss * log_z.square()[targets != IGNORE_LABEL].sum()
        return total

    def of_product(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        softcap: float | None,
        *,
        labels: torch.Tensor,
        training: bool,
    ) -> torch.Tensor:
        """The same sum from what the logits are made of, see `linear_cross_entropy`.

        Args:
            hidden: (..., D). weight: (V, D) or the part's (V_local, D). bias: (V,), (V_local,).
            softcap: see `LMHead`. labels: (...).
        """
        terms = LossTerms(
            vocab_size=self.part.vocab_size if self.part else len(weight),
            first_id=self.part.first_id if self.part else 0,
            group=self.part.group if self.part else None,
            ignore_index=IGNORE_LABEL,
            label_smoothing=self.label_smoothing if training else 0.0,
            z_loss=self.z_loss if training else 0.0,
            softcap=softcap,
        )
        return linear_cross_entropy(hidden.flatten(0, -2), weight, bias, labels.flatten(), terms)

    def whole(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits (..., V) of the whole vocabulary; collective where it is cut."""
        if self.part is None:
            return logits
        return whole_vocabulary(
            logits,
            first_id=self.part.first_id,
            vocab_size=self.part.vocab_size,
            group=self.part.group,
        )


def token_loss(config: Config) -> TokenLoss:
    """The loss that a run asks for."""
    train = config.train
    return TokenLoss(train.label_smoothing, train.z_loss, fused=config.fuses_loss)
