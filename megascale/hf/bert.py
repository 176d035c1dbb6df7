"""BERT: an encoder with a masked-LM head, with or without the head of a sentence objective."""

from __future__ import annotations

from megascale.hf.family import EMBEDDING, Family, Row, Variant
from megascale.hf.fields import Always, Only, Same, table

BERT = Family(
    model_type="bert",
    architecture="BertForMaskedLM",
    fields=table(
        Always({"family": "bert"}),
        Same("vocab_size", "vocab_size", 30522),
        Same("hidden_size", "hidden_size", 768),
        Same("intermediate_size", "ffn_hidden_size", 3072),
        Same("num_hidden_layers", "num_layers", 12),
        Same("num_attention_heads", "num_attention_heads", 12),
        Same("max_position_embeddings", "seq_length", 512),
        Same("type_vocab_size", "num_token_types", 2),
        Same(
            "hidden_act",
            "activation",
            "gelu",
            {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
        ),
        Same("layer_norm_eps", "norm_eps", 1e-12),
        Same("initializer_range", "init_std", 0.02),
        Same("hidden_dropout_prob", "dropout", 0.1),
        Same("attention_probs_dropout_prob", "attention_dropout", 0.1),
        Only("tie_word_embeddings", True),
        Only("position_embedding_type", "absolute"),
        Only("is_decoder", False),
        Only("add_cross_attention", False),
    ),
    rows=(
        Row("bert.embeddings.word_embeddings.weight", EMBEDDING),
        Row("bert.embeddings.position_embeddings.weight", "model.embedding.positions.weight"),
        Row("bert.embeddings.token_type_embeddings.weight", "model.embedding.token_types.weight"),
        Row("bert.embeddings.LayerNorm.{kind}", "model.embedding.norm.{kind}"),
        *(
            Row(f"bert.encoder.layer.{{layer}}.{theirs}.{{kind}}", f"model.layers.{{layer}}.{ours}")
            for theirs, ours in (
                ("attention.self.query", "attention.query.{kind}"),
                ("attention.self.key", "attention.key.{kind}"),
                ("attention.self.value", "attention.value.{kind}"),
                ("attention.output.dense", "attention.output.{kind}"),
                ("attention.output.LayerNorm", "attention_norm.{kind}"),
                ("intermediate.dense", "mlp.up.{kind}"),
                ("output.dense", "mlp.down.{kind}"),
                ("output.LayerNorm", "mlp_norm.{kind}"),
            )
        ),
        Row("bert.pooler.dense.{kind}", "sentence_head.dense.{kind}"),
        Row("cls.predictions.transform.dense.{kind}", "head.dense.{kind}"),
        Row("cls.predictions.transform.LayerNorm.{kind}", "head.norm.{kind}"),
        Row("cls.predictions.bias", "head.decoder.bias"),
        Row("cls.seq_relationship.{kind}", "sentence_head.classifier.{kind}"),
    ),
    prefix="bert.",
    without_effect=("classifier_dropout", "directionality", "pooler_*"),
    skipped=("*embeddings.position_ids", "*embeddings.token_type_ids"),
    old_ends={".gamma": ".weight", ".beta": ".bias"},
    copies={
        "cls.predictions.decoder.weight": EMBEDDING,
        "cls.predictions.decoder.bias": "head.decoder.bias",
    },
    # An encoder has a pooler but no classifier.
    heads=("head.*", "sentence_head.*", "sentence_head.classifier.*"),
    sentence_head="cls.seq_relationship.weight",
    auto_class="AutoModelForMaskedLM",
    variants=(
        Variant("sentence_head.classifier.weight", "BertForPreTraining", "AutoModelForPreTraining"),
    ),
    pipeline_tag="fill-mask",
)
