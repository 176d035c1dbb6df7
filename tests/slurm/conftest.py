"""One cluster for all tests of this folder, repaired after each, and small runs on it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megascale.launcher.attempt import Attempt, attempts
from tests.integration.runs import ROOT, metrics, settings, write_config
from tests.slurm.cluster import Cluster, missing, wait_until

REQUIRED = "MEGASCALE_REQUIRE_SLURM"
"""Set it to run these tests; they fail then where there can be no cluster.

Open (issue 8): they run on request only until they pass on a calm machine within their budget; then
.ci/run sets it."""

# Slows steps down, so that faults find the run at work, and ends chosen processes. The product
# knows nothing of it: Python imports this module by itself when it starts.
_SITECUSTOMIZE = """
import importlib.abc, importlib.util, os, signal, sys, time

NAME = "megascale.training.trainer"


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
                time.sleep(float(os.environ.get("TEST_STEP_S", "0")))
                if os.environ.get("TEST_RAISE") == os.environ.get("SLURM_PROCID"):
                    raise ValueError("planted in this rank")
                return right(parts, state, *more)

            module.train_step = train_step

        spec.loader.exec_module = planted
        return spec


silent = os.environ.get("TEST_SILENT", "")
if "doctor" in sys.orig_argv and os.environ.get("SLURMD_NODENAME") == silent:
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ.get("TEST_ODD", "") == os.environ.get("SLURMD_NODENAME"):
    from importlib import metadata

    version = metadata.version
    metadata.version = lambda name: "0.1" if name == "numpy" else version(name)
if "train" in sys.orig_argv:
    if os.environ.get("TEST_KILL") == os.environ.get("SLURM_PROCID", "none"):
        os.kill(os.getpid(), signal.SIGKILL)
    sys.meta_path.insert(0, Finder())
"""


@dataclass(frozen=True)
class TestBed:
    """The cluster and what the runs on it need."""

    __test__ = False

    cluster: Cluster
    folder: Path
    prefix: Path

    def config(self, name: str, steps: int = 12, **changes: Any) -> Path:
        """A config of a run of two ranks that share every matrix."""
        changes = {
            "parallel__tensor_parallel_size": 2,
            "parallel__engine": "torch",
            "parallel__collective_timeout_s": 60,
            "checkpoint__save_interval": 4,
            **changes,
        }
        tree = settings(
            self.prefix,
            self.output(name),
            model__vocab_size=96,
            data__split=[1.0],
            train__max_steps=steps,
            **changes,
        )
        tree["schedule"]["decay_steps"] = 12
        return write_config(self.folder / f"{name}.yaml", tree)

    def output(self, name: str) -> Path:
        """run.output_dir of a run."""
        return self.folder / "runs" / name

    def megascale(self, *arguments: object, check: bool = True, **environment: str) -> str:
        """The command line on the login node; what it printed, and what it refused with."""
        path = f"{self.folder}:{ROOT}"
        done = self.cluster.run(
            *(sys.executable, "-m", "megascale", *arguments),
            check=check,
            PYTHONPATH=path,
            HF_HUB_OFFLINE="1",
            **environment,
        )
        return done.stdout + done.stderr

    def submit(self, config: Path, *options: object, **environment: str) -> list[str]:
        """Submit a run; the numbers of its jobs."""
        text = self.megascale("submit", config, *options, **environment)
        return [
            line.split()[2].rstrip(":") for line in text.splitlines() if "submitted job" in line
        ]

    def at_step(self, name: str, step: int, timeout_s: float = 240) -> None:
        """Wait until a run has done a step."""
        path = self.output(name) / "metrics.jsonl"

        def reached() -> bool:
            lines = path.read_text().splitlines() if path.exists() else []
            return bool(lines) and json.loads(lines[-1])["step"] >= step

        wait_until(reached, timeout_s, lambda: f"step {step} of {name}:\n{self.log(name)}")

    def log(self, name: str) -> str:
        """Everything that the jobs of a run printed."""
        paths = sorted((self.output(name) / "logs").glob("slurm_*.out"))
        return "\n".join(path.read_text(errors="replace") for path in paths)

    def attempts(self, name: str) -> list[Attempt]:
        """The attempts at a run."""
        return attempts(self.output(name))

    def kinds(self, name: str) -> list[str]:
        """How the attempts at a run ended; "" for one that was cut off."""
        return [attempt.end.kind if attempt.end else "" for attempt in self.attempts(name)]

    def numbers(self, name: str) -> list[tuple[float, ...]]:
        """What may not depend on faults: step, loss, gradient norm, samples, of every step."""
        names = ("step", "loss", "grad_norm", "lr", "samples_seen")
        return [tuple(line[key] for key in names) for line in metrics(self.output(name))]


@pytest.fixture(scope="session")
def _cluster() -> Iterator[Cluster]:
    reason = missing()
    if not os.environ.get(REQUIRED):
        pytest.skip(f"on request only: set {REQUIRED}=1 (root, Slurm and some minutes are needed)")
    if reason:
        pytest.fail(f"{REQUIRED} is set, and there is no cluster: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has 107 bytes
    cluster = Cluster(folder, num_nodes=4, cpus=4, gpus=2)
    yield cluster
    cluster.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def _bed(
    _cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, token_prefix: Path
) -> TestBed:
    folder = tmp_path_factory.mktemp("bed")
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    return TestBed(_cluster, folder, token_prefix)


@pytest.fixture(scope="session")
def undisturbed(_bed: TestBed) -> list[tuple[float, ...]]:
    """The numbers of a run of two ranks on two machines that nothing happens to."""
    (job,) = _bed.submit(_bed.config("undisturbed"), "--nodes", 2, "--time", 30)
    state = _bed.cluster.wait(job)
    assert state["JobState"] == "COMPLETED", _bed.log("undisturbed")
    assert state["NumNodes"] == "2"
    return _bed.numbers("undisturbed")


@pytest.fixture
def bed(_bed: TestBed) -> Iterator[TestBed]:
    """The cluster with all nodes idle, and again so after the test."""
    yield _bed
    _bed.cluster.repair()
