"""BERT (arXiv:1810.04805): a bidirectional encoder that returns hidden states.

As in `gpt.py`: it does not know that it may be distributed, its layers are keyed by their global
index, and parts of it may be absent, so that what a pipeline rank holds is the same module with
parts taken out and every parameter keeps its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from megascale.errors import UserError
from megascale.models.activated_linear import Recompute
from megascale.models.attention import Attention, AttentionKernel, Visibility
from megascale.models.chunk import Chunk
from megascale.models.dropout import CounterDropout
from megascale.models.embedding import Embedding
from megascale.models.mlp import MLP
from megascale.models.norm import build_norm
from megascale.models.transformer import TransformerLayer

BERTActivationName = Literal["gelu", "gelu_tanh"]

# Dropout sites, numbered as in gpt.py; masks depend on these numbers: never renumber them.
_EMBEDDING_SITE = 0
_SITES_PER_LAYER = 8
_PROBABILITIES, _ATTENTION_OUTPUT, _MLP_OUTPUT = range(3)

_SIZES = (
    *("vocab_size", "num_layers", "hidden_size", "num_attention_heads"),
    *("ffn_hidden_size", "seq_length", "num_token_types"),
)


@dataclass(frozen=True)
class BERTConfig:
    """Shape and numerics of a BERT; every field says what it needs and nothing of its training.

    Raises:
        UserError: fields that no model can have.
    """

    vocab_size: int
    """V, rows of the token embedding."""
    num_layers: int
    hidden_size: int
    """D, a multiple of num_attention_heads."""
    num_attention_heads: int
    """H."""
    ffn_hidden_size: int
    """F."""
    seq_length: int
    """T in training, and the longest sequence: rows of the position table."""
    num_token_types: int = 2
    """Rows of the token-type (segment) table."""
    norm_eps: float = 1e-12
    activation: BERTActivationName = "gelu"
    """Of the feed-forward layers and of the masked-LM head; gelu is exact (erf)."""
    dropout: float = 0.0
    """After the embedding's norm and at the end of both residual branches."""
    attention_dropout: float = 0.0
    """On the attention probabilities."""
    attention_kernel: AttentionKernel = "auto"
    """How attention is computed where there is a choice, see CoreAttention."""
    recompute_activation: Recompute = "auto"
    """Whether the backward computes the MLP's activation again, see ActivatedProduct."""
    init_std: float = 0.02

    @property
    def head_dim(self) -> int:
        """K, the width of one head."""
        return self.hidden_size // self.num_attention_heads

    def __post_init__(self) -> None:
        for field in _SIZES:
            if getattr(self, field) < 1:
                raise _refusal(self, field, "is at least 1")
        if self.hidden_size % self.num_attention_heads:
            rule = f"is a multiple of num_attention_heads={self.num_attention_heads}"
            raise _refusal(self, "hidden_size", rule)
        if self.activation not in get_args(BERTActivationName):
            names = " or ".join(get_args(BERTActivationName))
            raise _refusal(self, "activation", f"is {names}")
        for field in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise _refusal(self, field, "is a probability in [0, 1)")
        for field in ("norm_eps", "init_std"):
            if not getattr(self, field) > 0:
                raise _refusal(self, field, "is positive")


def _refusal(config: BERTConfig, field: str, rule: str) -> UserError:
    return UserError(
        f"{field}={getattr(config, field)!r}",
        rule=f"{field} of a BERT {rule}",
        remedy=f"change model.{field}",
    )


