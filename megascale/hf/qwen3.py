"""Qwen 3: a Llama with normalised heads of queries and keys."""

from __future__ import annotations

from megascale.hf.family import Family
from megascale.hf.fields import Always, Same, table
from megascale.hf.llama import ATTENTION_BIAS, LLAMA_ROWS, OLD_BUFFERS, head_norms
from megascale.hf.qwen2 import QWEN_STYLE

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=table(
        QWEN_STYLE,
        Always({"qk_norm": True}),
        Same("head_dim", "head_dim", 128),
        ATTENTION_BIAS,
    ),
    rows=(*LLAMA_ROWS, *head_norms("weight")),
    prefix="model.",
    skipped=OLD_BUFFERS,
)
