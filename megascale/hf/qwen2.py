"""Qwen 2 and 2.5: a Llama with biases on queries, keys and values."""

from __future__ import annotations

from megascale.hf.family import Family
from megascale.hf.fields import Always, Field, LayerTypes, Same, table
from megascale.hf.llama import LLAMA_LAYER, LLAMA_ROWS, LLAMA_STYLE, OLD_BUFFERS, sizes

QWEN_STYLE: tuple[Field, ...] = (
    LLAMA_STYLE,
    *sizes(vocab=151936, hidden=4096, ffn=22016, layers=32, heads=32, length=32768),
    Same("num_key_value_heads", "num_kv_heads", 32),
    *LLAMA_LAYER,
    LayerTypes(4096, 32, switch="use_sliding_window", start="max_window_layers"),
)

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=table(
        QWEN_STYLE,
        Always({"qkv_bias": True}),
        Same("head_dim", "head_dim", None),
    ),
    rows=LLAMA_ROWS,
    prefix="model.",
    skipped=OLD_BUFFERS,
)
