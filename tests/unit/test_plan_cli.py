"""`megascale plan simulate`: numbers, pictures, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megascale.cli.main import build_app, main

CONFIG = "configs/gpt_tiny.yaml"
PIPELINE = [
    "model.vocab_size=512",
    "model.num_layers=8",
    "parallel.pipeline_parallel_size=4",
    "train.micro_batch_size=1",
    "train.global_batch_size=16",
]
ROOT = Path(__file__).resolve().parents[2]


def simulate(*arguments: str) -> None:
    build_app()(["plan", "simulate", str(ROOT / CONFIG), *arguments], standalone_mode=False)


def test_numbers_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    simulate(*PIPELINE, "parallel.layers_per_stage=[2,2,2,2]", "--world-size", "8", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["num_micro_batches"] == 8  # 16 samples on 2 replicas
    assert found["layers"] == [[[0, 2]], [[2, 4]], [[4, 6]], [[6, 8]]]
    assert found["one_f_one_b_bubble"] == pytest.approx(3 / 8)
    assert found["bubble"] > 3 / 8  # the head makes the last stage dearer
    assert found["activations"] == [4, 3, 2, 1]
    assert len(found["actions"]) == 4 * 2 * 8
    assert max(action["end"] for action in found["actions"]) == pytest.approx(found["duration"])


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("html", b"<!doctype html>")])
def test_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str, start: bytes
) -> None:
    picture = tmp_path / f"timeline.{ending}"
    zbv = ["parallel.pipeline_schedule=zbv", "parallel.virtual_pipeline_stages=2"]
    simulate(*PIPELINE, *zbv, "--output", str(picture))
    assert f"drawn to {picture}" in capsys.readouterr().out
    content = picture.read_bytes()
    assert content.startswith(start)
    if ending == "html":
        assert b"zbv: 4 ranks" in content
        assert b"http-equiv" not in content
        assert b"src=" not in content  # nothing is fetched


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "parallel.pipeline_parallel_size=1"),
        ([*PIPELINE, "--output", "a.jpg"], "the ending of the file is one of .png"),
        ([*PIPELINE, "--world-size", "6"], "must be a positive integer"),
    ],
)
def test_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "simulate", str(ROOT / CONFIG), *arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
