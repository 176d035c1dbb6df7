"""GPT: a decoder-only transformer that returns hidden states.

It does not know that it may be distributed. Its layers are keyed by their global index and its
ends may be absent, so that a pipeline chunk is the same module with parts taken out and every
parameter keeps its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from megascale.errors import UserError
from megascale.models.attention import Attention, causal_document_mask
from megascale.models.dropout import CounterDropout
from megascale.models.embedding import Embedding
from megascale.models.mlp import MLP, ActivationName
from megascale.models.norm import NormName, build_norm
from megascale.models.transformer import TransformerLayer

PositionEmbeddingName = Literal["learned", "rope"]

# Dropout sites: 0 is the embedding, layer i owns the _SITES_PER_LAYER numbers from (i + 1) times
# that; the places within a layer follow. Masks depend on these numbers: never renumber them.
_EMBEDDING_SITE = 0
_SITES_PER_LAYER = 8
_PROBABILITIES, _ATTENTION_OUTPUT, _MLP_OUTPUT = range(3)


@dataclass(frozen=True)
class GPTConfig:
    """Shape and numerics of a GPT; every field says what a GPT needs and nothing of its training.

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
    num_kv_heads: int
    """Heads of keys and values; divides H; equal to H for ordinary attention."""
    ffn_hidden_size: int
    """F."""
    seq_length: int
    """T in training; with learned positions the longest sequence."""
    position_embedding: PositionEmbeddingName = "learned"
    norm: NormName = "layernorm"
    norm_eps: float = 1e-5
    activation: ActivationName = "gelu_tanh"
    """gelu is exact (erf), gelu_tanh is GPT-2's approximation."""
    bias: bool = True
    """Biases of all linear layers and of LayerNorm."""
    dropout: float = 0.0
    """After the embedding and at the end of both residual branches."""
    attention_dropout: float = 0.0
    """On the attention probabilities."""
    rope_theta: float = 10000.0
    init_std: float = 0.02
    tie_word_embeddings: bool = True
    """Whether the head (not part of this module) reuses embedding.tokens.weight."""

    @property
    def head_dim(self) -> int:
        """K, the width of one head."""
        return self.hidden_size // self.num_attention_heads

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_choices(self)


def _check_sizes(config: GPTConfig) -> None:
    sizes = (
        "vocab_size",
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_kv_heads",
        "ffn_hidden_size",
        "seq_length",
    )
    for field in sizes:
        if getattr(config, field) < 1:
            raise UserError(
                f"{field}={getattr(config, field)}",
                rule=f"{field} is at least 1",
                remedy=f"give a positive {field}",
            )
    for whole, part in (
        ("hidden_size", "num_attention_heads"),
        ("num_attention_heads", "num_kv_heads"),
    ):
        if getattr(config, whole) % getattr(config, part):
            raise UserError(
                f"{whole}={getattr(config, whole)}, {part}={getattr(config, part)}",
                rule=f"{whole} is a multiple of {part}",
                remedy=f"change {whole} or {part}",
            )
    if config.position_embedding == "rope" and config.head_dim % 2:
        raise UserError(
            f"a head width of {config.head_dim} (hidden_size={config.hidden_size} / "
            f"num_attention_heads={config.num_attention_heads}) with rotary positions",
            rule="rotary positions rotate pairs of features: the head width is even",
            remedy="change hidden_size or num_attention_heads",
        )


def _check_choices(config: GPTConfig) -> None:
    for field, names in (
        ("position_embedding", get_args(PositionEmbeddingName)),
        ("norm", get_args(NormName)),
        ("activation", get_args(ActivationName)),
    ):
        if getattr(config, field) not in names:
            raise UserError(
                f"{field}={getattr(config, field)!r}",
                rule=f"{field} is one of {', '.join(names)}",
                remedy=f"choose one of these for {field}",
            )
    for field in ("dropout", "attention_dropout"):
        if not 0 <= getattr(config, field) < 1:
            raise UserError(
                f"{field}={getattr(config, field)}",
                rule=f"{field} is a probability in [0, 1)",
                remedy="0 turns it off",
            )
    for field in ("norm_eps", "rope_theta", "init_std"):
        if not getattr(config, field) > 0:
            raise UserError(
                f"{field}={getattr(config, field)}",
                rule=f"{field} is positive",
                remedy=f"give a positive {field}",
            )


def build_embedding(config: GPTConfig) -> Embedding:
    """The first part of the model, parameters ``embedding.*``."""
    return Embedding(
        config.vocab_size,
        config.hidden_size,
        config.seq_length if config.position_embedding == "learned" else None,
        dropout=config.dropout,
        dropout_site=_EMBEDDING_SITE,
    )


def build_layer(config: GPTConfig, index: int) -> TransformerLayer:
    """The layer with global index ``index``, parameters ``layers.<index>.*``."""
    site = (index + 1) * _SITES_PER_LAYER

    def norm() -> nn.Module:
        return build_norm(config.norm, config.hidden_size, config.norm_eps, config.bias)

    attention = Attention(
        config.hidden_size,
        config.num_attention_heads,
        config.num_kv_heads,
        config.head_dim,
        bias=config.bias,
        rope_theta=config.rope_theta if config.position_embedding == "rope" else None,
        dropout=config.attention_dropout,
        dropout_site=site + _PROBABILITIES,
    )
    return TransformerLayer(
        attention_norm=norm(),
        attention=attention,
        attention_dropout=CounterDropout(config.dropout, site + _ATTENTION_OUTPUT),
        mlp_norm=norm(),
        mlp=MLP(config.hidden_size, config.ffn_hidden_size, config.activation, config.bias),
        mlp_dropout=CounterDropout(config.dropout, site + _MLP_OUTPUT),
    )


class GPT(nn.Module):
    """Embedding, layers and final norm.

    A pipeline chunk is made from a whole GPT (built on the meta device) by deleting entries of
    ``layers`` and setting ``embedding`` or ``final_norm`` to None.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding: Embedding | None = build_embedding(config)
        self.layers = nn.ModuleDict(
            {str(index): build_layer(config, index) for index in range(config.num_layers)}
        )
        self.final_norm: nn.Module | None = build_norm(
            config.norm, config.hidden_size, config.norm_eps, config.bias
        )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids: (B, T) token ids; in a chunk without embedding the hidden states (B, T, D)
                of the chunk before.
            position_ids: (B, T); 0..T-1 by default. To be given when ``input_ids`` is only a slice
                of the sequence.
            document_ids: (B, T), equal within a document: attention stays inside it. None: causal
                over the whole sample. Positions are not reset here.
            dropout_keys: (B,) int64 of ``dropout.sample_keys``; needed in training with dropout.

        Returns:
            (B, T, D); in a chunk without final norm, what the next chunk takes.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]  # (1, T)
        # One mask for all layers: each would keep its own T x T copy for the backward pass.
        mask = None if document_ids is None else causal_document_mask(document_ids)
        hidden = input_ids
        if self.embedding is not None:
            hidden = self.embedding(input_ids, position_ids, dropout_keys)
        for layer in self.layers.values():
            hidden = layer(hidden, position_ids, mask, dropout_keys)
        return hidden if self.final_norm is None else self.final_norm(hidden)
