"""Losses over whole logits; those over a cut vocabulary are in `parallel.cross_entropy`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megascale.data.protocol import IGNORE_LABEL


def whole_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies of (N, V) logits, in fp32 nats; labels of -100 do not count."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_LABEL, reduction="sum")
