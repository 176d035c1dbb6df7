"""Llama 2 and 3, SmolLM and all that transformers calls llama; rows that other families share."""

from __future__ import annotations

from megascale.hf.family import Family, Row
from megascale.hf.fields import Always, Field, Same, table
from megascale.hf.rope import Rope

GATED = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu_tanh", "gelu": "geglu"}

OLD_BUFFERS = ("*.rotary_emb.inv_freq",)


def sizes(
    *, vocab: int, hidden: int, ffn: int, layers: int, heads: int, length: int
) -> list[Field]:
    """Rows of the sizes that every family after GPT-2 spells alike, with its defaults."""
    return [
        Same("vocab_size", "vocab_size", vocab),
        Same("hidden_size", "hidden_size", hidden),
        Same("intermediate_size", "ffn_hidden_size", ffn),
        Same("num_hidden_layers", "num_layers", layers),
        Same("num_attention_heads", "num_attention_heads", heads),
        Same("max_position_embeddings", "seq_length", length),
        Same("initializer_range", "init_std", 0.02),
        Same("attention_dropout", "attention_dropout", 0.0),
    ]


LLAMA_STYLE = Always(
    {"family": "gpt", "norm": "rmsnorm", "position_embedding": "rope", "bias": False}
)

LLAMA_LAYER = (
    Same("hidden_act", "activation", "silu", GATED),
    Same("rms_norm_eps", "norm_eps", 1e-6),
    Same("tie_word_embeddings", "tie_word_embeddings", False),
    Rope(),
)

ATTENTION_BIAS = Same("attention_bias", ("qkv_bias", "attention_output_bias"), False)

OUTSIDE_LAYERS = (
    Row("model.embed_tokens.weight", "model.embedding.tokens.weight"),
    Row("lm_head.weight", "head.weight"),
)
ATTENTION = (
    Row(
        "model.layers.{layer}.self_attn.q_proj.{kind}",
        "model.layers.{layer}.attention.query.{kind}",
    ),
    Row(
        "model.layers.{layer}.self_attn.k_proj.{kind}", "model.layers.{layer}.attention.key.{kind}"
    ),
    Row(
        "model.layers.{layer}.self_attn.v_proj.{kind}",
        "model.layers.{layer}.attention.value.{kind}",
    ),
    Row(
        "model.layers.{layer}.self_attn.o_proj.{kind}",
        "model.layers.{layer}.attention.output.{kind}",
    ),
)
GATED_MLP = (
    Row("model.layers.{layer}.mlp.gate_proj.{kind}", "model.layers.{layer}.mlp.gate.{kind}"),
    Row("model.layers.{layer}.mlp.up_proj.{kind}", "model.layers.{layer}.mlp.up.{kind}"),
    Row("model.layers.{layer}.mlp.down_proj.{kind}", "model.layers.{layer}.mlp.down.{kind}"),
)
NORMS = (
    Row(
        "model.layers.{layer}.input_layernorm.weight", "model.layers.{layer}.attention_norm.weight"
    ),
    Row(
        "model.layers.{layer}.post_attention_layernorm.weight",
        "model.layers.{layer}.mlp_norm.weight",
    ),
    Row("model.norm.weight", "model.final_norm.weight"),
)

LLAMA_ROWS = (*OUTSIDE_LAYERS, *ATTENTION, *GATED_MLP, *NORMS)


def head_norms(parameter: str) -> tuple[Row, ...]:
    """Rows of the norms of query and key heads, whose parameter is called weight or offset."""
    return tuple(
        Row(
            f"model.layers.{{layer}}.self_attn.{theirs}_norm.weight",
            f"model.layers.{{layer}}.attention.{ours}_norm.{parameter}",
        )
        for theirs, ours in (("q", "query"), ("k", "key"))
    )


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fields=table(
        LLAMA_STYLE,
        sizes(vocab=32000, hidden=4096, ffn=11008, layers=32, heads=32, length=2048),
        Same("num_key_value_heads", "num_kv_heads", None),
        Same("head_dim", "head_dim", None),
        LLAMA_LAYER,
        ATTENTION_BIAS,
        Same("mlp_bias", "mlp_bias", False),
    ),
    rows=LLAMA_ROWS,
    prefix="model.",
    without_effect=("pretraining_tp",),
    skipped=OLD_BUFFERS,
)
