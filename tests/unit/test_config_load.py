"""Loading: YAML forms, overrides, every problem at once, suggestions, and the way back out."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path
from posixpath import normpath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.config.load import dump_config, load_config
from megascale.config.problems import ABSENT, ConfigError, Problem, show_value
from megascale.config.schema import Config, leaf_fields, read_path
from megascale.config.yaml_text import dump_yaml, parse_yaml
from megascale.errors import UserError

MINIMAL = "data: {path: d}\n"


def load(tmp_path: Path, text: str, *overrides: str, world_size: int | None = None) -> Config:
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(file, overrides, world_size=world_size)


def problems(source: Any, *overrides: str, world_size: int | None = None) -> dict[str, Problem]:
    """The problems of a configuration by path; there must be some, at different paths."""
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides, world_size=world_size)
    found = {problem.path: problem for problem in caught.value.problems}
    assert len(found) == len(caught.value.problems)
    for problem in caught.value.problems:
        assert problem.path in str(caught.value)
        assert show_value(problem.value) in str(caught.value)
        assert problem.rule in str(caught.value)
        assert problem.hint in str(caught.value)
    return found


def file_problems(tmp_path: Path, text: str, *overrides: str) -> dict[str, Problem]:
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return problems(file, *overrides)


def plain(**sections: Any) -> dict[str, Any]:
    return {"data": {"path": "d"}, **sections}


# Files ----------------------------------------------------------------------------------------


def test_a_minimal_file_takes_every_default(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL)
    assert config == Config.model_validate(plain())
    assert (config.optimizer.lr, config.model.num_layers) == (3e-4, 12)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("1.5e+3", 1500.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("+2.5", 2.5),
        ("6", 6.0),
        ("1_000.5", 1000.5),
        ("1_0e1", 100.0),
    ],
)
def test_float_forms(tmp_path: Path, text: str, value: float) -> None:
    assert load(tmp_path, f"{MINIMAL}optimizer: {{lr: {text}}}").optimizer.lr == value
    assert load(tmp_path, MINIMAL, f"optimizer.lr={text}").optimizer.lr == value


@pytest.mark.parametrize("text", ["'1e-3'", "1e", "e5", "1e999", ".inf", ".nan", "1:30.5", "01x"])
def test_what_is_no_finite_float(tmp_path: Path, text: str) -> None:
    assert set(file_problems(tmp_path, f"{MINIMAL}optimizer: {{lr: {text}}}")) == {"optimizer.lr"}


@pytest.mark.parametrize(("text", "value"), [("7", 7), ("1_000", 1000), ("0x1F", 31), ("0", 0)])
def test_integer_forms(tmp_path: Path, text: str, value: int) -> None:
    assert load(tmp_path, f"{MINIMAL}run: {{seed: {text}}}").run.seed == value


@pytest.mark.parametrize("text", ["010", "1:30", "5.0", "1e3", "'5'", "true", "null", "-1"])
def test_what_is_no_seed(tmp_path: Path, text: str) -> None:
    assert set(file_problems(tmp_path, f"{MINIMAL}run: {{seed: {text}}}")) == {"run.seed"}


def test_a_date_is_text(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL, "run.output_dir=2024-13-45").run.output_dir == "2024-13-45"


def test_names_given_twice_are_refused_with_their_lines(tmp_path: Path) -> None:
    text = (
        "model:\n  num_layers: 2\n  num_layers: 3\ndata:\n  path: [{path: a, path: b, weight: 1}]"
    )
    found = file_problems(tmp_path, text + "\nmodel: {hidden_size: 7}\n")
    assert set(found) == {"model.num_layers", "data.path[0].path", "model"}
    assert found["model.num_layers"].value == "3"
    assert "lines 2 and 3" in found["model.num_layers"].rule
    assert "lines 1 and 6" in found["model"].rule


@pytest.mark.parametrize("text", ["", "# only a comment", "- 1\n- 2", "5", "text", "null"])
def test_the_top_level_is_a_mapping(tmp_path: Path, text: str) -> None:
    (problem,) = file_problems(tmp_path, text).values()
    assert "mapping" in problem.rule


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("run: {seed: 1\nmodel: 2\n", "line 2"),
        ("run:\n  seed: 1\n model: 2\n", "line 3, column 2"),
        ("run:\n\tseed: 1\n", "line 2, column 1"),
        ("run: {seed: 1}\nname: \x07\n", "line 2, column 7"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1"),
        ("run: {seed: !!int x}", "line 1, column 13"),
        ("run: {seed: !!bool x}", "line 1, column 13"),
        ("run: {seed: !!python/name:os.system }", "line 1, column 13"),
        (f"run: {{seed: {'9' * 5000}}}", "line 1, column 13"),
        ("? [1, 2]\n: 3\n", "line 1, column 3"),
    ],
)
def test_syntax_errors_tell_line_and_column(tmp_path: Path, text: str, where: str) -> None:
    (problem,) = file_problems(tmp_path, text).values()
    assert problem.path.endswith("config.yaml")
    assert f"not valid YAML at {where}" in problem.rule


def test_too_deep_nesting_is_a_problem(tmp_path: Path) -> None:
    (problem,) = file_problems(tmp_path, "[" * 20000).values()
    assert "deeply" in problem.rule


def test_a_value_that_holds_itself_is_a_problem(tmp_path: Path) -> None:
    assert "run.seed" in file_problems(tmp_path, f"{MINIMAL}run: {{seed: &a [*a]}}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(MINIMAL)
    (tmp_path / "latin.yaml").write_bytes(b"run: {output_dir: caf\xe9}")
    (missing,) = problems(str(tmp_path / "missing.yaml")).values()
    assert "exist" in missing.rule
    assert "other.yaml" in missing.hint
    (folder,) = problems(tmp_path).values()
    assert "folder" in folder.rule
    assert "other.yaml" in folder.hint
    (latin,) = problems(tmp_path / "latin.yaml").values()
    assert "byte 21 (0xe9)" in latin.rule
    (nowhere,) = problems(tmp_path / "no" / "x.yaml").values()
    assert "no folder" in nowhere.hint
    assert problems("a\0b")


def test_the_error_is_a_user_error_that_can_be_pickled(tmp_path: Path) -> None:
    error = ConfigError([Problem("a.b", 3, "must be 4", "write 4")], "file.yaml")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, UserError)
    assert again.exit_code == 2
    assert (str(again), again.problems) == (str(error), error.problems)
    assert str(error).splitlines()[0] == "file.yaml: 1 problem"


# Overrides ------------------------------------------------------------------------------------


def test_overrides_replace_the_file_and_the_last_wins(tmp_path: Path) -> None:
    text = f"{MINIMAL}optimizer: {{lr: 1}}\nmodel: {{vocab_size: 7}}\nrun: {{seed: bad}}\n"
    overrides = ["optimizer.lr=1e-4", "optimizer.lr=1e-2", "model.vocab_size=null", "run.seed=3"]
    overrides += ["data.path=[{path: x=y, weight: 1}]", "parallel.zero_stage=2"]
    overrides += ["optimizer.betas=[0, 0.5]", " model.bias =false", 'run.output_dir="1"']
    config = load(tmp_path, text, *overrides)
    assert config.optimizer.lr == 1e-2
    assert config.model.vocab_size is None
    assert config.run.seed == 3
    assert config.data.source_paths == ("x=y",)
    assert config.parallel.zero_stage == 2
    assert config.optimizer.betas == (0.0, 0.5)
    assert config.model.bias is False
    assert config.run.output_dir == "1"


def test_overrides_leave_the_given_mapping_alone() -> None:
    given = plain(run={"seed": 1})
    assert load_config(given, ["run.seed=2", "model.num_layers=3"]).run.seed == 2
    assert given == plain(run={"seed": 1})


@pytest.mark.parametrize(
    ("override", "path", "words"),
    [
        ("run.seed", "run.seed", "section.name=value"),
        ("=3", "=3", "section.name=value"),
        ("run.seed=", "run.seed=", "section.name=value"),
        ("run.seed=[1", "run.seed", "not valid YAML"),
        ("run.seed={a: 1, a: 2}", "run.seed", "only once"),
        ("run.sed=1", "run.sed", "no setting of this name in run"),
        ("rnu.seed=1", "rnu.seed", "no setting of this name in the top level"),
        ("run..seed=1", "run..seed", "no setting of this name in run"),
        ("run.seed.x=1", "run.seed.x", "nothing lies below it"),
        ("data.path.0.weight=1", "data.path.0.weight", "items of a list cannot be set"),
        ("run={seed: 1}", "run", "is a section"),
        ("run.seed=1.5", "run.seed", "must be an integer"),
    ],
)
def test_bad_overrides(override: str, path: str, words: str) -> None:
    found = problems(plain(), override)
    assert set(found) == {path}
    assert words in found[path].rule


def test_an_override_into_a_broken_section_reports_the_section() -> None:
    assert set(problems(plain(run=3), "run.seed=1")) == {"run"}


# Every problem at once ------------------------------------------------------------------------


def test_many_kinds_of_problems_in_one_error(tmp_path: Path) -> None:
    text = """
    lr: 1e-3
    run: {seed: 1, seed: 2}
    model: {hidden_size: 100, num_attention_heads: 7, activation: geluu, num_layers: "12"}
    train: {global_batch_size: 30, micro_batch_size: 4}
    optimizer: {name: sgd, eps: 1e-3}
    parallel: {zero_stage: 4, sequence_parallel: true}
    evaluation: 5
    """
    file = tmp_path / "config.yaml"
    file.write_text(text)
    found = problems(file, "model.seq_len=8", "run.seed.x=1", "schedule.min_lr=1.0", world_size=2)
    assert {path: problem.value for path, problem in found.items()} == {
        "lr": 1e-3,  # unknown, known elsewhere
        "run.seed": "2",  # given twice
        "run.seed.x": 1,  # override through a leaf
        "model.seq_len": 8,  # unknown in an override
        "model.activation": "geluu",  # not one of the values
        "model.num_layers": "12",  # wrong type
        "data.path": ABSENT,  # required
        "parallel.zero_stage": 4,  # out of bounds
        "evaluation": 5,  # not a mapping
        "model.hidden_size": 100,  # arithmetic
        "optimizer.eps": 1e-3,  # would be ignored
        "parallel.sequence_parallel": True,  # ignored by one rank
        "train.global_batch_size": 30,  # world size
    }
    # "lr" was most likely meant as optimizer.lr: nothing is said about min_lr beside its default.


def test_a_check_that_reads_an_invalid_setting_is_left_out() -> None:
    assert set(problems(plain(model={"hidden_size": 100, "num_attention_heads": "7"}))) == {
        "model.num_attention_heads"
    }
    assert set(problems(plain(model={"hidden_size": 100, "num_atention_heads": 7}))) == {
        "model.num_atention_heads"
    }
    assert set(problems(plain(model={"hidden_size": 100, "num_attention_heads": 7}))) == {
        "model.hidden_size"
    }


def test_a_missing_required_setting_names_its_rule_and_an_example() -> None:
    for source in ({}, {"data": {}}, {"data": {"split": [1.0]}}):
        problem = problems(source)["data.path"]
        assert problem.value is ABSENT
        assert "must be given" in problem.rule
        assert "data/my_dataset" in problem.hint


def test_problems_inside_a_blend_have_their_index() -> None:
    blend = [{"path": "a", "weight": 0}, {"pth": "b", "weight": 1}]
    found = problems({"data": {"path": blend}})
    assert set(found) == {"data.path[0].weight", "data.path[1].pth", "data.path[1].path"}
    assert "data.path[1].path" in found["data.path[1].pth"].hint


@pytest.mark.parametrize(
    ("section", "name", "hint"),
    [
        ("model", "num_layer", "model.num_layers"),
        ("model", "hiddenSize", "model.hidden_size"),
        ("model", "hidden-size", "model.hidden_size"),
        ("model", "lr", "optimizer.lr"),
        ("train", "seq_length", "model.seq_length"),
        ("train", "learning_rate", "train has: global_batch_size"),
        ("run", "zero_stge", "parallel.zero_stage"),
        ("train", "batch_size", "train.micro_batch_size"),
        ("model", "name", "optimizer.name or schedule.name"),
    ],
)
def test_did_you_mean_for_names(section: str, name: str, hint: str) -> None:
    (problem,) = problems(plain(**{section: {name: 1}})).values()
    assert hint in problem.hint


def test_did_you_mean_for_sections_and_top_level_names() -> None:
    found = problems(plain(modle={}, zero_stage=1, xyzzy=1))
    assert found["modle"].hint == "did you mean model?"
    assert found["zero_stage"].hint == "did you mean parallel.zero_stage?"
    assert "run, model, data" in found["xyzzy"].hint


@pytest.mark.parametrize(
    ("path", "given", "meant"),
    [
        ("model.family", "GPT", "gpt"),
        ("optimizer.name", "adam", "adamw"),
        ("schedule.name", "cosin", "cosine"),
        ("precision.dtype", "bf61", "bf16"),
        ("parallel.pipeline_schedule", "interleave", "interleaved"),
    ],
)
def test_did_you_mean_for_values(path: str, given: str, meant: str) -> None:
    problem = problems(plain(), f"{path}={given}")[path]
    assert problem.hint == f"did you mean {meant}?"
    assert meant in problem.rule


@pytest.mark.parametrize(
    ("override", "rule", "hint"),
    [
        ("run.seed='5'", "must be an integer", "without quotes"),
        ("run.seed=5.0", "must be an integer", "write 5"),
        ("run.seed=true", "must be an integer", "Default: 1234"),
        ("run.seed=null", "must be an integer", "default, 1234"),
        ("model.vocab_size=x", "must be an integer, or null", "token ids"),
        ("run.output_dir=12", "must be text", "put it in quotes"),
        ("model.bias=1", "must be true or false", "biases"),
        ("model.dropout=1", "must be < 1", "Probability"),
        ("data.split=[0.5, 0.4]", "sum to 0.9", "Default: [0.98, 0.02]"),
        ("data.path={a: 1}", "must be a path or a list of {path, weight}", "Example: data.path:"),
        ("optimizer.lr=.inf", "must be a finite number", "Peak"),
    ],
)
def test_rules_and_hints(override: str, rule: str, hint: str) -> None:
    (problem,) = problems(plain(), override).values()
    assert rule in problem.rule
    assert hint in problem.hint


@pytest.mark.parametrize("key", [1, True, None, (1, 2)])
def test_names_that_are_no_text(key: object) -> None:
    (problem,) = problems(plain(run={key: 2})).values()
    assert "names must be text" in problem.rule
    assert problems(plain() | {key: 3})


def test_values_are_shown_on_one_line_and_cut() -> None:
    assert show_value("a\nb\x1b[31m") == '"a\\nb\\u001b[31m"'
    assert len(show_value("x" * 1000)) < 120
    assert show_value("\ud800") == '"?"'


# And back out ---------------------------------------------------------------------------------


def test_dump_has_every_field_in_the_order_of_the_tree() -> None:
    raw, _ = parse_yaml(dump_config(load_config(plain())), "")
    assert [f"{section}.{name}" for section, part in raw.items() for name in part] == [
        path for path, _ in leaf_fields()
    ]


positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)
text = st.text(min_size=1).filter(lambda t: t.strip() and "\0" not in t)
path = st.one_of(
    text,
    st.sampled_from(["1e-3", "010", "null", "true", "1:30", "2024-01-01", "a: b", "- a", "~"]),
    st.lists(
        st.fixed_dictionaries({"path": text, "weight": positive}),
        min_size=1,
        max_size=3,
        unique_by=lambda source: normpath(source["path"]),
    ),
)


@settings(max_examples=150, deadline=None)
@given(
    path=path,
    output_dir=text,
    lr=positive,
    clip=positive,
    beta=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**63 - 1),
    vocab_size=st.none() | st.integers(1, 2**31 - 1),
    bias=st.booleans(),
)
def test_round_trip(path, output_dir, lr, clip, beta, seed, vocab_size, bias) -> None:  # type: ignore[no-untyped-def]
    given_tree = {
        "run": {"output_dir": output_dir, "seed": seed},
        "model": {"vocab_size": vocab_size, "bias": bias},
        "data": {"path": path},
        "optimizer": {"lr": lr, "grad_clip": clip, "betas": [beta, 0.5]},
    }
    config = load_config(given_tree)
    dumped = dump_config(config)
    raw, found = parse_yaml(dumped.encode().decode(), "")
    assert not found
    again = load_config(raw)
    assert again == config
    assert dump_config(again) == dumped
    assert read_path(again, "optimizer.lr") == lr


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_is_a_value_or_a_config_error(tmp_path_factory, source: str) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(source.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError):
        load_config(file)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
leaf = st.sampled_from([path for path, _ in leaf_fields()])


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(leaf, anything, min_size=1, max_size=4), anything, st.text(), anything)
def test_any_data_is_a_config_or_a_config_error(values, section, name, extra) -> None:  # type: ignore[no-untyped-def]
    tree: dict[str, Any] = {"train": section, name: extra}
    for dotted, value in values.items():
        part, key = dotted.split(".")
        tree[part] = {**tree.get(part, {}), key: value} if part != "train" else section
    for source in (tree, plain(train={name: extra}), {"data": {"path": section}}):
        with contextlib.suppress(ConfigError):
            load_config(source, [f"{name}={extra}"])
        with contextlib.suppress(ConfigError):
            config = load_config(source)
            assert load_config(parse_yaml(dump_config(config), "")[0]) == config


def test_lists_of_scalars_are_on_one_line() -> None:
    assert dump_yaml({"a": [1, 2], "b": [{"c": 1e-5}]}) == "a: [1, 2]\nb:\n- c: 1.0e-05\n"
