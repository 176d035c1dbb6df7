"""GPT: a decoder-only transformer that returns hidden states.

It does not know that it may be distributed. Its layers are keyed by their global index and parts
of it may be absent, so that what a pipeline rank holds is the same module with parts taken out and
every parameter keeps its name; `forward` runs the chunk that it is asked for.
"""

from __future__ import annotations

import math
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
from megascale.models.mlp import MLP, ActivationName
from megascale.models.norm import NormName, build_norm
from megascale.models.rotary import RopeScalingName, Rotary
from megascale.models.transformer import TransformerLayer

PositionEmbeddingName = Literal["learned", "rope"]
NormPlacementName = Literal["pre", "sandwich"]

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
    """D, a multiple of num_attention_heads unless head_width is given."""
    num_attention_heads: int
    """H."""
    num_kv_heads: int
    """Heads of keys and values; divides H; equal to H for ordinary attention."""
    ffn_hidden_size: int
    """F."""
    seq_length: int
    """T in training; with learned positions the longest sequence."""
    head_width: int | None = None
    """K; None: hidden_size / num_attention_heads."""
    position_embedding: PositionEmbeddingName = "learned"
    norm: NormName = "layernorm"
    norm_eps: float = 1e-5
    norm_placement: NormPlacementName = "pre"
    """sandwich: a second norm over what each branch adds to the residual stream (Gemma 2)."""
    norm_unit_offset: bool = False
    """RMSNorm multiplies by 1 + its parameter (Gemma)."""
    parallel_residual: bool = False
    """Attention and MLP read the same input and are added together (GPT-NeoX)."""
    activation: ActivationName = "gelu_tanh"
    """gelu is exact (erf), gelu_tanh is GPT-2's approximation; swiglu and geglu have a gate."""
    bias: bool = True
    """Biases of LayerNorm and, where the next three are None, of the linear layers."""
    qkv_bias: bool | None = None
    attention_output_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool = False
    """Each head of queries and keys is normalised before its rotation (Qwen 3)."""
    query_scaling: float | None = None
    """Attention scores are divided by the root of this; None: of the head width."""
    attention_kernel: AttentionKernel = "auto"
    """How attention is computed where there is a choice, see CoreAttention."""
    recompute_activation: Recompute = "auto"
    """Whether the backward computes the MLP's activation again, see ActivatedProduct."""
    attention_softcap: float | None = None
    """Bound c of the attention scores: c * tanh(score / c)."""
    logit_softcap: float | None = None
    """The same for the logits; the head (not part of this module) applies it."""
    sliding_window: int | None = None
    """Tokens, itself among them, that a token of a windowed layer sees; None: all."""
    global_layer_interval: int | None = None
    """Every n-th layer is not windowed; None: all are."""
    scale_embeddings: bool = False
    """Token embeddings times sqrt(D) (Gemma)."""
    dropout: float = 0.0
    """After the embedding and at the end of both residual branches."""
    attention_dropout: float = 0.0
    """On the attention probabilities."""
    rope_theta: float = 10000.0
    rope_local_theta: float | None = None
    """Base for windowed layers, whose wavelengths are then not scaled (Gemma 3); None: as all."""
    rotary_fraction: float = 1.0
    """Part of a head's features that is rotated."""
    rope_scaling: RopeScalingName = "none"
    """See rotary.Rotary, as for the next four."""
    rope_scaling_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_length: int = 8192
    init_std: float = 0.02
    tie_word_embeddings: bool = True
    """Whether the head (not part of this module) reuses embedding.tokens.weight."""

    @property
    def head_dim(self) -> int:
        """K, the width of one head."""
        return self.head_width or self.hidden_size // self.num_attention_heads

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the query, key and value projections have biases."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def has_attention_output_bias(self) -> bool:
        """Whether the output projection of attention has a bias."""
        return self.bias if self.attention_output_bias is None else self.attention_output_bias

    @property
    def has_mlp_bias(self) -> bool:
        """Whether the MLP has biases."""
        return self.bias if self.mlp_bias is None else self.mlp_bias

    def window(self, layer: int) -> int | None:
        """Tokens that a token of the layer with this global index sees; None: all."""
        interval = self.global_layer_interval
        is_global = interval is not None and (layer + 1) % interval == 0
        return None if is_global else self.sliding_window

    def rotary(self, layer: int) -> Rotary | None:
        """How the layer with this global index rotates queries and keys."""
        if self.position_embedding != "rope":
            return None
        width = int(self.head_dim * self.rotary_fraction)
        if self.rope_local_theta is not None and self.window(layer) is not None:
            return Rotary(self.rope_local_theta, width)
        return Rotary(
            self.rope_theta,
            width,
            self.rope_scaling,
            self.rope_scaling_factor,
            self.rope_low_freq_factor,
            self.rope_high_freq_factor,
            self.rope_original_length,
        )

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
    optional = ("head_width", "sliding_window", "global_layer_interval")
    given = tuple(field for field in optional if getattr(config, field) is not None)
    for field in (*sizes, *given):
        if getattr(config, field) < 1:
            raise UserError(
                f"{field}={getattr(config, field)}",
                rule=f"{field} is at least 1",
                remedy=f"give a positive {field}",
            )
    multiples = [("num_attention_heads", "num_kv_heads")]
    if config.head_width is None:
        multiples.append(("hidden_size", "num_attention_heads"))
    for whole, part in multiples:
        if getattr(config, whole) % getattr(config, part):
            raise UserError(
                f"{whole}={getattr(config, whole)}, {part}={getattr(config, part)}",
                rule=f"{whole} is a multiple of {part}",
                remedy=f"change {whole} or {part}",
            )
    rotary = config.rotary(0)
    if rotary is not None and (rotary.width < 2 or rotary.width % 2):
        raise UserError(
            f"a head width of {config.head_dim} (hidden_size={config.hidden_size} / "
            f"num_attention_heads={config.num_attention_heads}) with rotary positions on "
            f"{config.rotary_fraction} of it",
            rule="rotary positions rotate pairs of features: the rotated width is even",
            remedy="change hidden_size, num_attention_heads or rotary_fraction",
        )


