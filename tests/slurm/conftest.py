"""Two clusters for all tests of this folder, repaired after each, and small runs on them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megascale.launcher.attempt import Attempt, attempts
from tests.integration.runs import ROOT, metrics, settings, write_config
from tests.slurm.cluster import Cluster, missing, wait_until

REQUIRED = "MEGASCALE_REQUIRE_SLURM"
"""Where it is set, as .ci/run does, these tests fail if there can be no cluster; else they skip."""

# Holds a run at a step until something has happened, so that faults find it at work however fast
# or slow the machine is, and plants what goes wrong in chosen processes. The product knows nothing
# of it: Python imports this module by itself when it starts.
_SITECUSTOMIZE = """
import importlib.abc, importlib.util, os, signal, sys, time

NAME = "megascale.training.trainer"
RANK = os.environ.get("SLURM_PROCID", "none")
FIRST = "SLURM_RESTART_COUNT" not in os.environ  # the job's first start
had = set()  # signals
set_handler = signal.signal


def handle(number, handler):
    def remember(*arguments):
        had.add(signal.Signals(number).name)
        return handler(*arguments)

    return set_handler(number, remember if callable(handler) else handler)


def gate(step):
    if int(RANK) != int(os.environ["SLURM_STEP_NUM_TASKS"]) - 1:
        return  # the others wait for the last rank in their collectives
    for entry in os.environ.get("TEST_GATES", "").split():
        at, what = entry.split(":")
        while int(at) == step and not (what in had or os.path.exists(what)):
            time.sleep(0.05)


def plant(step):
    if os.environ.get("TEST_RAISE") == RANK:
        raise ValueError("planted in this rank")
    if os.environ.get("TEST_HANG") == RANK and FIRST and step == 2:
        time.sleep(600)
    if os.environ.get("TEST_MEMORY") == RANK and not FIRST:
        import torch

        torch.empty(1 << 50)


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
                if RANK != "none":
                    gate(state.step)
                plant(state.step)
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
    if os.environ.get("TEST_KILL") == RANK:
        os.kill(os.getpid(), signal.SIGKILL)
    if "TEST_GATES" in os.environ:
        signal.signal = handle
    sys.meta_path.insert(0, Finder())
"""

# Runs many command lines in one process on the login node: starting Python is what costs.
_MANY = """
import contextlib, io, json, sys
from megascale.cli.main import main

told = []
for line in json.load(sys.stdin):
    out = io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main(line)
        except SystemExit as error:
            code = int(error.code or 0)
    told.append((code, out.getvalue()))
print(json.dumps(told))
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
            "parallel__collective_timeout_s": 120,
            "checkpoint__save_interval": 4,
            **changes,
        }
        if changes["parallel__tensor_parallel_size"] > 1:
            changes["parallel__tensor_parallel_across_machines"] = True
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

    def many(self, lines: Sequence[Sequence[object]]) -> list[tuple[int, str]]:
        """Several command lines, one after the other; the exit code and the words of each."""
        text = json.dumps([[str(word) for word in line] for line in lines])
        done = self.cluster.run(
            *(sys.executable, "-c", _MANY), input=text, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1"
        )
        return [(code, told) for code, told in json.loads(done.stdout)]

    def submit(
        self,
        config: Path,
        *options: object,
        gates: Mapping[int, Path | str] | None = None,
        **environment: str,
    ) -> list[str]:
        """Submit a run; the numbers of its jobs.

        Args:
            gates: after these steps the run waits until a file is there, or a signal came.
        """
        if gates:
            environment["TEST_GATES"] = " ".join(f"{at}:{what}" for at, what in gates.items())
        text = self.megascale("submit", config, *options, **environment)
        return [
            line.split()[2].rstrip(":") for line in text.splitlines() if "submitted job" in line
        ]

    def finish(self, name: str, *jobs: str) -> dict[str, str]:
        """Wait for jobs that have to end well; what scontrol says of the last one."""
        state: dict[str, str] = {}
        for job in jobs:
            state = self.cluster.wait(job)
            assert state["JobState"] == "COMPLETED", self.log(name)
        return state

    @contextmanager
    def debian_hosts(self, node: str) -> Iterator[None]:
        """Meanwhile a node's own name is a loopback address on it, as Debian's installer does."""
        hosts = self.folder / "hosts"
        hosts.write_text(f"127.0.1.1 {node}\n" + (self.cluster.folder / "hosts").read_text())
        self.cluster.run("mount", "--bind", hosts, "/etc/hosts", node=node)
        try:
            yield
        finally:
            self.cluster.run("umount", "/etc/hosts", node=node)

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

    def machines(self, name: str) -> list[list[str]]:
        """The machines of each attempt at a run."""
        begins = r"^megascale: \S+ \S+ attempt \d+ of \S+ on (\S+)$"
        return [names.split(",") for names in re.findall(begins, self.log(name), re.M)]

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