class BERTEmbedding(Embedding):
    """``dropout(norm(token + position + token type))``."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__(
            config.vocab_size,
            config.hidden_size,
            config.seq_length,
            dropout=config.dropout,
            dropout_site=_EMBEDDING_SITE,
        )
        self.token_types = nn.Embedding(config.num_token_types, config.hidden_size)
        self.norm = build_norm("layernorm", config.hidden_size, config.norm_eps, bias=True)

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor, keys: Tensor | None
    ) -> Tensor:
        """``input_ids``, ``token_type_ids`` (B, T), ``position_ids`` (B or 1, T), ``keys`` (B,)
        -> (B, T, D).

        Raises:
            UserError: T is larger than the table of positions.
        """
        hidden = self.look_up(input_ids, position_ids) + self.token_types(token_type_ids)
        return self.dropout(self.norm(hidden), keys)


class PostNormLayer(TransformerLayer):
    """``x = norm(x + dropout(attention(x)))``, then ``norm(x + dropout(mlp(x)))``."""

    def forward(
        self,
        hidden: Tensor,
        position_ids: Tensor,
        visibility: Visibility,
        dropout_keys: Tensor | None,
    ) -> Tensor:
        """As `TransformerLayer.forward`."""
        attended = self.attention(hidden, position_ids, visibility, dropout_keys)
        hidden = self.attention_norm(hidden + self.attention_dropout(attended, dropout_keys))
        transformed = self.mlp(hidden)
        return self.mlp_norm(hidden + self.mlp_dropout(transformed, dropout_keys))


def build_layer(config: BERTConfig, index: int) -> PostNormLayer:
    """The layer with global index ``index``, parameters ``layers.<index>.*``."""
    site = (index + 1) * _SITES_PER_LAYER

    def norm() -> nn.Module:
        return build_norm("layernorm", config.hidden_size, config.norm_eps, bias=True)

    attention = Attention(
        config.hidden_size,
        config.num_attention_heads,
        config.num_attention_heads,
        config.head_dim,
        bias=True,
        dropout=config.attention_dropout,
        dropout_site=site + _PROBABILITIES,
        kernel=config.attention_kernel,
    )
    return PostNormLayer(
        attention_norm=norm(),
        attention=attention,
        attention_dropout=CounterDropout(config.dropout, site + _ATTENTION_OUTPUT),
        mlp_norm=norm(),
        mlp=MLP(
            config.hidden_size,
            config.ffn_hidden_size,
            config.activation,
            bias=True,
            recompute=config.recompute_activation,
        ),
        mlp_dropout=CounterDropout(config.dropout, site + _MLP_OUTPUT),
    )


class BERT(nn.Module):
    """Embedding and layers; the heads are in `bert_heads.py`."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding: BERTEmbedding | None = BERTEmbedding(config)
        self.layers = nn.ModuleDict(
            {str(index): build_layer(config, index) for index in range(config.num_layers)}
        )

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        hidden: Tensor | None = None,
        chunk: Chunk | None = None,
    ) -> Tensor:
        """Hidden states after the last layer.

        Args:
            input_ids: (B, T) token ids.
            token_type_ids: (B, T) segment of each token; zeros by default.
            attention_mask: (B, T) of the whole sample, 0 at padding and 1 elsewhere; None: no
                padding.
            position_ids: (B or 1, T); 0..T-1 by default. To be given when ``input_ids`` is only a
                slice of the sequence.
            document_ids: (B, T) of the whole sample, equal within a document: attention stays
                inside it. None: every token sees the whole sample.
            dropout_keys: (B,) int64 of ``dropout.sample_keys``; needed in training with dropout.
            hidden: (B, T, D), what the chunk before returned; None where the first chunk runs.
            chunk: the part to run; None for the whole model.

        Returns:
            (B, T, D). The states at padding are finite and mean nothing.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]  # (1, T)
        visibility = Visibility(causal=False, document_ids=document_ids, real=attention_mask)
        if hidden is None:
            assert self.embedding is not None
            if token_type_ids is None:
                token_type_ids = torch.zeros_like(input_ids)
            hidden = self.embedding(input_ids, position_ids, token_type_ids, dropout_keys)
        for index, layer in self.layers.items():
            if chunk is None or int(index) in chunk:
                hidden = layer(hidden, position_ids, visibility, dropout_keys)
        return hidden
