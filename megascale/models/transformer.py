"""The transformer layer with norms before, or before and after, each of its two parts."""

from __future__ import annotations

from torch import Tensor, nn

from megascale.models.attention import Attention, Visibility
from megascale.models.dropout import CounterDropout
from megascale.models.mlp import MLP


class TransformerLayer(nn.Module):
    """``x + dropout(attention(norm(x)))``, then ``x + dropout(mlp(norm(x)))``.

    The parts are handed in: what they are made of is the model family's matter.

    Args:
        attention_post_norm, mlp_post_norm: norms of what a branch adds; None for none.
        parallel_residual: both branches read x, and x gets the sum of both (arXiv:2204.06745).
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
        attention_post_norm: nn.Module | None = None,
        mlp_post_norm: nn.Module | None = None,
        parallel_residual: bool = False,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.attention_dropout = attention_dropout
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.mlp_dropout = mlp_dropout
        self.attention_post_norm = attention_post_norm
        self.mlp_post_norm = mlp_post_norm
        self.parallel_residual = parallel_residual

    def forward(
        self,
        hidden: Tensor,
        position_ids: Tensor,
        visibility: Visibility,
        dropout_keys: Tensor | None,
    ) -> Tensor:
        """``hidden`` (B, T, D), ``position_ids`` (B or 1, T), ``dropout_keys`` (B,)
        -> (B, T, D).
        """
        attended = self.attention(
            self.attention_norm(hidden), position_ids, visibility, dropout_keys
        )
        if self.attention_post_norm is not None:
            attended = self.attention_post_norm(attended)
        between = hidden + self.attention_dropout(attended, dropout_keys)
        transformed = self.mlp(self.mlp_norm(hidden if self.parallel_residual else between))
        if self.mlp_post_norm is not None:
            transformed = self.mlp_post_norm(transformed)
        return between + self.mlp_dropout(transformed, dropout_keys)