def _check_choices(config: GPTConfig) -> None:
    for field, names in (
        ("position_embedding", get_args(PositionEmbeddingName)),
        ("norm", get_args(NormName)),
        ("activation", get_args(ActivationName)),
        ("norm_placement", get_args(NormPlacementName)),
        ("rope_scaling", get_args(RopeScalingName)),
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
    scales = ("query_scaling", "attention_softcap", "logit_softcap", "rope_local_theta")
    given = [field for field in scales if getattr(config, field) is not None]
    for field in ("norm_eps", "rope_theta", "init_std", "rope_scaling_factor", *given):
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
        scale=math.sqrt(config.hidden_size) if config.scale_embeddings else None,
    )


def _norm(config: GPTConfig, size: int) -> nn.Module:
    return build_norm(config.norm, size, config.norm_eps, config.bias, config.norm_unit_offset)


def _attention(config: GPTConfig, index: int, site: int) -> Attention:
    return Attention(
        config.hidden_size,
        config.num_attention_heads,
        config.num_kv_heads,
        config.head_dim,
        bias=config.has_qkv_bias,
        output_bias=config.has_attention_output_bias,
        rotary=config.rotary(index),
        query_norm=_norm(config, config.head_dim) if config.qk_norm else None,
        key_norm=_norm(config, config.head_dim) if config.qk_norm else None,
        dropout=config.attention_dropout,
        dropout_site=site + _PROBABILITIES,
        softcap=config.attention_softcap,
        query_scaling=config.query_scaling,
        kernel=config.attention_kernel,
    )


def build_layer(config: GPTConfig, index: int) -> TransformerLayer:
    """The layer with global index ``index``, parameters ``layers.<index>.*``."""
    site = (index + 1) * _SITES_PER_LAYER
    size, sandwich = config.hidden_size, config.norm_placement == "sandwich"
    return TransformerLayer(
        attention_norm=_norm(config, size),
        attention=_attention(config, index, site),
        attention_dropout=CounterDropout(config.dropout, site + _ATTENTION_OUTPUT),
        mlp_norm=_norm(config, size),
        mlp=MLP(
            size,
            config.ffn_hidden_size,
            config.activation,
            config.has_mlp_bias,
            config.recompute_activation,
        ),
        mlp_dropout=CounterDropout(config.dropout, site + _MLP_OUTPUT),
        attention_post_norm=_norm(config, size) if sandwich else None,
        mlp_post_norm=_norm(config, size) if sandwich else None,
        parallel_residual=config.parallel_residual,
    )


class GPT(nn.Module):
    """Embedding, layers and final norm.

    A pipeline rank's part is made from a whole GPT (built on the meta device) by deleting entries
    of ``layers`` and setting ``embedding`` or ``final_norm`` to None.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding: Embedding | None = build_embedding(config)
        self.layers = nn.ModuleDict(
            {str(index): build_layer(config, index) for index in range(config.num_layers)}
        )
        self.final_norm: nn.Module | None = _norm(config, config.hidden_size)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        hidden: Tensor | None = None,
        chunk: Chunk | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            input_ids: (B, T) token ids.
            position_ids: (B, T); 0..T-1 by default. To be given when ``input_ids`` is only a slice
                of the sequence.
            document_ids: (B, T) of the whole sample, equal within a document: attention stays
                inside it. None: causal over the whole sample. Positions are not reset here.
            dropout_keys: (B,) int64 of ``dropout.sample_keys``; needed in training with dropout.
            hidden: (B, T, D), what the chunk before returned; None where the first chunk runs.
            chunk: the part to run; None for the whole model.

        Returns:
            (B, T, D); of a chunk that is not the last, what the next one takes.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]  # (1, T)
        # one of each window, which the layers that have it share
        seen = {
            window: Visibility(causal=True, window=window, document_ids=document_ids)
            for window in {self.config.window(int(index)) for index in self.layers}
        }
        if hidden is None:
            assert self.embedding is not None
            hidden = self.embedding(input_ids, position_ids, dropout_keys)
        for index, layer in self.layers.items():
            if chunk is None or int(index) in chunk:
                visibility = seen[self.config.window(int(index))]
                hidden = layer(hidden, position_ids, visibility, dropout_keys)
        if chunk is not None and not chunk.is_last:
            return hidden
        assert self.final_norm is not None
        return self.final_norm(hidden)
