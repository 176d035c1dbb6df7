"""GPT-NeoX and Pythia: both branches read the same input, a part of each head is rotated."""

from __future__ import annotations

from megascale.hf.family import EMBEDDING, Family, Row
from megascale.hf.fields import Always, Dropouts, Same, table
from megascale.hf.layouts import INTERLEAVED_HEADS
from megascale.hf.llama import sizes
from megascale.hf.rope import Rope

GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    fields=table(
        Always({"family": "gpt", "norm": "layernorm", "position_embedding": "rope", "bias": True}),
        sizes(vocab=50432, hidden=6144, ffn=24576, layers=44, heads=64, length=2048),
        Same(
            "hidden_act",
            "activation",
            "gelu",
            {
                "gelu": "gelu",
                "gelu_new": "gelu_tanh",
                "gelu_fast": "gelu_tanh",
                "gelu_pytorch_tanh": "gelu_tanh",
            },
        ),
        Same("layer_norm_eps", "norm_eps", 1e-5),
        Dropouts(("hidden_dropout",), 0.0),
        Same("tie_word_embeddings", "tie_word_embeddings", False),
        Same("use_parallel_residual", "parallel_residual", True),
        Same("attention_bias", ("qkv_bias", "attention_output_bias"), True),
        Rope(theta="rotary_emb_base", fraction="rotary_pct", default_fraction=0.25),
    ),
    rows=(
        Row("gpt_neox.embed_in.weight", "model.embedding.tokens.weight"),
        Row(
            "gpt_neox.layers.{layer}.input_layernorm.{kind}",
            "model.layers.{layer}.attention_norm.{kind}",
        ),
        Row(
            "gpt_neox.layers.{layer}.attention.query_key_value.{kind}",
            (
                "model.layers.{layer}.attention.query.{kind}",
                "model.layers.{layer}.attention.key.{kind}",
                "model.layers.{layer}.attention.value.{kind}",
            ),
            INTERLEAVED_HEADS,
        ),
        Row(
            "gpt_neox.layers.{layer}.attention.dense.{kind}",
            "model.layers.{layer}.attention.output.{kind}",
        ),
        Row(
            "gpt_neox.layers.{layer}.post_attention_layernorm.{kind}",
            "model.layers.{layer}.mlp_norm.{kind}",
        ),
        Row(
            "gpt_neox.layers.{layer}.mlp.dense_h_to_4h.{kind}", "model.layers.{layer}.mlp.up.{kind}"
        ),
        Row(
            "gpt_neox.layers.{layer}.mlp.dense_4h_to_h.{kind}",
            "model.layers.{layer}.mlp.down.{kind}",
        ),
        Row("gpt_neox.final_layer_norm.{kind}", "model.final_norm.{kind}"),
        Row("embed_out.weight", "head.weight"),
    ),
    prefix="gpt_neox.",
    without_effect=("classifier_dropout",),
    skipped=("*.attention.bias", "*.attention.masked_bias", "*.attention.rotary_emb.inv_freq"),
    aliases={"lm_head.weight": "embed_out.weight"},
    copies={"embed_out.weight": EMBEDDING},
)
