"""The section `model` of the settings; see schema.py."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megascale.config.fields import MAX_COUNT, Count, Fraction, Positive, Rate, Section


class ModelConfig(Section):
    """The shape of the model."""

    family: Literal["gpt", "bert"] = "gpt"
    """Kind of model: gpt predicts the next token, bert masked tokens."""
    num_layers: Count = 12
    """Number of transformer layers."""
    hidden_size: Count = 768
    """Width of the hidden states, in features."""
    num_attention_heads: Count = 12
    """Number of query heads of an attention layer; must divide hidden_size unless head_dim is
    given."""
    head_dim: Count | None = None
    """Width of one attention head, in features; null: hidden_size / num_attention_heads."""
    num_kv_heads: Count | None = None
    """Number of key and value heads; null: num_attention_heads. Must divide it."""
    ffn_hidden_size: Count | None = None
    """Inner width of the feed-forward layer, in features; null: 4 * hidden_size, or with a gate
    (swiglu, geglu) 8/3 * hidden_size rounded up to a multiple of 64."""
    seq_length: Count = 1024
    """Length of a sample, in tokens."""
    vocab_size: Count | None = None
    """Number of token ids that the model knows; null: that of the dataset's tokenizer."""
    position_embedding: Literal["learned", "rope"] = "learned"
    """How positions enter: a learned table, or rotary embedding of queries and keys."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Kind of normalisation before each sub-layer and after the last layer."""
    norm_eps: Positive = 1e-5
    """Added to the (mean-square or) variance under the square root of the norm."""
    norm_placement: Literal["pre", "sandwich"] = "pre"
    """Where norms stand: before each sub-layer, or before and after it (Gemma 2)."""
    norm_unit_offset: bool = False
    """Whether rmsnorm multiplies by 1 + weight, with a weight that starts at 0 (Gemma)."""
    parallel_residual: bool = False
    """Whether attention and feed-forward layer read the same input and are added together
    (GPT-NeoX), instead of one after the other."""
    activation: Literal["gelu", "gelu_tanh", "swiglu", "geglu", "geglu_tanh"] = "gelu_tanh"
    """Non-linearity of the feed-forward layer; gelu_tanh is GPT-2's approximation of gelu; swiglu
    and geglu multiply it with a gate."""
    bias: bool = True
    """Whether LayerNorm and linear layers have biases, where the next three do not tell."""
    qkv_bias: bool | None = None
    """Whether the query, key and value projections have biases; null: bias."""
    attention_output_bias: bool | None = None
    """Whether the output projection of attention has a bias; null: bias."""
    mlp_bias: bool | None = None
    """Whether the feed-forward layer has biases; null: bias."""
    qk_norm: bool = False
    """Whether each head of queries and keys is normalised before it is rotated (Qwen 3)."""
    query_scaling: Positive | None = None
    """Attention scores are divided by the square root of this; null: the head width."""
    attention_softcap: Positive | None = None
    """Bound c of the attention scores: they become c * tanh(score / c); null: none (Gemma 2)."""
    logit_softcap: Positive | None = None
    """The same bound for the logits of the output head; null: none."""
    sliding_window: Count | None = None
    """Newest tokens, itself among them, that a token of a windowed layer sees; null: all."""
    global_layer_interval: Annotated[int, Field(ge=2, le=MAX_COUNT)] | None = None
    """Every n-th layer sees all tokens, the others the window; null: all layers are windowed."""
    scale_embeddings: bool = False
    """Whether token embeddings are multiplied by sqrt(hidden_size) (Gemma)."""
    tie_word_embeddings: bool = True
    """Whether the output head shares the weight of the token embedding."""
    dropout: Rate = 0.0
    """Probability of dropping a feature of embeddings and sub-layer outputs in training."""
    attention_dropout: Rate | None = None
    """Probability of dropping an attention weight in training; null: dropout."""
    rope_theta: Annotated[float, Field(gt=1)] = 10000.0
    """Base of the rotary wavelengths, in positions (rope only)."""
    rope_local_theta: Annotated[float, Field(gt=1)] | None = None
    """Base of the rotary wavelengths of windowed layers, which are then not scaled either (Gemma
    3); null: windowed layers rotate as all others."""
    rotary_fraction: Fraction = 1.0
    """Part of a head's features that is rotated, from the first one on (GPT-NeoX: 0.25)."""
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    """How rotary wavelengths are stretched for longer texts: all of them (linear), or only those
    that are long beside rope_original_length (llama3)."""
    rope_scaling_factor: Annotated[float, Field(ge=1)] = 1.0
    """By how much rope_scaling stretches wavelengths."""
    rope_low_freq_factor: Positive = 1.0
    """llama3: wavelengths above rope_original_length / this are stretched in full."""
    rope_high_freq_factor: Positive = 4.0
    """llama3: wavelengths below rope_original_length / this are left as they are."""
    rope_original_length: Count = 8192
    """llama3: length of the samples before stretching, in tokens."""
    num_token_types: Count = 2
    """Number of token types, rows of the segment embedding (bert only)."""
    init_std: Positive = 0.02
    """Standard deviation of the normal distribution of initial weights."""

    @property
    def head_width(self) -> int:
        """K, the width of one attention head, in features."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_width(self) -> int:
        """Features of a head that rotary positions turn."""
        return int(self.head_width * self.rotary_fraction)

    @property
    def resolved_num_kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads or self.num_attention_heads

    @property
    def resolved_ffn_hidden_size(self) -> int:
        """F, the inner width of the feed-forward layer, in features."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.activation in ("swiglu", "geglu", "geglu_tanh"):
            # Three matrices of 8/3 D hold as many weights as two of 4 D (arXiv:2002.05202).
            return -(-8 * self.hidden_size // (3 * 64)) * 64
        return 4 * self.hidden_size

    @property
    def resolved_attention_dropout(self) -> float:
        """Probability of dropping an attention weight in training."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout
