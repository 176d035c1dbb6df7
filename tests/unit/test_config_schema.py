"""The schema itself: every field described and bounded, types strict, derived values right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from megascale.config.schema import (
    Config,
    ModelConfig,
    WeightedPath,
    config_schema,
    leaf_fields,
    read_path,
    section_of,
)

LEAVES = dict(leaf_fields())


def build(**sections: dict[str, Any]) -> Config:
    return Config.model_validate({"data": {"path": "d"}, **sections})


def numbers_in(schema: Any) -> Iterator[dict[str, Any]]:
    """Every subschema of a number."""
    if isinstance(schema, dict):
        if schema.get("type") in ("integer", "number"):
            yield schema
        for value in schema.values():
            yield from numbers_in(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from numbers_in(value)


def test_names_that_users_rely_on_exist() -> None:
    sections = {
        "run": "output_dir seed device",
        "model": "family num_layers hidden_size num_attention_heads num_kv_heads ffn_hidden_size "
        "seq_length vocab_size position_embedding norm activation tie_word_embeddings dropout",
        "data": "path split tokenizer isolate_documents",
        "train": "global_batch_size micro_batch_size max_steps",
        "optimizer": "name lr betas eps weight_decay grad_clip",
        "schedule": "name warmup_steps min_lr",
        "precision": "dtype",
        "parallel": "engine zero_stage tensor_parallel_size sequence_parallel "
        "pipeline_parallel_size virtual_pipeline_stages pipeline_schedule context_parallel_size",
        "checkpoint": "save_interval keep_last",
        "logging": "log_interval",
    }
    wanted = {f"{section}.{name}" for section, names in sections.items() for name in names.split()}
    assert wanted <= set(LEAVES)


def test_every_field_is_described() -> None:
    schema = config_schema()
    for name, model in {**schema["$defs"], "Config": schema}.items():
        assert model["additionalProperties"] is False, name
        assert len(model["description"]) >= 15, name
    fields = {**LEAVES, **Config.model_fields, **WeightedPath.model_fields}
    for path, field in fields.items():
        assert len(field.description or "") >= 15, path


def test_every_number_is_bounded() -> None:
    found = list(numbers_in(config_schema()))
    assert len(found) > 30
    for number in found:
        assert {"minimum", "exclusiveMinimum"} & set(number), number
        if number["type"] == "integer":
            assert "maximum" in number, number


def test_every_leaf_is_frozen_and_every_required_one_has_a_valid_example() -> None:
    config = build()
    for path, field in LEAVES.items():
        section, _, name = path.rpartition(".")
        with pytest.raises(ValidationError, match="frozen"):
            setattr(read_path(config, section), name, read_path(config, path))
        assert section_of(field) is None
    required = [path for path, field in LEAVES.items() if field.is_required()]
    assert required == []
    assert build(data={"path": LEAVES["data.path"].examples[0]})


def bounded_leaves() -> Iterator[tuple[str, float]]:
    """(path, value just outside) for every bound that the JSON schema of a leaf tells."""
    schema = config_schema()
    for path in LEAVES:
        section, name = path.split(".")
        definition = schema["properties"][section]["$ref"].rpartition("/")[2]
        part = schema["$defs"][definition]["properties"][name]
        options = [part, *part.get("anyOf", [])]
        for number in (option for option in options if option.get("type") in ("integer", "number")):
            step = 1 if number["type"] == "integer" else 1e-9
            for key, outside in (
                ("minimum", -step),
                ("maximum", step),
                ("exclusiveMinimum", 0),
                ("exclusiveMaximum", 0),
            ):
                if key in number:
                    yield path, number[key] + outside


@pytest.mark.parametrize(("path", "value"), list(bounded_leaves()))
def test_a_value_outside_a_bound_is_refused(path: str, value: float) -> None:
    section, name = path.split(".")
    given = {"path": "d", name: value} if section == "data" else {name: value}
    with pytest.raises(ValidationError):
        build(**{section: given})


def numeric_leaves(kinds: tuple[type, ...]) -> list[str]:
    return [path for path, field in LEAVES.items() if type(field.default) in kinds]


@pytest.mark.parametrize("path", numeric_leaves((int, float)))
@pytest.mark.parametrize("value", ["5", True, [1], {}, float("nan"), float("inf"), 10**400])
def test_numbers_take_numbers_only(path: str, value: object) -> None:
    section, name = path.split(".")
    with pytest.raises(ValidationError):
        build(**{section: {name: value}})


@pytest.mark.parametrize("path", numeric_leaves((int,)))
def test_integers_take_no_float(path: str) -> None:
    section, name = path.split(".")
    with pytest.raises(ValidationError):
        build(**{section: {name: 2.0}})


def test_floats_take_integers() -> None:
    config = build(optimizer={"grad_clip": 2})
    assert config.optimizer.grad_clip == 2.0
    assert isinstance(config.optimizer.grad_clip, float)


@pytest.mark.parametrize("path", numeric_leaves((bool,)))
@pytest.mark.parametrize("value", [1, 0, "true", None])
def test_booleans_take_booleans_only(path: str, value: object) -> None:
    section, name = path.split(".")
    given = {"path": "d", name: value} if section == "data" else {name: value}
    with pytest.raises(ValidationError):
        build(**{section: given})


@pytest.mark.parametrize("value", [3, True, None, "", "  ", "a\0b", "\ud800"])
def test_text_is_text(value: object) -> None:
    with pytest.raises(ValidationError):
        build(run={"output_dir": value})


@pytest.mark.parametrize(
    "path",
    [
        "",
        3,
        [],
        {},
        ["a"],
        [{"path": "a"}],
        [{"path": "a", "weight": 0}],
        [{"path": "a", "weight": "1"}],
        [{"path": "a", "weight": 1, "share": 2}],
    ],
)
def test_data_path_refuses(path: object) -> None:
    with pytest.raises(ValidationError):
        build(data={"path": path})


def test_data_path_takes_one_path_or_a_blend() -> None:
    (single,) = build().data.resolved_stages
    assert [(p.path, p.weight) for p in single.sources] == [("d", 1.0)]
    blend = [{"path": "a", "weight": 1}, {"path": "b", "weight": 0.25}]
    (mix,) = build(data={"path": blend}).data.resolved_stages
    assert (mix.from_sample, [(p.path, p.weight) for p in mix.sources]) == (
        0,
        [("a", 1.0), ("b", 0.25)],
    )


def _stage(start: int, *names: str) -> dict[str, Any]:
    return {"from_sample": start, "sources": [{"path": name, "weight": 1} for name in names]}


def test_sources_are_listed_once_in_the_order_of_their_first_stage() -> None:
    stages = [_stage(0, "b", "a"), _stage(9, "c", "./a"), _stage(2**40, "b")]
    data = build(data={"stages": stages}).data
    assert data.source_paths == ("b", "a", "c")
    assert build(data={"stages": stages[:1]}).data.source_paths == ("b", "a")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": [{"path": "a", "weight": 1}, {"path": "a/", "weight": 1}]}, "a is named twice"),
        ({"stages": [_stage(0, "a", "b", "./a")]}, "a is named twice"),
        ({"stages": [_stage(1, "a")]}, r"begin at \[1\]"),
        ({"stages": [_stage(0, "a"), _stage(5, "b"), _stage(5, "a")]}, r"begin at \[0, 5, 5\]"),
        ({"stages": [_stage(0, "a"), _stage(-1, "b")]}, "greater than or equal to 0"),
        ({"stages": [_stage(0)]}, "at least 1 item"),
    ],
)
def test_stages_that_are_no_order(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build(data=data)


@pytest.mark.parametrize("split", [[], [0.5, 0.4], [0.4, 0.3, 0.2, 0.1], [1.0, 0.0], [2, -1], 1.0])
def test_split_refuses(split: object) -> None:
    with pytest.raises(ValidationError):
        build(data={"path": "d", "split": split})


@pytest.mark.parametrize("split", [[1], [0.9, 0.1], [0.8, 0.1, 0.1], [0.3333333, 0.6666666]])
def test_split_takes_fractions_of_one(split: list[float]) -> None:
    config = build(data={"path": "d", "split": split})
    assert list(config.data.split) == split
    assert config.data.has_validation == (len(split) > 1)


def test_named_validation_sets() -> None:
    config = build(data={"path": "d", "split": [1.0], "validation": {"books": "b", "code_2": "c"}})
    assert config.data.validation_names == ("books", "code_2")
    assert config.data.has_validation
    assert build(data={"path": "d", "validation": {"x": "b"}}).data.validation_names == (
        "valid",
        "x",
    )


@pytest.mark.parametrize(
    ("validation", "said"),
    [
        ({"valid": "b"}, "part of data.split"),
        ({"test": "b", "x": "y"}, "part of data.split"),
        ({"a/b": "c"}, "pattern"),
        ({"2": "c"}, "pattern"),
        ({"a": ""}, "empty|character"),
        ({"a": 3}, "string"),
        (["a"], "dict"),
    ],
)
def test_named_validation_refuses(validation: object, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        build(data={"path": "d", "validation": validation})


@pytest.mark.parametrize(
    "ramp",
    [
        {"start": 4, "increment": 4},
        {"start": 0, "increment": 4, "samples": 9},
        {"start": 4, "increment": 4, "samples": 9, "more": 1},
        [4, 4, 9],
        True,
    ],
)
def test_batch_size_ramp_refuses(ramp: object) -> None:
    with pytest.raises(ValidationError):
        build(train={"batch_size_ramp": ramp})


@pytest.mark.parametrize("betas", [[0.9], [0.9, 0.95, 0.99], [0.9, 1.0], [-0.1, 0.9], 0.9, "ab"])
def test_betas_refuse(betas: object) -> None:
    with pytest.raises(ValidationError):
        build(optimizer={"betas": betas})


@pytest.mark.parametrize(
    ("hidden", "activation", "width"),
    [(768, "gelu", 3072), (768, "gelu_tanh", 3072), (768, "swiglu", 2048), (96, "swiglu", 256)],
)
def test_ffn_width_follows(hidden: int, activation: str, width: int) -> None:
    model = ModelConfig(hidden_size=hidden, activation=activation)  # type: ignore[arg-type]
    assert model.resolved_ffn_hidden_size == width
    assert model.model_copy(update={"ffn_hidden_size": 7}).resolved_ffn_hidden_size == 7


def test_other_derived_values() -> None:
    model = ModelConfig(dropout=0.25)
    assert (model.head_width, model.resolved_num_kv_heads) == (64, 12)
    assert model.resolved_attention_dropout == 0.25
    model = ModelConfig(dropout=0.25, attention_dropout=0.0, num_kv_heads=4)
    assert (model.resolved_num_kv_heads, model.resolved_attention_dropout) == (4, 0.0)


@pytest.mark.parametrize(
    ("name", "given", "resolved"),
    [
        ("constant", None, None),
        ("inverse_sqrt", None, None),
        ("linear", None, 70),
        ("cosine", 50, 50),
        ("wsd", None, 7),
        ("wsd", 20, 20),
    ],
)
def test_decay_steps_follow(name: str, given: int | None, resolved: int | None) -> None:
    config = build(train={"max_steps": 70}, schedule={"name": name, "decay_steps": given})
    assert config.resolved_decay_steps == resolved
    assert config.derived["schedule.decay_steps"] == resolved
