"""`megascale checkpoint ...`, and saving on time, signal and trigger file, in whole runs."""

from __future__ import annotations

import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megascale.checkpoint.background import Snapshot
from megascale.checkpoint.manager import CheckpointFolder
from megascale.checkpoint.manifest import dump_manifest, read_manifest
from megascale.checkpoint.retention import steps_to_remove
from megascale.checkpoint.storage import Storage
from megascale.training.callbacks.save_requests import SaveRequests
from tests.integration import runs


@dataclass(frozen=True)
class Made:
    """A run of six steps with a checkpoint of every second one."""

    output: Path
    config: Path

    def checkpoint(self, step: int) -> Path:
        return self.output / "checkpoints" / f"step_{step:08d}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    data = runs.make_dataset(folder, runs.make_tokenizer(folder))
    tree = runs.settings(data, folder / "run", train__max_steps=6)
    config = runs.write_config(folder / "tiny.yaml", tree)
    done = runs.call("train", config)
    assert done.code == 0, done.output
    return Made(folder / "run", config)


@pytest.fixture
def made(source: Made, tmp_path: Path) -> Made:
    shutil.copytree(source.output, tmp_path / "run")
    return Made(tmp_path / "run", source.config)


def test_list_inspect_and_verify(made: Made) -> None:
    listed = runs.call("checkpoint", "list", made.output).stdout.splitlines()
    assert [line.split()[0].rpartition("/")[2] for line in listed] == [
        made.checkpoint(step).name for step in (2, 4, 6)
    ]
    assert all("1 rank(s)" in line for line in listed)
    assert "24 samples" in listed[2]
    seen = runs.call("checkpoint", "inspect", made.checkpoint(4), "--tensors").stdout
    assert "step        4" in seen
    assert "master, exp_avg, exp_avg_sq" in seen
    assert "layers.{0-1}" in seen
    assert runs.call("checkpoint", "verify", made.output).code == 0
    path = made.checkpoint(4) / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    done = runs.call("checkpoint", "verify", made.output)
    assert done.code == 1
    assert [("DAMAGED: rank_00000" in line) for line in done.stdout.splitlines()] == [0, 1, 0]
    path.unlink()
    assert "DAMAGED: rank_00000" in runs.call("checkpoint", "list", made.output).stdout
    runs.call("checkpoint", "list", made.config).refusal()


def test_diff_tells_what_changed(made: Made) -> None:
    done = runs.call("checkpoint", "diff", made.checkpoint(2), made.checkpoint(2))
    assert (done.code, done.stdout) == (0, "the same tensors and the same state\n")
    done = runs.call("checkpoint", "diff", made.checkpoint(2), made.checkpoint(4))
    assert done.code == 1
    assert "step: 2 and 4" in done.stdout
    assert "master of model.embedding" in done.stdout or "master of " in done.stdout
    assert "elements differ, by at most" in done.stdout


@pytest.mark.parametrize("files", [1, 3])
def test_a_resharded_checkpoint_is_the_same_and_is_resumed_from(made: Made, files: int) -> None:
    out = made.output / "elsewhere" / "checkpoints" / "step_00000004"
    out.parent.mkdir(parents=True)
    source = made.checkpoint(4)
    if files == 1:  # and back: one file as one rank would write, but with nothing of its generator
        source = made.output / "in_two"
        done = runs.call("checkpoint", "reshard", made.checkpoint(4), source, "--files", 2)
        assert done.code == 0, done.output
    done = runs.call("checkpoint", "reshard", source, out, "--files", files)
    assert done.code == 0, done.output
    assert len(list(out.glob("*.safetensors"))) == files
    assert runs.call("checkpoint", "verify", out).code == 0
    assert runs.call("checkpoint", "diff", made.checkpoint(4), out).code == 0
    runs.call("checkpoint", "reshard", made.checkpoint(4), out).refusal()
    done = runs.call("train", made.config, f"run.output_dir={out.parent.parent}", "--resume")
    assert done.code == 0, done.output
    again = out.parent / "step_00000006"
    assert runs.call("checkpoint", "diff", made.checkpoint(6), again).code == 0


