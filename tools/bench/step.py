"""Speed and memory of a training step beside other stacks, on the same job.

    python -m tools.bench.step                                   the peers that are installed
    python -m tools.bench.step --job '{"hidden_size": 512}' --rounds 5 --json step.json
    python -m tools.bench.step --stacks ours,hf --allocators default

Each round starts every stack once, one after the other, in a process of its own; the medians of
the rounds are compared, within one allocator only. tcmalloc is used where it is installed (Debian:
libtcmalloc-minimal4), by LD_PRELOAD, for all stacks alike.
"""

from __future__ import annotations

import argparse
import ctypes.util
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tools.bench.job import Job, as_json, machine, matmul_peak

ROOT = Path(__file__).resolve().parents[2]
OURS = "ours"

# name -> (module below tools.bench.peers, variant, package it needs)
STACKS = {
    OURS: ("megascale_step", "", "megascale"),
    "ours plain": ("megascale_step", "plain", "megascale"),
    "ours zero1": ("megascale_step", "zero1", "megascale"),
    "hf": ("hf_trainer", "", "accelerate"),
    "hf compiled": ("hf_trainer", "compile", "accelerate"),
    "loop": ("plain_loop", "", "torch"),
    "loop compiled": ("plain_loop", "compile", "torch"),
    "megatron": ("megatron_core", "", "megatron"),
    "deepspeed": ("deepspeed_engine", "", "deepspeed"),
    "litgpt": ("litgpt_fit", "", "litgpt"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Result = dict[str, Any]


def allocators() -> dict[str, str]:
    """Name -> library to preload."""
    found = ctypes.util.find_library("tcmalloc_minimal")
    return {"default": "", **({"tcmalloc": found} if found else {})}


def measure(stack: str, job: Job, library: str, timeout_s: float = 1200) -> Result:
    """Run one stack once.

    Raises:
        RuntimeError: it did not print its line; with the end of what it said.
    """
    module, variant, _ = STACKS[stack]
    command = [sys.executable, "-m", f"tools.bench.peers.{module}", "--job", as_json(job)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(job.threads))
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--variant", variant],
        cwd=ROOT,
        env={**os.environ, **threads, **quiet, "LD_PRELOAD": library},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"{stack}: code {done.returncode}\n{done.stderr[-1500:]}")
    return json.loads(lines[-1])


def measure_all(
    stacks: Sequence[str], job: Job, libraries: dict[str, str], rounds: int
) -> tuple[dict[str, dict[str, list[Result]]], float]:
    """Allocator -> stack -> results of the rounds; a stack that fails is left out, and said so.

    Also the matmul peak, the median of the rounds: a machine that others use has another one in
    every minute.
    """
    results: dict[str, dict[str, list[Result]]] = {name: {} for name in libraries}
    failed: set[str] = set()
    peaks = []
    for number in range(rounds):
        peaks.append(matmul_peak(DTYPES[job.dtype], job.threads))
        print(f"round {number + 1}: matmul peak {peaks[-1] / 1e9:.0f}", file=sys.stderr)
        for allocator, library in libraries.items():
            for stack in stacks:
                if stack in failed:
                    continue
                try:
                    found = measure(stack, job, library)
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    print(f"left out: {error}", file=sys.stderr)
                    failed.add(stack)
                    continue
                results[allocator].setdefault(stack, []).append(found)
                speed = found["tokens_per_cpu_s"]
                print(f"round {number + 1} {allocator:8} {stack:20} {speed:8.0f}", file=sys.stderr)
    return results, statistics.median(peaks)


def summary(results: dict[str, list[Result]], job: Job, peak: float) -> list[Result]:
    """One row a stack: medians, and ours divided by it."""
    medians = {
        stack: {
            key: statistics.median(row[key] for row in rows)
            for key in ("tokens_per_cpu_s", "peak_mb", "cpu_share", "first_step_s")
        }
        for stack, rows in results.items()
    }
    ours = medians.get(OURS, {})
    table = []
    for stack, row in medians.items():
        speeds = [found["tokens_per_cpu_s"] for found in results[stack]]
        table.append(
            {
                "stack": stack,
                **row,
                "slowest": min(speeds),
                "fastest": max(speeds),
                "rounds": len(speeds),
                "mfu": row["tokens_per_cpu_s"] * job.flops_per_token / peak,
                "speed_of_ours": ours["tokens_per_cpu_s"] / row["tokens_per_cpu_s"]
                if ours
                else None,
                "memory_of_ours": ours["peak_mb"] / row["peak_mb"] if ours else None,
                "last_loss": results[stack][-1]["losses"][-1],
            }
        )
    return table


def show(table: Sequence[Result], allocator: str) -> None:
    """Print the rows."""
    print(f"\nallocator: {allocator} (on every stack)")
    header = ("tokens/CPU-s", "range", "MFU", "peak MB", "CPU share", "ours x", "memory x")
    print(f"{'stack':22}" + "".join(f"{name:>15}" for name in header))
    for row in table:
        cells = (
            f"{row['tokens_per_cpu_s']:.0f}",
            f"{row['slowest']:.0f}-{row['fastest']:.0f}",
            f"{row['mfu']:.2f}",
            f"{row['peak_mb']:.0f}",
            f"{row['cpu_share']:.2f}",
            f"{row['speed_of_ours']:.2f}" if row["speed_of_ours"] else "",
            f"{row['memory_of_ours']:.2f}" if row["memory_of_ours"] else "",
        )
        print(f"{row['stack']:22}" + "".join(f"{cell:>15}" for cell in cells))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", default="{}", help="fields of tools.bench.job.Job as JSON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stacks", help=f"some of: {', '.join(STACKS)}")
    parser.add_argument("--allocators", default="default,tcmalloc")
    parser.add_argument("--title", default="A training step", help="in docs/benchmarks.md")
    parser.add_argument("--json", type=Path, help="write the results here, too")
    arguments = parser.parse_args()
    job = replace(Job(), **json.loads(arguments.job))
    chosen = arguments.stacks.split(",") if arguments.stacks else list(STACKS)
    stacks = [s for s in chosen if importlib.util.find_spec(STACKS[s][2]) is not None]
    missing = [s for s in chosen if s not in stacks]
    if missing:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
    wanted = arguments.allocators.split(",")
    libraries = {name: path for name, path in allocators().items() if name in wanted}
    print(f"job {as_json(job)}")
    results, peak = measure_all(stacks, job, libraries, arguments.rounds)
    print(f"matmul peak {peak / 1e9:.0f} GFLOP per CPU-second")
    tables = {name: summary(found, job, peak) for name, found in results.items() if found}
    for allocator, table in tables.items():
        show(table, allocator)
    if arguments.json:
        content = {
            "title": arguments.title,
            "machine": machine(),
            "job": json.loads(as_json(job)),
            "matmul_peak": peak,
            "tables": tables,
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
