"""`megascale` as a person starts it: launchers, the run's folder, resume, use of the result."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from megascale import __version__
from megascale.checkpoint.manager import CheckpointManager
from megascale.checkpoint.reader import CheckpointReader
from megascale.config.load import load_config
from tests.integration import runs

PROMISED = {
    *("step", "loss", "lr", "grad_norm", "samples_seen", "tokens_seen"),
    *("step_time_s", "tokens_per_second", "loss_scale", "skipped"),
}
ADDED = {"sources", "mfu", "memory_bytes", "global_batch_size", "checkpoint_s"}
QUIET = ("logging.tensorboard=false",)  # its import takes seconds
ON_A_VALIDATED_STEP = {"valid_loss", "valid_perplexity", "valid_tokens"}


@dataclass(frozen=True)
class Workplace:
    """A dataset, a config, and where runs go."""

    folder: Path
    data: Path
    config: Path

    def output(self, name: str) -> str:
        """The override that sends a run into its own folder."""
        return f"run.output_dir={self.folder / name}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("cli")
    data = runs.make_dataset(folder, runs.make_tokenizer(folder))
    tree = runs.settings(
        data,
        folder / "alone",
        train__max_steps=6,
        evaluation__interval=3,
        checkpoint__keep_last=2,
        logging__tensorboard=True,
    )
    return Workplace(folder, data, runs.write_config(folder / "tiny.yaml", tree))


@pytest.fixture(scope="module")
def alone(place: Workplace) -> runs.Done:
    done = runs.run("train", place.config)
    assert done.code == 0, done.output
    return done


def _curve(output: Path) -> tuple[list[float], list[float]]:
    lines = runs.metrics(output)
    return [line["loss"] for line in lines], [line["grad_norm"] for line in lines]


# The run's folder -----------------------------------------------------------------------------


def test_a_run_leaves_what_is_promised(place: Workplace, alone: runs.Done) -> None:
    output = place.folder / "alone"
    assert {path.name for path in output.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "tensorboard",
        "logs",
    }
    saved = load_config(output / "config.yaml")
    given = load_config(place.config)
    assert saved.model.vocab_size == 270  # of the tokenizer
    assert given.model.vocab_size is None
    assert saved == load_config(place.config, ["model.vocab_size=270"])
    # save_interval 2, six steps, keep_last 2
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        "step_00000004",
        "step_00000006",
    ]
    assert [path.stat().st_size > 0 for path in (output / "tensorboard").iterdir()] == [True]


def test_metrics_has_one_whole_line_a_step(place: Workplace, alone: runs.Done) -> None:
    lines = runs.metrics(place.folder / "alone")
    assert [line["step"] for line in lines] == list(range(1, 7))
    for line in lines:
        validated = ON_A_VALIDATED_STEP if line["step"] % 3 == 0 else set()
        assert set(line) == PROMISED | ADDED | validated
        ((source, count),) = line.pop("sources").items()
        assert source == str(place.data)
        assert (count["samples"], count["tokens"]) == (line["samples_seen"], line["tokens_seen"])
        assert all(math.isfinite(value) for value in line.values())
        assert line["samples_seen"] == 4 * line["step"]
        assert line["tokens_seen"] == 16 * line["samples_seen"]
        assert line["tokens_per_second"] == pytest.approx(64 / line["step_time_s"])
        assert line["loss_scale"] == 1.0
        assert line["skipped"] is False
    losses = [line["loss"] for line in lines]
    assert losses[0] == pytest.approx(math.log(270), abs=0.1)  # nothing is known yet
    assert losses[-1] < losses[0] - 0.3


def test_the_console_has_plain_lines_when_it_is_no_terminal(
    place: Workplace, alone: runs.Done
) -> None:
    assert "\x1b" not in alone.output
    lines = alone.stdout.splitlines()
    steps = [line for line in lines if "grad norm" in line]
    assert len(steps) == 6
    for word in ("loss", "lr", "tok/s", "MFU", "MiB", "left"):
        assert word in steps[0]
    assert sum("valid loss" in line for line in lines) == 2
    assert f"megascale {__version__}: gpt" in lines[0]


# Launchers ------------------------------------------------------------------------------------


def _same_curve(place: Workplace, name: str) -> None:
    losses, norms = _curve(place.folder / name)
    expected_losses, expected_norms = _curve(place.folder / "alone")
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    assert norms == pytest.approx(expected_norms, rel=1e-5)


def test_nproc_starts_ranks_and_a_stale_build_lock_does_not_hang_them(
    place: Workplace, alone: runs.Done
) -> None:
    """DeepSpeed compiles operators at first use behind a lock file that a killed build leaves."""
    extensions = place.folder / "extensions"
    for name in ("deepspeed_shm_comm", "deepspeed_ccl_comm", "cpu_adam", "fused_adam"):
        (extensions / name).mkdir(parents=True)
        (extensions / name / "lock").touch()
    done = runs.run(
        "train",
        place.config,
        place.output("nproc"),
        *QUIET,
        "parallel.zero_stage=1",
        "--nproc",
        2,
        TORCH_EXTENSIONS_DIR=str(extensions),
    )
    assert done.code == 0, done.output
    assert "2 process(es) on cpu, engine deepspeed, ZeRO stage 1" in done.stdout
    _same_curve(place, "nproc")
    assert (place.folder / "nproc" / "logs" / "rank_00001.log").exists()
    assert done.stdout.count("checkpoint of step 2 saved") == 1  # one rank speaks


def test_torchrun(place: Workplace, alone: runs.Done) -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2)
    overrides = (place.output("torchrun"), *QUIET, "parallel.zero_stage=2")
    done = runs.run("train", place.config, *overrides, launcher=(*launcher, "-m", "megascale"))
    assert done.code == 0, done.output
    _same_curve(place, "torchrun")


def test_the_deepspeed_launcher(place: Workplace, alone: runs.Done) -> None:
    """It puts --local_rank=N before the subcommand; with --no_local_rank it is like torchrun."""
    launcher = (
        Path(sys.executable).with_name("deepspeed"),
        *("--num_accelerators", 2, "--master_port", _free_port(), "--module", "megascale"),
    )
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    overrides = (place.output("deepspeed"), *QUIET, "parallel.zero_stage=3")
    done = runs.run("train", place.config, *overrides, launcher=launcher, PATH=search)
    assert done.code == 0, done.output
    assert "--local_rank=1" in done.output
    _same_curve(place, "deepspeed")


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# Death and resume -----------------------------------------------------------------------------


def test_a_killed_rank_ends_the_run_and_resume_leaves_no_gap(place: Workplace) -> None:
    output = place.folder / "killed"
    arguments = (
        *("train", place.config, place.output("killed"), *QUIET, "--nproc", 2),
        *("schedule.name=constant", "schedule.min_lr=0", "checkpoint.save_interval=6"),
    )
    log = place.folder / "killed.log"
    process = runs.start(*arguments, "train.max_steps=100000", log=log)
    try:
        _wait_for(lambda: (output / "checkpoints" / "step_00000012").exists(), process, log)
        ranks = psutil.Process(process.pid).children()
        assert len(ranks) == 2
        ranks[1].kill()
        killed = time.monotonic()
        code = process.wait(30)
        assert time.monotonic() - killed < 20
    finally:
        _end(process)
    assert code == 128 + signal.SIGKILL
    assert "rank 1 was ended by signal 9: SIGKILL" in log.read_text()
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != "zombie"]

    before = runs.metrics(output)
    with open(output / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 99999, "los')  # what a kill in the middle of a line leaves
    manager = CheckpointManager(str(output / "checkpoints"))
    older, newest = manager.steps()  # keep_last = 2
    shutil.rmtree(manager.path(newest))  # so that some steps have to be done again
    done = runs.run(*arguments, f"train.max_steps={newest}", "--resume")
    assert done.code == 0, done.output
    assert f"step_{older:08d} at step {older}" in done.stdout
    after = runs.metrics(output)
    assert [line["step"] for line in after] == list(range(1, newest + 1))
    assert after[:older] == before[:older]
    # the same layout does the same steps again, to the last bit
    for name in ("loss", "grad_norm", "lr", "samples_seen", "tokens_seen"):
        assert [line[name] for line in after] == [line[name] for line in before[:newest]]
    assert manager.steps() == [older, newest]


def _wait_for(ready: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + runs.TIMEOUT_S
    while not ready():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_second_run_in_the_same_folder_is_refused(place: Workplace, alone: runs.Done) -> None:
    before = runs.files(place.folder / "alone")
    message = runs.call("train", place.config, "run.seed=6").refusal()
    assert "already holds checkpoints, the newest of step 6" in message
    assert "--resume" in message
    assert runs.files(place.folder / "alone") == before


def test_resume_without_a_checkpoint_starts_anew(place: Workplace) -> None:
    overrides = (place.output("fresh"), "train.max_steps=2", *QUIET)
    done = runs.call("train", place.config, *overrides, "--resume")
    assert done.code == 0, done.output
    assert "no checkpoint" in done.stdout
    assert len(runs.metrics(place.folder / "fresh")) == 2
    again = runs.call("train", place.config, *overrides, "--resume")  # nothing is left to do
    assert again.code == 0, again.output
    assert len(runs.metrics(place.folder / "fresh")) == 2


def test_an_early_stop_ends_the_run_with_a_checkpoint(place: Workplace) -> None:
    done = runs.call(
        "train",
        place.config,
        place.output("early"),
        *QUIET,
        "evaluation.interval=1",
        "evaluation.target_loss=100.0",
    )
    assert done.code == 0, done.output
    assert "stopped at step 1: validation loss" in done.stdout
    assert len(runs.metrics(place.folder / "early")) == 1
    reader = CheckpointReader(str(place.folder / "early" / "checkpoints" / "step_00000001"))
    assert reader.damage() is None


# Using the result -----------------------------------------------------------------------------


def test_evaluate(place: Workplace, alone: runs.Done) -> None:
    checkpoint = place.folder / "alone" / "checkpoints" / "step_00000006"
    last = runs.metrics(place.folder / "alone")[-1]
    report = json.loads(runs.call("evaluate", checkpoint, "--json", "--baselines").stdout)
    assert set(report) == {
        *("checkpoint", "step", "data", "tokens", "loss", "perplexity", "bits_per_byte"),
        *("unigram_entropy", "bigram_entropy"),
    }
    assert report["step"] == 6
    assert report["loss"] == pytest.approx(last["valid_loss"], abs=1e-5)
    assert report["tokens"] == last["valid_tokens"]
    assert report["perplexity"] == pytest.approx(math.exp(report["loss"]))
    assert report["bits_per_byte"] > 0
    assert 0 < report["bigram_entropy"] < report["unigram_entropy"]

    table = dict(
        line.split(maxsplit=1) for line in runs.call("evaluate", checkpoint).stdout.splitlines()
    )
    assert float(table["loss"]) == pytest.approx(report["loss"], abs=1e-4)
    train = json.loads(runs.call("evaluate", checkpoint, "--split", "train", "--json").stdout)
    assert train["tokens"] > 3 * report["tokens"]
    whole = json.loads(runs.call("evaluate", checkpoint, "--data", place.data, "--json").stdout)
    assert whole["tokens"] == pytest.approx(train["tokens"] + report["tokens"], abs=2)


def test_generate(place: Workplace, alone: runs.Done) -> None:
    checkpoint = place.folder / "alone" / "checkpoints" / "step_00000006"

    def text(*more: object) -> str:
        done = runs.call("generate", checkpoint, "--max-new-tokens", 12, *more)
        assert done.code == 0, done.output
        return done.stdout

    first = text("--prompt", "the quick")
    assert first.startswith("the quick")
    assert len(first) > len("the quick\n")
    assert text("--prompt", "the quick") == first
    assert text("--prompt", "the quick", "--seed", 1) != first
    both = text("--prompt", "12", "--prompt", "größe", "--temperature", 0)
    assert both.startswith("12")
    assert "\ngröße" in both
    assert text("--prompt", "12", "--top-k", 1) == text("--prompt", "12", "--temperature", 0)


# Fast answers ---------------------------------------------------------------------------------

_ASK = """
import sys
from megascale.cli.main import main
for arguments in (["--version"], ["--help"], ["train", "--help"], ["evaluate", "--help"],
                  ["config", "schema"], ["train", "no_such_file.yaml", "--nproc", "2"]):
    try:
        main(arguments)
    except SystemExit:
        pass
print("SLOW", sorted({"torch", "deepspeed", "transformers", "datasets"} & set(sys.modules)))
"""


def test_help_and_refusals_come_without_importing_torch() -> None:
    done = runs.run(launcher=(sys.executable, "-c", _ASK))
    assert done.code == 0, done.output
    assert done.stdout.splitlines()[0] == __version__
    assert "SLOW []" in done.output
    for word in ("train", "evaluate", "generate", "config", "--resume", "--nproc"):
        assert word in done.stdout
    assert "no_such_file.yaml" in done.output
