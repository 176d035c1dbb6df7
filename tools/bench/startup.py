"""From the command to the end of the first step: wall and CPU seconds, on several ranks.

    python -m tools.bench.startup --json docs/benchmarks/startup.json
    python -m tools.bench.startup --ranks 4 --rounds 5 --stacks ours,loop

A tiny model, so that what is measured is starting: processes, imports, meeting, building. Each
stack starts in its own way: ours with `megascale train --nproc`, the bare loop and DeepSpeed's
engine as one process a rank (torchrun would come on top). CPU seconds are of all processes. The
first round warms the caches of files and bytecode and is left out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from tools.bench.job import Job, print_table, write_table
from tools.bench.peers.megascale_step import config_of
from tools.bench.ranks import ROOT, start_ranks
from tools.bench.step import allocators

JOB = Job(
    num_layers=2,
    hidden_size=64,
    num_heads=2,
    vocab_size=1024,
    seq_length=64,
    micro_batch_size=2,
    dtype="fp32",
    warmup=0,
    steps=1,
)
COLUMNS = ("wall s", "CPU s", "share of the CPUs", "rounds")
# name -> (stack, how: settings of ours, or module and variant)
CASES: dict[str, tuple[str, tuple[str, str] | dict[str, Any]]] = {
    "megascale train, torch, ZeRO-1": ("ours", {"engine": "torch", "zero_stage": 1}),
    "megascale train, deepspeed, ZeRO-1": ("ours", {"engine": "deepspeed", "zero_stage": 1}),
    "bare loop, DDP": ("loop", ("torch_ranks", "ddp/1")),
    "bare loop, FSDP2": ("loop", ("torch_ranks", "fsdp2/1")),
    "DeepSpeed's engine, stage 1": ("deepspeed", ("deepspeed_ranks", "1/1")),
}


def measure(how: tuple[str, str] | dict[str, Any], ranks: int, library: str) -> tuple[float, float]:
    """(wall, CPU) seconds of one start."""
    if isinstance(how, tuple):
        begun, before = time.perf_counter(), _children_s()
        start_ranks(how[0], JOB, how[1], ranks, library)
        return time.perf_counter() - begun, _children_s() - before
    with tempfile.TemporaryDirectory(prefix="megascale-bench-") as folder:
        tree = config_of(replace(JOB, steps=8 * ranks), "", Path(folder))
        tree["train"].update(max_steps=1, global_batch_size=JOB.micro_batch_size * ranks)
        tree["parallel"] = how
        (Path(folder) / "config.yaml").write_text(yaml.safe_dump(tree))
        command = [sys.executable, "-m", "megascale", "train", f"{folder}/config.yaml"]
        begun = time.perf_counter()
        run = subprocess.Popen(
            [*command, "--nproc", str(ranks)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "LD_PRELOAD": library},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert run.stdout is not None
        found = None
        for line in run.stdout:
            if line.startswith("step "):
                found = time.perf_counter() - begun, _tree_s(run.pid)
        if run.wait() or found is None:
            raise RuntimeError(f"{command} ended with code {run.returncode}")
        return found


def _children_s() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _tree_s(pid: int) -> float:
    """CPU seconds of a process and its descendants so far."""
    root = psutil.Process(pid)
    times = [one.cpu_times() for one in (root, *root.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stacks", default="ours,loop,deepspeed")
    parser.add_argument("--allocator", default="default", choices=list(allocators()))
    parser.add_argument("--json", type=Path, help="write the results here, too")
    arguments = parser.parse_args()
    chosen = {
        name: how for name, (stack, how) in CASES.items() if stack in arguments.stacks.split(",")
    }
    raw: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    for number in range(arguments.rounds + 1):
        for name, how in chosen.items():
            found = measure(how, arguments.ranks, allocators()[arguments.allocator])
            print(f"round {number} {name}: {found[0]:.2f} s, {found[1]:.2f} CPU-s", file=sys.stderr)
            if number:
                raw[name].append(found)
    rows = [(name, _cells(times)) for name, times in raw.items()]
    print_table(COLUMNS, rows)
    if arguments.json:
        note = (
            f"{arguments.ranks} ranks, a model of {JOB.parameters:,} parameters, {JOB.dtype}, "
            f"warm caches, one thread a rank; allocator: {arguments.allocator}; medians."
        )
        title = f"From the command to the first step, {arguments.ranks} ranks"
        write_table(arguments.json, title, note, COLUMNS, rows, raw)


def _cells(times: list[tuple[float, float]]) -> list[str]:
    walls, cpus = ([row[part] for row in times] for part in (0, 1))
    wall, cpu = statistics.median(walls), statistics.median(cpus)
    spread = f"{wall:.1f} ({min(walls):.1f} to {max(walls):.1f})"
    share = statistics.median(c / w for w, c in times) / (os.cpu_count() or 1)
    return [spread, f"{cpu:.1f}", f"{share:.2f}", str(len(times))]


if __name__ == "__main__":
    main()
