"""`bash launch/quickstart.sh`, the whole of it, with a model that trains in seconds."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megascale.checkpoint.reader import CheckpointReader
from megascale.config.yaml_text import dump_yaml
from megascale.parallel.fragment import Fragment, whole_box

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24
TIMEOUT_S = 240
SETTINGS = {
    "model": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 32},
    "data": {"path": "given by the script", "split": [0.8, 0.2]},
    "train": {"global_batch_size": 8, "micro_batch_size": 2},
    "parallel": {"zero_stage": 1},
    "evaluation": {"max_samples": 16},
    "logging": {"tensorboard": False},
}


def _quickstart(folder: Path, **knobs: str) -> subprocess.CompletedProcess[str]:
    """Run the script from a foreign folder, without installing; stderr comes with stdout."""
    environment = {
        **os.environ,
        "MEGASCALE_PYTHON": sys.executable,
        "QUICKSTART_DIR": "made",  # relative: taken from where the script is called
        "QUICKSTART_INPUT": str(Path(asyncio.__file__).parent),
        "QUICKSTART_STEPS": str(STEPS),
        "OMP_NUM_THREADS": "1",
        **knobs,
    }
    command = ["bash", str(ROOT / "launch" / "quickstart.sh")]
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as script:
        try:
            output, _ = script.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(script.pid, signal.SIGTERM)  # its trap ends the training's own group
            raise
    return subprocess.CompletedProcess(command, script.returncode, output)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "tiny.yaml").write_text(dump_yaml(SETTINGS), encoding="utf-8")
    return folder


def test_from_text_through_a_kill_to_a_sample(folder: Path) -> None:
    done = _quickstart(folder, QUICKSTART_CONFIG="tiny.yaml")
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout
    run = folder / "made" / "run_01"

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["samples_seen"] for line in lines] == [8 * step for step in range(1, STEPS + 1)]

    lost = [
        json.loads(line)["step"]
        for line in (run / "metrics_before_kill.jsonl").read_text().splitlines()
        if line.endswith("}")
    ]
    saved = STEPS // 4
    # on a loaded machine the kill may come a checkpoint later: nothing may depend on its moment
    assert saved < lost[-1] < STEPS, "killed after a checkpoint and before the end"
    resumed = re.search(r"resumed from (\S+) at step (\d+)", done.stdout)
    assert resumed is not None, done.stdout
    step = int(resumed[2])
    assert step % saved == 0
    assert saved <= step <= lost[-1]
    assert resumed[1] == str(run / "checkpoints" / f"step_{step:08d}")
    assert f"{len(lost)} steps ran before the kill" in done.stdout
    assert "losses and gradient norms on file now: bit-identical" in done.stdout

    table = dict(
        line.split(maxsplit=1) for line in (run / "evaluation.txt").read_text().splitlines()
    )
    assert table["step"] == str(STEPS)
    assert 0 < float(table["bigram_entropy"]) < float(table["unigram_entropy"])
    assert float(table["loss"]) > float(table["bigram_entropy"])
    assert f"{STEPS} steps are too few to ask for it" in done.stdout
    assert "\ndef " in done.stdout
    assert done.stdout.count("\n$ ") == 6, "each step shows its command"
    assert "s, everything else" in done.stdout


@pytest.mark.parametrize("kind", ["master", "exp_avg_sq"])
def test_the_reader_in_the_documentation_reads_its_checkpoint(folder: Path, kind: str) -> None:
    """ZeRO 1 on two ranks cuts flat, through the middle of rows: the hard case for a reader."""
    page = (ROOT / "docs" / "checkpoint-format.md").read_text(encoding="utf-8")
    listing = page.split("## A reader in Python")[1]
    names: dict[str, Any] = {}
    exec("\n".join(line[4:] for line in listing.splitlines()), names)
    checkpoint = folder / "made" / "run_01" / "checkpoints" / f"step_{STEPS:08d}"
    tensors = names["read"](checkpoint, kind)

    reader = CheckpointReader(str(checkpoint))
    assert tensors.keys() == reader.manifest.parameters.keys()
    assert any(piece.start for piece in reader.manifest.pieces)
    for name, shape in reader.manifest.parameters.items():
        flat = torch.empty(int(np.prod(shape)))
        reader.fill(Fragment(name, kind, shape, whole_box(shape), 0, flat))
        assert np.array_equal(tensors[name].ravel(), flat.numpy()), name
    reader.close()


def test_a_second_run_reuses_data_and_keeps_the_first(folder: Path) -> None:
    """With a learning rate that learns nothing it also shows that the gate can fail."""
    hopeless = {
        **SETTINGS,
        "optimizer": {"lr": 1e-9},
        "train": {"global_batch_size": 4, "micro_batch_size": 4},
    }
    (folder / "hopeless.yaml").write_text(dump_yaml(hopeless), encoding="utf-8")
    before = (folder / "made" / "run_01" / "metrics.jsonl").read_bytes()
    done = _quickstart(folder, QUICKSTART_CONFIG="hopeless.yaml", QUICKSTART_STEPS="600", NPROC="1")
    assert done.returncode == 1, done.stdout
    assert "is not below the bigram entropy" in done.stdout
    assert "already done" in done.stdout
    assert "already prepared" in done.stdout
    assert "this one goes to" in done.stdout
    assert (folder / "made" / "run_01" / "metrics.jsonl").read_bytes() == before
    assert len((folder / "made" / "run_02" / "metrics.jsonl").read_text().splitlines()) == 600


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"QUICKSTART_STEPS": "5"}, "QUICKSTART_STEPS=5"),
        ({"NPROC": "two"}, "NPROC=two"),
        ({"NPROC": "3", "QUICKSTART_CONFIG": "tiny.yaml"}, "train.global_batch_size"),
        ({"QUICKSTART_CONFIG": "absent.yaml"}, "absent.yaml"),
        ({"QUICKSTART_INPUT": "absent.txt", "QUICKSTART_DIR": "other"}, "absent.txt"),
    ],
)
def test_a_wrong_knob_is_named(folder: Path, knobs: dict[str, str], named: str) -> None:
    done = _quickstart(folder, **knobs)
    assert done.returncode != 0
    assert named in done.stdout
    assert "remedy:" in done.stdout or "hint:" in done.stdout
    assert "Traceback" not in done.stdout
