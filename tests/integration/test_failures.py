"""A rank that fails ends the others within seconds, and its error is what the user sees first.

The faults are planted from outside: a `sitecustomize` module in front of PYTHONPATH wraps the
train step of one rank when it is imported. The product knows nothing of it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.runs import ROOT, Done, run, settings, write_config

Record = Callable[[str, object], None]

BOUND_S = 25.0
"""Longest time from the fault to the end of all ranks (the launcher polls, warns, then kills): some
4 s on an idle machine, against half an hour of torch's own; a busy machine takes its time."""

SITECUSTOMIZE = """
import importlib.abc, importlib.util, os, signal, sys, time

NAME = "megascale.training.step"


def fault(parts):
    open(os.environ["FAULT_FOLDER"] + "/when", "w").write(str(time.time()))
    kind = os.environ["FAULT"]
    if kind == "raise":
        raise ValueError("planted in this rank")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "nan":
        for parameter in parts.engine.module.parameters():
            parameter.data.fill_(float("nan"))
    if kind == "hang":
        while True:
            time.sleep(0.1)
    if kind == "leave":
        os._exit(0)


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def planted(module):
            execute(module)
            right = module.train_step

            def train_step(parts, state, *more):
                # ranks are forked from the process that imports
                if state.step == 1 and os.environ.get("RANK") == os.environ["FAULT_RANK"]:
                    fault(parts)
                return right(parts, state, *more)

            module.train_step = train_step

        spec.loader.exec_module = planted
        return spec


sys.meta_path.insert(0, Finder())
"""


def _train(
    prefix: Path, folder: Path, fault: str, rank: int, *options: str, torchrun: bool = False
) -> tuple[Done, float]:
    """Train on two ranks of which one fails in the second step; seconds from there to the end."""
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    tree = settings(prefix, folder / "run", model__vocab_size=96, data__split=[1.0])
    config = write_config(folder / "config.yaml", tree)
    environment = {
        "FAULT": fault,
        "FAULT_RANK": str(rank),
        "FAULT_FOLDER": str(folder),
        "PYTHONPATH": f"{folder}:{ROOT}",
    }
    launcher = [sys.executable, "-m"]
    if torchrun:
        launcher += ["torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        done = run(
            "train", config, *options, launcher=[*launcher, "-m", "megascale"], **environment
        )
    else:
        launcher += ["megascale"]
        done = run("train", config, "--nproc", "2", *options, launcher=launcher, **environment)
    return done, time.time() - float((folder / "when").read_text())


@pytest.mark.parametrize(
    ("fault", "rank", "code", "top"),
    [
        ("raise", 1, 1, "rank 1 failed: ValueError: planted in this rank"),
        ("kill", 1, 128 + 9, "rank 1 was ended by signal 9: SIGKILL"),
        ("nan", 1, 2, "rank 1 failed: the loss of step 2 is nan, from this rank's samples"),
        ("leave", 0, 1, "rank 0 ended while other ranks waited for it"),
    ],
)
def test_a_fault_ends_the_run(
    token_prefix: Path,
    tmp_path: Path,
    record_property: Record,
    fault: str,
    rank: int,
    code: int,
    top: str,
) -> None:
    done, seconds = _train(token_prefix, tmp_path, fault, rank)
    record_property("seconds to the end", seconds)
    assert done.code == code, done.output
    errors = done.output.removeprefix(done.stdout).splitlines()
    # a user's mistake is told in three lines, by every rank that made it
    head = errors[: 4 if fault == "nan" else 1]
    assert any(line.startswith(top) for line in head), done.output
    assert seconds < BOUND_S


def test_a_peer_that_never_comes(
    token_prefix: Path, tmp_path: Path, record_property: Record
) -> None:
    """After the longest wait of a collective the run ends and shows where the other rank is."""
    done, seconds = _train(token_prefix, tmp_path, "hang", 1, "parallel.collective_timeout_s=3")
    record_property("seconds to the end", seconds)
    assert done.code == 1, done.output
    assert "rank 1 did not answer and was ended" in done.output
    assert "in fault" in done.output  # the hanging rank's stack
    assert 3 <= seconds < 3 + BOUND_S


def test_under_torchrun(token_prefix: Path, tmp_path: Path, record_property: Record) -> None:
    done, seconds = _train(token_prefix, tmp_path, "raise", 1, torchrun=True)
    record_property("seconds to the end", seconds)
    assert done.code == 1, done.output
    assert "the first failure was that of rank 1: ValueError: planted in this rank" in done.output
    root = done.output[done.output.index("Root Cause") :]
    assert "rank      : 1" in root
    assert "planted in this rank" in root
    assert seconds < BOUND_S


def test_verify_layout_names_the_rank(token_prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    tree = settings(token_prefix, tmp_path / "run", model__vocab_size=96, data__split=[1.0])
    config = write_config(tmp_path / "config.yaml", tree)
    arguments = ("verify", "layout", config, "--layouts", "dp=2", "--steps", "2", "--json")
    done = run(
        *arguments,
        FAULT="raise",
        FAULT_RANK="1",
        FAULT_FOLDER=str(tmp_path),
        PYTHONPATH=f"{tmp_path}:{ROOT}",
    )
    assert done.code == 1, done.output
    (row,) = json.loads(done.stdout)
    assert row["failure"] == "rank 1: ValueError: planted in this rank"
    assert not row["agrees"]
