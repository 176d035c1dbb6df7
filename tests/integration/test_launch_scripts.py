"""The scripts of launch/ that start a training on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.integration.runs import ROOT, metrics, run, settings, write_config


def _start(script: str, *arguments: object, **environment: str) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = run(
        *arguments, launcher=("bash", ROOT / "launch" / script), PATH=path, NPROC="2", **environment
    )
    assert done.code == 0, done.output
    return done.output


def test_torchrun_and_the_deepspeed_launcher_give_the_same_curve(
    token_prefix: Path, tmp_path: Path
) -> None:
    curves = []
    for script in ("local.sh", "deepspeed.sh"):
        output = tmp_path / script
        changes = {"model__vocab_size": 96, "data__split": [1.0], "parallel__engine": "torch"}
        tree = settings(token_prefix, output, **changes)
        text = _start(script, write_config(tmp_path / f"{script}.yaml", tree), "train.max_steps=2")
        assert "2 process(es)" in text
        curves.append([(line["step"], line["loss"], line["grad_norm"]) for line in metrics(output)])
    assert curves[0] == curves[1]
    assert len(curves[0]) == 2


@pytest.mark.parametrize("script", ["local.sh", "deepspeed.sh"])
def test_without_a_config_they_explain_themselves(script: str) -> None:
    done = run(launcher=("bash", ROOT / "launch" / script))
    assert done.code == 2
    assert f"bash launch/{script} configs/gpt_tiny.yaml" in done.output