def test_saving_beside_training_saves_the_same(
    source: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy begins late: an update that did not wait for it would be in the checkpoint."""
    take = Snapshot.take

    def late(self: Snapshot, *what: Any) -> Any:
        time.sleep(0.2)
        return take(self, *what)

    monkeypatch.setattr(Snapshot, "take", late)
    options = (f"run.output_dir={tmp_path}/run", "checkpoint.async_save=true")
    options += ("train.ema_decay=0.5",)
    done = runs.call("train", source.config, *options)
    assert done.code == 0, done.output
    beside = Made(tmp_path / "run", source.config)
    options = (f"run.output_dir={tmp_path}/other", "train.ema_decay=0.5")
    assert runs.call("train", source.config, *options).code == 0
    stopped = Made(tmp_path / "other", source.config)
    for step in (2, 4, 6):
        two = (beside.checkpoint(step), stopped.checkpoint(step))
        done = runs.call("checkpoint", "diff", *two)
        assert done.code == 0, done.output
    waits = [line["checkpoint_s"] for line in runs.metrics(beside.output)]
    assert all(wait >= 0.1 for wait in waits[2::2])  # in the update after a save
    assert all(wait < 0.1 for wait in waits[1::2])
    assert waits[0] < 0.1


def test_prune(made: Made) -> None:
    rules = ("checkpoint", "prune", made.output, "--keep-last", 1)
    told = runs.call(*rules, "--dry-run").stdout
    assert told.count("would remove") == 2
    assert CheckpointFolder(str(made.output / "checkpoints")).steps() == [2, 4, 6]
    assert runs.call(*rules, "--keep-every", 4).stdout.count("removed") == 1
    assert CheckpointFolder(str(made.output / "checkpoints")).steps() == [4, 6]
    (made.checkpoint(6) / "config.yaml").write_text("broken")
    assert "is not intact: config.yaml" in runs.call(*rules).refusal()
    (made.checkpoint(6) / "manifest.json").write_text('{"version": 9}')  # what a newer one wrote
    refused = runs.call(*rules).refusal()
    assert "format version 9, newer than" in refused
    assert "the megascale that wrote it; then prune again" in refused
    done = runs.call("checkpoint", "verify", made.output)
    assert (done.code, done.stdout.count("NOT USABLE"), "DAMAGED" in done.stdout) == (1, 1, False)
    assert CheckpointFolder(str(made.output / "checkpoints")).steps() == [4, 6]


@pytest.mark.parametrize(
    "state",
    [
        {"callbacks": {"checkpoint": {"best_step": "four"}}},
        {"callbacks": {"checkpoint": {"best_step": 4.5}}},
        {"callbacks": {"checkpoint": {"best_step": [4]}}},
    ],
)
def test_prune_with_a_manifest_that_does_not_tell_the_best_step(made: Made, state: Any) -> None:
    manifest = read_manifest(Storage(str(made.checkpoint(6))))
    text = dump_manifest(manifest.model_copy(update={"state": state}))
    (made.checkpoint(6) / "manifest.json").write_bytes(text)
    refused = runs.call("checkpoint", "prune", made.output, "--keep-last", 1).refusal()
    assert "best_step" in refused
    assert CheckpointFolder(str(made.output / "checkpoints")).steps() == [2, 4, 6]


@pytest.mark.parametrize(
    ("last", "every", "keep", "gone"),
    [
        (None, None, (), []),
        (1, None, (), [2, 4, 6, 8]),
        (2, 4, (), [2, 6]),
        (1, None, (2,), [4, 6, 8]),
        (9, 1, (), []),
    ],
)
def test_which_steps_may_go(
    last: int | None, every: int | None, keep: tuple[int, ...], gone: list[int]
) -> None:
    assert steps_to_remove([2, 4, 6, 8, 10], last, every, keep) == gone


def test_the_clock_starts_again_at_each_checkpoint(tmp_path: Path) -> None:
    now = [0.0]
    requests = SaveRequests(tmp_path, 0.5, clock=lambda: now[0])
    requests.start()
    try:
        for second, due in ((29, False), (30, True), (31, True)):
            now[0] = second
            assert requests.agreed(False).save is due
        requests.saved()
        assert not requests.agreed(False).save
        (tmp_path / "SAVE").touch()
        assert requests.agreed(False).save
        assert not requests.agreed(False).save  # asked once
        os.kill(os.getpid(), signal.SIGUSR1)
        assert requests.agreed(False).stop == ""
        (tmp_path / "STOP").touch()
        assert requests.agreed(False).stop == "file STOP"
    finally:
        requests.close()


@pytest.mark.parametrize("nproc", [1, 2])
def test_signals_and_files_save_and_end_a_run(source: Made, tmp_path: Path, nproc: int) -> None:
    """SAVE and SIGUSR1 save and go on; SIGTERM saves, ends the run in order, and leaves no lock."""
    output = tmp_path / "run"
    arguments = ["train", source.config, f"run.output_dir={output}", "--nproc", nproc]
    arguments += ["train.max_steps=100000", "schedule.name=constant", "schedule.min_lr=0"]
    arguments += ["checkpoint.save_interval=0", "checkpoint.async_save=true"]
    log = tmp_path / "log"
    process = runs.start(*arguments, log=log)
    folder = CheckpointFolder(str(output / "checkpoints"))
    try:
        _wait(lambda: (output / "metrics.jsonl").exists() and runs.metrics(output), log)
        assert "another run is writing to" in runs.call(*arguments, "--nproc", 1).refusal()
        (output / "SAVE").touch()
        _wait(lambda: len(folder.steps()) == 1, log)
        process.send_signal(signal.SIGUSR1)
        _wait(lambda: len(folder.steps()) == 2, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert "SIGTERM" in log.read_text()
    last = runs.metrics(output)[-1]["step"]
    assert folder.steps()[-1] == last
    assert len(folder.steps()) == 3
    assert runs.call("checkpoint", "verify", output).code == 0
    assert not (output / ".run.lock").exists()


def _wait(ready: object, log: Path) -> None:
    deadline = time.monotonic() + 90
    while not ready():  # type: ignore[operator]
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
