"""Token and learned position embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megascale.errors import UserError
from megascale.models.dropout import CounterDropout


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
        self.tokens = nn.Embedding(vocab_size, hidden_size)
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
