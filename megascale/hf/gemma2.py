"""Gemma 2: norms around both branches, soft-caps, and a window in every second layer."""

from __future__ import annotations

from megascale.hf.family import Family, Row
from megascale.hf.fields import Always, Field, LayerTypes, Only, Same, table
from megascale.hf.llama import (
    ATTENTION,
    ATTENTION_BIAS,
    GATED_MLP,
    LLAMA_STYLE,
    OUTSIDE_LAYERS,
    sizes,
)
from megascale.hf.rope import Rope

GEMMA_STYLE: tuple[Field, ...] = (
    LLAMA_STYLE,
    Always({"norm_unit_offset": True, "norm_placement": "sandwich", "scale_embeddings": True}),
    Same("num_key_value_heads", "num_kv_heads", 4),
    Same("head_dim", "head_dim", 256),
    Same(
        "hidden_activation",
        "activation",
        "gelu_pytorch_tanh",
        {"gelu_pytorch_tanh": "geglu_tanh", "gelu": "geglu", "silu": "swiglu"},
    ),
    Same("rms_norm_eps", "norm_eps", 1e-6),
    Same("query_pre_attn_scalar", "query_scaling", 256),
    Same("tie_word_embeddings", "tie_word_embeddings", True),
    ATTENTION_BIAS,
    Only("use_bidirectional_attention", False),
)

GEMMA_NORMS = (
    Row(
        "model.layers.{layer}.input_layernorm.weight", "model.layers.{layer}.attention_norm.offset"
    ),
    Row(
        "model.layers.{layer}.post_attention_layernorm.weight",
        "model.layers.{layer}.attention_post_norm.offset",
    ),
    Row(
        "model.layers.{layer}.pre_feedforward_layernorm.weight",
        "model.layers.{layer}.mlp_norm.offset",
    ),
    Row(
        "model.layers.{layer}.post_feedforward_layernorm.weight",
        "model.layers.{layer}.mlp_post_norm.offset",
    ),
    Row("model.norm.weight", "model.final_norm.offset"),
)

GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    fields=table(
        GEMMA_STYLE,
        sizes(vocab=256000, hidden=2304, ffn=9216, layers=26, heads=8, length=8192),
        Same("attn_logit_softcapping", "attention_softcap", 50.0),
        Same("final_logit_softcapping", "logit_softcap", 30.0),
        LayerTypes(4096, 26, default_interval=2),
        Rope(),
    ),
    rows=(*OUTSIDE_LAYERS, *ATTENTION, *GATED_MLP, *GEMMA_NORMS),
    prefix="model.",
    without_effect=("hidden_act",),
)
