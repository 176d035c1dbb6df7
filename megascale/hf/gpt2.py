"""GPT-2: fused queries, keys and values, and matrices stored as (in, out) (Conv1D)."""

from __future__ import annotations

from megascale.hf.family import Family, Row
from megascale.hf.fields import Always, Dropouts, Only, Same, table
from megascale.hf.layouts import JOINED_TRANSPOSED, TRANSPOSED

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    fields=table(
        Always({"family": "gpt", "position_embedding": "learned", "norm": "layernorm"}),
        Always({"bias": True}),
        Same("vocab_size", "vocab_size", 50257),
        Same("n_positions", "seq_length", 1024),
        Same("n_embd", "hidden_size", 768),
        Same("n_layer", "num_layers", 12),
        Same("n_head", "num_attention_heads", 12),
        Same("n_inner", "ffn_hidden_size", None),
        Same(
            "activation_function",
            "activation",
            "gelu_new",
            {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"},
        ),
        Same("layer_norm_epsilon", "norm_eps", 1e-5),
        Same("initializer_range", "init_std", 0.02),
        Dropouts(("resid_pdrop", "embd_pdrop"), 0.1),
        Same("attn_pdrop", "attention_dropout", 0.1),
        Same("tie_word_embeddings", "tie_word_embeddings", True),
        Only("scale_attn_weights", True),
        Only("scale_attn_by_inverse_layer_idx", False),
        Only("add_cross_attention", False),
    ),
    rows=(
        Row("transformer.wte.weight", "model.embedding.tokens.weight"),
        Row("transformer.wpe.weight", "model.embedding.positions.weight"),
        Row("transformer.h.{layer}.ln_1.{kind}", "model.layers.{layer}.attention_norm.{kind}"),
        Row(
            "transformer.h.{layer}.attn.c_attn.{kind}",
            (
                "model.layers.{layer}.attention.query.{kind}",
                "model.layers.{layer}.attention.key.{kind}",
                "model.layers.{layer}.attention.value.{kind}",
            ),
            JOINED_TRANSPOSED,
        ),
        Row(
            "transformer.h.{layer}.attn.c_proj.{kind}",
            "model.layers.{layer}.attention.output.{kind}",
            TRANSPOSED,
        ),
        Row("transformer.h.{layer}.ln_2.{kind}", "model.layers.{layer}.mlp_norm.{kind}"),
        Row(
            "transformer.h.{layer}.mlp.c_fc.{kind}",
            "model.layers.{layer}.mlp.up.{kind}",
            TRANSPOSED,
        ),
        Row(
            "transformer.h.{layer}.mlp.c_proj.{kind}",
            "model.layers.{layer}.mlp.down.{kind}",
            TRANSPOSED,
        ),
        Row("transformer.ln_f.{kind}", "model.final_norm.{kind}"),
        Row("lm_head.weight", "head.weight"),
    ),
    prefix="transformer.",
    without_effect=("n_ctx", "summary_*", "reorder_and_upcast_attn"),
    skipped=("*h.*.attn.bias", "*h.*.attn.masked_bias"),
)
