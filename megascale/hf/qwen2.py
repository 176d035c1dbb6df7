"""Qwen 2 and 2.5: a Llama with biases on queries, keys and values."""

from __future__ import annotations

from megascale.hf.family import Family
from megascale.hf.fields import Always, LayerTypes, Same, table
from megascale.hf.llama import (
    ATTENTION,
    GATED,
    GATED_MLP,
    LLAMA_STYLE,
    NORMS,
    OLD_BUFFERS,
    OUTSIDE_LAYERS,
    sizes,
)
from megascale.hf.rope import Rope

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=table(
        LLAMA_STYLE,
        Always({"qkv_bias": True}),
        sizes(vocab=151936, hidden=4096, ffn=22016, layers=32, heads=32, length=32768),
        Same("num_key_value_heads", "num_kv_heads", 32),
        Same("head_dim", "head_dim", None),
        Same("hidden_act", "activation", "silu", GATED),
        Same("rms_norm_eps", "norm_eps", 1e-6),
        Same("tie_word_embeddings", "tie_word_embeddings", False),
        LayerTypes(4096, 32, switch="use_sliding_window", start="max_window_layers"),
        Rope(),
    ),
    rows=(*OUTSIDE_LAYERS, *ATTENTION, *GATED_MLP, *NORMS),
    prefix="model.",
    skipped=OLD_BUFFERS,
)
