"""Mistral: a Llama whose layers may all see a window only."""

from __future__ import annotations

from megascale.hf.family import Family
from megascale.hf.fields import Same, table
from megascale.hf.llama import LLAMA_LAYER, LLAMA_ROWS, LLAMA_STYLE, OLD_BUFFERS, sizes

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    fields=table(
        LLAMA_STYLE,
        sizes(vocab=32000, hidden=4096, ffn=14336, layers=32, heads=32, length=131072),
        Same("num_key_value_heads", "num_kv_heads", 8),
        Same("head_dim", "head_dim", None),
        LLAMA_LAYER,
        Same("sliding_window", "sliding_window", 4096),
    ),
    rows=LLAMA_ROWS,
    prefix="model.",
    skipped=OLD_BUFFERS,
)
