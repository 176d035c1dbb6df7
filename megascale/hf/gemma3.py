"""Gemma 3, its text model: normalised heads, and windowed layers with a rotation of their own."""

from __future__ import annotations

from megascale.hf.family import Family
from megascale.hf.fields import Always, LayerTypes, Only, Same, table
from megascale.hf.gemma2 import GEMMA_NORMS, GEMMA_STYLE
from megascale.hf.llama import ATTENTION, GATED_MLP, OUTSIDE_LAYERS, head_norms, sizes
from megascale.hf.rope import RopeByLayerType

GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    fields=table(
        GEMMA_STYLE,
        Always({"qk_norm": True}),
        sizes(vocab=262208, hidden=2304, ffn=9216, layers=26, heads=8, length=131072),
        Only("attn_logit_softcapping", None),
        Same("final_logit_softcapping", "logit_softcap", None),
        LayerTypes(4096, 26, default_interval=6, pattern="sliding_window_pattern"),
        RopeByLayerType(),
    ),
    rows=(
        *OUTSIDE_LAYERS,
        *ATTENTION,
        *head_norms("offset"),
        *GATED_MLP,
        *GEMMA_NORMS,
    ),
    prefix="model.",
    without_effect=("hidden_act",),
)
