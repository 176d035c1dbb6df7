"""`megascale profile`: operations have phase, module and kind, and FLOPs are the formulas'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.runs import make_dataset, make_tokenizer, run, settings, write_config

TOKENS = 4 * 16  # of a step: samples x seq_length
HIDDEN, LAYERS, VOCAB = 16, 2, 270


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    tree = settings(make_dataset(folder, make_tokenizer(folder)), folder / "run")
    return write_config(folder / "config.yaml", tree)


def profiled(config: Path, *changes: str) -> dict[str, Any]:
    done = run("profile", config, *changes)
    assert done.code == 0, done.output
    assert "What the step's time is" in done.stdout
    found: dict[str, Any] = json.loads(
        (config.parent / "run" / "profile" / "profile.json").read_text()
    )
    return found


def products(tokens: int, inputs: int, outputs: int, layers: int = 1) -> int:
    """FLOPs of a matrix: once forward, twice backward."""
    return 3 * 2 * tokens * inputs * outputs * layers


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])  # torch's products, and compiled ones
def test_time_is_divided_and_flops_are_exact(config: Path, dtype: str) -> None:
    found = profiled(config, "model.dropout=0.1", f"precision.dtype={dtype}")
    modules, whole = found["modules"], found["wall_seconds"]
    totals = [sum(s["seconds"] for s in found[k].values()) for k in ("phases", "modules", "kinds")]
    assert totals == pytest.approx([totals[0]] * 3)
    assert 0.5 * whole < totals[0] < 1.05 * whole
    assert sum(found["gap"].values()) == pytest.approx(whole)
    for name, inputs, outputs in (
        ("attention.query", HIDDEN, HIDDEN),
        ("attention.output", HIDDEN, HIDDEN),
        ("mlp.up", HIDDEN, 4 * HIDDEN),
        ("mlp.down", 4 * HIDDEN, HIDDEN),
    ):
        flops = modules[f"model.layers.*.{name}"]["flops"]
        assert flops == pytest.approx(products(TOKENS, inputs, outputs, LAYERS)), name
    assert modules["head"]["flops"] == pytest.approx(products(TOKENS, HIDDEN, VOCAB))
    assert {"load", "forward", "backward", "gradients", "optimizer"} <= found["phases"].keys()
    assert found["phases"]["forward"]["kept_bytes"] > 0
    trace = config.parent / "run" / "profile" / "trace_rank_00000.json"
    events = json.loads(trace.read_text())["traceEvents"]
    assert any(event.get("name") == "module:model.layers.*.mlp.up" for event in events)


def test_ranks_recomputation_and_communication(config: Path) -> None:
    changes = ("parallel.tensor_parallel_size=2", "parallel.activation_recomputation=full")
    found = profiled(config, *changes, "--nproc", "2", "--steps", "1")
    assert found["kinds"]["communication"]["seconds"] > 0
    # two layers forward, again and backward, embedding, head and loss, norm and counts
    assert found["collectives"]["all_reduce"]["calls"] >= 2 * LAYERS * 3 + 2
    assert found["collectives"]["all_reduce"]["seconds"] > 0
    again = found["phases"]["forward again, for the backward"]
    assert again["seconds"] > 0
    up = found["modules"]["model.layers.*.mlp.up"]["flops"]  # a rank's half, forward twice
    assert up == pytest.approx(products(TOKENS, HIDDEN, 2 * HIDDEN, LAYERS) * 4 / 3)
    folder = config.parent / "run" / "profile"
    assert (folder / "trace_rank_00001.json").exists()


def test_a_wrong_setting_is_refused(config: Path) -> None:
    assert "model.num_layers" in run("profile", config, "model.num_layers=0").refusal()