def _start(num_nodes: int, gpus: int = 0) -> Cluster:
    """A cluster, or a word why there is none: a failure where it is required, else a skip."""
    refuse = pytest.fail if os.environ.get(REQUIRED) else pytest.skip
    reason = missing()
    if reason:
        refuse(f"no Slurm cluster can be started here: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has 107 bytes
    try:
        return Cluster(folder, num_nodes, cpus=4, gpus=gpus)
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        refuse(f"the Slurm cluster did not start: {error}")
        raise


@contextmanager
def _cluster(num_nodes: int, gpus: int = 0) -> Iterator[Cluster]:
    cluster = _start(num_nodes, gpus)
    try:
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(cluster.folder, ignore_errors=True)


def _bed_on(cluster: Cluster, folder: Path, prefix: Path) -> TestBed:
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    return TestBed(cluster, folder, prefix)


@pytest.fixture(scope="session")
def _bed(tmp_path_factory: pytest.TempPathFactory, token_prefix: Path) -> Iterator[TestBed]:
    with _cluster(4, gpus=2) as cluster:
        yield _bed_on(cluster, tmp_path_factory.mktemp("bed"), token_prefix)


@pytest.fixture(scope="session")
def undisturbed(_bed: TestBed) -> list[tuple[float, ...]]:
    """The numbers of a run of two ranks on two machines that nothing happens to."""
    jobs = _bed.submit(_bed.config("undisturbed"), "--nodes", 2, "--time", 30)
    assert _bed.finish("undisturbed", *jobs)["NumNodes"] == "2"
    return _bed.numbers("undisturbed")


@pytest.fixture
def bed(_bed: TestBed) -> Iterator[TestBed]:
    """The cluster of four machines, all idle, and again so after the test."""
    yield _bed
    _bed.cluster.repair()


@pytest.fixture(scope="session")
def two_machines(
    tmp_path_factory: pytest.TempPathFactory, token_prefix: Path
) -> Iterator[tuple[TestBed, str, str]]:
    """A cluster of two machines, and the numbers of two jobs on it that take long.

    The time of one is soon over, which Slurm counts in minutes; a rank of the other hangs, and
    after that one runs out of memory. They wait while other tests run.
    """
    with _cluster(2) as cluster:
        bed = _bed_on(cluster, tmp_path_factory.mktemp("two"), token_prefix)
        options = ("--nodes", 2, "--time", 3, "--lead", 130)  # asked to save after 20 to 50 s
        gates = {3: bed.output("limit") / "STOP"}
        (limit,) = bed.submit(bed.config("limit"), *options, gates=gates)
        config = bed.config("ends", parallel__collective_timeout_s=20)
        (ends,) = bed.submit(config, "--nodes", 2, TEST_HANG="1", TEST_MEMORY="1")
        yield bed, limit, ends


@pytest.fixture(scope="session", autouse=True)
def _early(request: pytest.FixtureRequest) -> None:
    """Start what takes long before the first test, if any test needs it."""
    if any("two_machines" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("two_machines")
