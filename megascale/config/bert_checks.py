"""Rules of the BERT family: what its fixed architecture has no choice of, and what only it has."""

from __future__ import annotations

from collections.abc import Iterator

from megascale.config.problems import Problem, show_value
from megascale.config.rules import Check, among, ignored
from megascale.config.schema import Config, leaf_fields, read_path

_GATED = ("swiglu", "geglu", "geglu_tanh")


def _only_gpt(path: str) -> Check:
    """A setting that a BERT, whose architecture is fixed, does not have."""
    default = dict(leaf_fields())[path].default

    def run(config: Config, world_size: int | None) -> Iterator[Problem]:
        value = read_path(config, path)
        if value != default and config.model.family == "bert":
            rule = f"a bert has {show_value(default)} here; {path} is a choice of gpt only"
            yield Problem(path, value, rule, "leave it out, or model.family = gpt")

    run.__name__ = f"only_gpt:{path}"
    return Check((path, "model.family"), run)


def bert_has_no_gate(config: Config, world_size: int | None) -> Iterator[Problem]:
    """The feed-forward layer of a BERT has two matrices."""
    if config.model.family == "bert" and config.model.activation in _GATED:
        rule = "a bert has a plain feed-forward layer"
        yield Problem(
            "model.activation",
            config.model.activation,
            rule,
            "model.activation = gelu or gelu_tanh",
        )


def pairs_need_token_types(config: Config, world_size: int | None) -> Iterator[Problem]:
    """The second segment of a pair has a token type of its own."""
    objective, types = config.data.sentence_objective, config.model.num_token_types
    if config.model.family == "bert" and objective != "none" and types < 2:
        rule = f"data.sentence_objective = {objective} makes samples of two segments"
        yield Problem("model.num_token_types", types, rule, "model.num_token_types = 2")


BERT_CHECKS: tuple[Check, ...] = (
    *(
        ignored(path, "model.family", among("bert"), "the model is a bert")
        for path in (
            "model.num_token_types",
            "data.masking",
            "data.mask_probability",
            "data.sentence_objective",
        )
    ),
    *(
        _only_gpt(path)
        for path in (
            "model.num_kv_heads",
            "model.position_embedding",
            "model.norm",
            "model.bias",
            "model.tie_word_embeddings",
            "model.head_dim",
            "model.norm_placement",
            "model.parallel_residual",
            "model.qkv_bias",
            "model.attention_output_bias",
            "model.mlp_bias",
            "model.qk_norm",
            "model.query_scaling",
            "model.attention_softcap",
            "model.logit_softcap",
            "model.sliding_window",
            "model.scale_embeddings",
            "data.isolate_documents",
            "data.packing",
            "data.fim_rate",
        )
    ),
    Check(("model.family", "model.activation"), bert_has_no_gate),
    Check(
        ("model.family", "model.num_token_types", "data.sentence_objective"),
        pairs_need_token_types,
    ),
)
