"""Qwen 3: a Llama with normalised heads of queries and keys."""

from __future__ import annotations

from megascale.hf.family import Family, Row
from megascale.hf.fields import Always, LayerTypes, Same, table
from megascale.hf.llama import (
    ATTENTION,
    ATTENTION_BIAS,
    GATED,
    GATED_MLP,
    LLAMA_STYLE,
    NORMS,
    OLD_BUFFERS,
    OUTSIDE_LAYERS,
    sizes,
)
from megascale.hf.rope import Rope

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=table(
        LLAMA_STYLE,
        Always({"qk_norm": True}),
        sizes(vocab=151936, hidden=4096, ffn=22016, layers=32, heads=32, length=32768),
        Same("num_key_value_heads", "num_kv_heads", 32),
        Same("head_dim", "head_dim", 128),
        Same("hidden_act", "activation", "silu", GATED),
        Same("rms_norm_eps", "norm_eps", 1e-6),
        Same("tie_word_embeddings", "tie_word_embeddings", False),
        ATTENTION_BIAS,
        LayerTypes(4096, 32, switch="use_sliding_window", start="max_window_layers"),
        Rope(),
    ),
    rows=(
        *OUTSIDE_LAYERS,
        *ATTENTION,
        Row(
            "model.layers.{layer}.self_attn.q_norm.weight",
            "model.layers.{layer}.attention.query_norm.weight",
        ),
        Row(
            "model.layers.{layer}.self_attn.k_norm.weight",
            "model.layers.{layer}.attention.key_norm.weight",
        ),
        *GATED_MLP,
        *NORMS,
    ),
    prefix="model.",
    skipped=OLD_BUFFERS,
)
