"""`megascale config show | check | schema`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megascale.cli import config as cli
from megascale.config.checks import DEFAULT_CHECKS, Check
from megascale.config.load import load_config
from megascale.config.problems import ConfigError, Problem


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text("data: {path: d}\nmodel: {num_layers: 2}\n")
    return path


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_show_prints_what_loads_to_the_same(file: Path, tmp_path: Path) -> None:
    printed = invoke("show", file, "model.activation=swiglu", "optimizer.lr=1e-3")
    shown = tmp_path / "shown.yaml"
    shown.write_text(printed)
    given = load_config(file, ["model.activation=swiglu", "optimizer.lr=1e-3"])
    assert load_config(shown) == given
    assert "# model.ffn_hidden_size: null means 2048 here" in printed


def test_check_tells_ok_and_a_summary(file: Path) -> None:
    printed = invoke("check", file, "--world-size", 2, "train.global_batch_size=24")
    assert printed.splitlines()[0] == "ok"
    assert "24 samples (24,576 tokens) = 4 * 2 ranks * 3 accumulation steps" in printed
    assert "2 layers" in printed
    assert invoke("check", file).splitlines()[0] == "ok"


@pytest.mark.parametrize("command", ["show", "check"])
def test_problems_are_raised_to_the_root(command: str, file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        invoke(command, file, "model.num_layer=3", "run.seed=x")
    assert len(caught.value.problems) == 2


def test_check_uses_the_world_size(file: Path) -> None:
    with pytest.raises(ConfigError, match="global_batch_size"):
        invoke("check", file, "--world-size", 3)


def test_the_engines_checks_are_included(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(DEFAULT_CHECKS) < set(cli.all_checks())
    extra = Check(("run.seed",), lambda config, world_size: [Problem("run.seed", 1, "from extra")])
    monkeypatch.setattr(cli, "all_checks", lambda: (extra,))
    for command in ("show", "check"):
        with pytest.raises(ConfigError, match="from extra"):
            invoke(command, file)


def test_schema_is_json_of_the_whole_tree() -> None:
    schema = json.loads(invoke("schema"))
    assert set(schema["required"]) == {"data"}
    assert "num_layers" in schema["$defs"]["ModelConfig"]["properties"]


def test_layout_tells_who_is_where(file: Path) -> None:
    """tp is innermost: neighbouring ranks share the matrices of a layer."""
    lines = invoke(
        "layout", file, "parallel.tensor_parallel_size=2", "--world-size", 4
    ).splitlines()
    assert lines[0] == "world size pp 1 x dp 2 x cp 1 x tp 2"
    assert [line.split() for line in lines[2:]] == [
        ["0", "0", "0", "0", "0", "0"],
        ["1", "0", "0", "0", "0", "1"],
        ["2", "0", "0", "1", "0", "0"],
        ["3", "0", "0", "1", "0", "1"],
    ]
