"""Token and learned position embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megascale.errors import UserError
from megascale.models.dropout import CounterDropout
from megascale.models.gradient_sink import sink_of


class TokenEmbedding(nn.Embedding):
    """nn.Embedding that adds its gradient to the weight's sink, where there is one."""

    def forward(self, input: Tensor) -> Tensor:
        """Ids (B, T) -> (B, T, D)."""
        if torch.is_grad_enabled() and sink_of(self.weight) is not None:
            return _Rows.apply(self.weight, input)
        return super().forward(input)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.sink = sink_of(weight)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        (ids,) = ctx.saved_tensors
        total = ctx.sink.numbers()
        total.index_add_(0, ids.flatten(), grad.flatten(0, -2).to(total.dtype))
        return None, None


class Embedding(nn.Module):
    """Sum of the token embedding and, when positions are learned, the position embedding.

    Args:
        vocab_size: V. hidden_size: D.
        num_positions: rows of the position table; None when positions are not learned.
        dropout: probability for the sum. dropout_site: see CounterDropout.
        scale: factor of the token embeddings; None for none.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_positions: int | None,
        *,
        dropout: float,
        dropout_site: int,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.tokens = TokenEmbedding(vocab_size, hidden_size)
        self.positions: nn.Embedding | None = None
        if num_positions is not None:
            self.positions = nn.Embedding(num_positions, hidden_size)
        self.dropout = CounterDropout(dropout, dropout_site)

    def forward(self, input_ids: Tensor, position_ids: Tensor, keys: Tensor | None) -> Tensor:
        """``input_ids`` (B, T), ``position_ids`` (B or 1, T), ``keys`` (B,) -> (B, T, D).

        Raises:
            UserError: T is larger than the table of learned positions.
        """
        return self.dropout(self.look_up(input_ids, position_ids), keys)

    def look_up(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """The sum of the tables' rows, before dropout; see `forward`."""
        hidden = self.tokens(input_ids)
        if self.scale is not None:
            # rounded to the weights' type first: the models that have a scale were trained so
            hidden = hidden * torch.tensor(self.scale, dtype=hidden.dtype)
        if self.positions is not None:
            length, limit = input_ids.shape[1], self.positions.num_embeddings
            if length > limit:
                raise UserError(
                    f"a sequence of {length} tokens for a model of seq_length={limit}",
                    rule="learned positions exist only up to seq_length",
                    remedy=f"cut the sequence to {limit} tokens, or train with a larger "
                    "model.seq_length or with model.position_embedding=rope",
                )
            hidden = hidden + self.positions(position_ids)
        return hidden
