"""Mistral: a Llama whose layers may all see a window only."""

from __future__ import annotations

from megascale.hf.family import Family
from megascale.hf.fields import Same, table
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

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    fields=table(
        LLAMA_STYLE,
        sizes(vocab=32000, hidden=4096, ffn=14336, layers=32, heads=32, length=131072),
        Same("num_key_value_heads", "num_kv_heads", 8),
        Same("head_dim", "head_dim", None),
        Same("hidden_act", "activation", "silu", GATED),
        Same("rms_norm_eps", "norm_eps", 1e-6),
        Same("tie_word_embeddings", "tie_word_embeddings", False),
        Same("sliding_window", "sliding_window", 4096),
        Rope(),
    ),
    rows=(*OUTSIDE_LAYERS, *ATTENTION, *GATED_MLP, *NORMS),
    prefix="model.",
    skipped=OLD_BUFFERS,
)
