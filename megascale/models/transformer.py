"""The pre-norm transformer layer."""

from __future__ import annotations

from torch import Tensor, nn

from megascale.models.attention import Attention
from megascale.models.dropout import CounterDropout
from megascale.models.mlp import MLP


class TransformerLayer(nn.Module):
    """``x + dropout(attention(norm(x)))``, then ``x + dropout(mlp(norm(x)))``.

    The parts are handed in: what they are made of is the model family's matter.
    """

    def __init__(
        self,
        *,
        attention_norm: nn.Module,
        attention: Attention,
        attention_dropout: CounterDropout,
        mlp_norm: nn.Module,
        mlp: MLP,
        mlp_dropout: CounterDropout,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.attention_dropout = attention_dropout
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.mlp_dropout = mlp_dropout

    def forward(
        self,
        hidden: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        dropout_keys: Tensor | None,
    ) -> Tensor:
        """``hidden`` (B, T, D), ``position_ids`` (B or 1, T), ``attention_mask`` (B, 1, T, T) bool
        or None for causal, ``dropout_keys`` (B,) -> (B, T, D).
        """
        attended = self.attention(
            self.attention_norm(hidden), position_ids, attention_mask, dropout_keys
        )
        hidden = hidden + self.attention_dropout(attended, dropout_keys)
        transformed = self.mlp(self.mlp_norm(hidden))
        return hidden + self.mlp_dropout(transformed, dropout_keys)
