"""`bash launch/quickstart.sh bert`, the whole of it, with a model that trains in seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megascale.config.yaml_text import dump_yaml
from tests.bert_data import sentences

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "model": {
        "family": "bert",
        "num_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "seq_length": 32,
        "activation": "gelu",
    },
    "data": {"path": "given by the script", "split": [0.8, 0.2], "sentence_objective": "sop"},
    "train": {"global_batch_size": 8, "micro_batch_size": 2},
    "parallel": {"zero_stage": 1},
    "logging": {"tensorboard": False},
}


def _quickstart(folder: Path, *arguments: str, **knobs: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "MEGASCALE_PYTHON": sys.executable,
        "QUICKSTART_DIR": "made",  # relative: taken from where the script is called
        "QUICKSTART_INPUT": "text",
        "QUICKSTART_CONFIG": "tiny.yaml",
        "QUICKSTART_STEPS": "20",
        "OMP_NUM_THREADS": "1",
        **knobs,
    }
    return subprocess.run(
        ["bash", str(ROOT / "launch" / "quickstart.sh"), *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "tiny.yaml").write_text(dump_yaml(SETTINGS), encoding="utf-8")
    (folder / "text").mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz"
    for number in range(40):
        # enough different words for 4096 tokens are not needed: fewer are trained then
        words = " ".join(f"{letters[(number * i) % 26]}{letters[i % 26]}{i}" for i in range(20))
        text = " ".join(sentences(number, 6)) + f" The words are {words}."
        (folder / "text" / f"{number}.txt").write_text(text)
    return folder


def test_from_text_to_an_evaluated_bert(folder: Path) -> None:
    done = _quickstart(folder, "bert")
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout
    run = folder / "made" / "run_01"
    table = dict(
        line.split(maxsplit=1) for line in (run / "evaluation.txt").read_text().splitlines()
    )
    assert table["step"] == "20"
    assert 0 < float(table["majority_accuracy"]) < 1
    assert 0 <= float(table["masked_lm_accuracy"]) < 1
    assert 0 < float(table["sop_accuracy"]) <= 1
    total = float(table["masked_lm_loss"]) + float(table["sop_loss"])
    assert float(table["loss"]) == pytest.approx(total, abs=2e-4)
    assert "bits_per_byte" not in table
    assert done.stdout.count("\n$ ") == 4, "each step shows its command"
    last = (run / "metrics.jsonl").read_text().splitlines()[-1]
    for name in ("valid_masked_lm_accuracy", "valid_sop_accuracy", "valid_sop_loss"):
        assert f'"{name}": ' in last


def test_the_gate_can_fail(folder: Path) -> None:
    hopeless = {
        **SETTINGS,
        "optimizer": {"lr": 1e-9},
        "train": {"global_batch_size": 2, "micro_batch_size": 2},
    }
    (folder / "hopeless.yaml").write_text(dump_yaml(hopeless), encoding="utf-8")
    knobs = {"QUICKSTART_CONFIG": "hopeless.yaml", "QUICKSTART_STEPS": "200", "NPROC": "1"}
    done = _quickstart(folder, "bert", **knobs)
    assert done.returncode == 1, done.stdout
    assert "is not above twice the majority's" in done.stdout
    assert "already prepared" in done.stdout


def test_an_unknown_word_is_refused(folder: Path) -> None:
    done = _quickstart(folder, "brt")
    assert done.returncode == 2
    assert "brt" in done.stdout
    assert "bert" in done.stdout
