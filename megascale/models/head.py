"""The language-model head: hidden states to logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Reduce = Callable[[Tensor, Tensor, Tensor | None, float | None], Tensor]
"""(hidden (..., D), weight (V, D), bias (V,) or None, softcap or None) -> what is wanted of the
logits that these make, without the logits themselves."""


class LMHead(nn.Module):
    """``logits = hidden @ weight.T``, without bias.

    Args:
        hidden_size: D. vocab_size: V.
        tied: the head owns no weight and is given the token embedding's at each call.
        softcap: bound c of the logits, which become ``c * tanh(logits / c)``; None for none.
    """

    def __init__(
        self, hidden_size: int, vocab_size: int, tied: bool, softcap: float | None = None
    ) -> None:
        super().__init__()
        self.tied, self.softcap = tied, softcap
        if not tied:
            # Named initialization (initialization.py) overwrites this; it is here so that a head
            # used alone is not left with uninitialised memory.
            self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
            nn.init.normal_(self.weight, std=0.02)

    def forward(
        self, hidden: Tensor, tied_weight: Tensor | None = None, reduce: Reduce | None = None
    ) -> Tensor:
        """``hidden`` (B, T, D), ``tied_weight`` (V, D) exactly when tied -> logits (B, T, V), or
        what ``reduce`` makes of them.

        Raises:
            ValueError: a tied head without ``tied_weight``, or an untied one with it.
        """
        if self.tied != (tied_weight is not None):
            raise ValueError(
                f"LMHead(tied={self.tied}) was called with"
                f"{'out' if tied_weight is None else ''} tied_weight; a tied head needs the token "
                "embedding's weight at each call and an untied head takes none"
            )
        weight = self.weight if tied_weight is None else tied_weight
        if reduce is not None:
            return reduce(hidden, weight, None, self.softcap)
        logits = F.linear(hidden, weight)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
