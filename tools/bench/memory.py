"""Memory of a rank: live bytes a parameter, and the peaks of the start and of loading.

    python -m tools.bench.memory --json docs/benchmarks/memory.json
    python -m tools.bench.memory --ranks 2 --job '{"num_layers": 4}' --stacks "ours torch,fsdp2"

Every case runs on so many processes of its own. "live" are the storages of all tensors after a
step, whatever they are for, of the rank that holds most. Peaks are the largest resident memory
while the model is built (and its checkpoint loaded), over that of the measured steps, both without
what was resident before the model: the interpreter and its libraries.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from tools.bench.job import Job, as_json, print_table, raw_of, write_table
from tools.bench.ranks import start_ranks
from tools.bench.step import allocators

# 67 M parameters; short samples: states are measured, not activations
JOB = Job(num_layers=7, hidden_size=640, num_heads=10, seq_length=128, micro_batch_size=1)
COLUMNS = ("live bytes a parameter", "start / step", "load / step", "peak of a step, MB")
# what is freed goes back: else a peak of the start stays to be seen
_FREE = {"keep_memory": "never"}
Case = dict[str, Any]


def cases() -> dict[str, tuple[str, str, Case]]:
    """Name -> (stack, module below tools.bench.peers, its variant)."""
    found: dict[str, tuple[str, str, Case]] = {}
    for engine in ("torch", "deepspeed"):
        for stage in (1, 2, 3):
            variant = {"engine": engine, "stage": stage, "passes": 1, "performance": _FREE}
            stack = f"ours {engine}"
            found[f"{stack}, stage {stage}"] = (stack, "megascale_ranks", variant)
    for stage in (1, 2, 3):
        text = {"text": f"{stage}/1"}
        found[f"deepspeed alone, stage {stage}"] = ("deepspeed", "deepspeed_ranks", text)
    found["FSDP2 loop"] = ("fsdp2", "torch_ranks", {"text": "fsdp2/1"})
    found["DDP loop"] = ("ddp", "torch_ranks", {"text": "ddp/1"})
    return found


def measure(module: str, variant: Case, job: Job, ranks: int, library: str) -> dict[str, float]:
    """Bytes of a parameter and ratios of peaks of one case."""
    if "text" in variant:
        return _ratios(start_ranks(module, job, variant["text"], ranks, library), job)
    with tempfile.TemporaryDirectory(prefix="megascale-bench-") as folder:
        text = json.dumps({**variant, "checkpoint": folder})
        found = _ratios(start_ranks(module, job, text, ranks, library), job)
        loaded = _ratios(start_ranks(module, job, text, ranks, library), job)
    return {**found, "load": loaded["start"]}


def _ratios(rows: list[dict[str, Any]], job: Job) -> dict[str, float]:
    largest = max(row["live_bytes"] for row in rows)
    grown = [(r["start_mb"] - r["before_mb"]) / (r["steady_mb"] - r["before_mb"]) for r in rows]
    return {
        "live": largest / job.parameters,
        "start": max(grown),
        "steady_mb": max(row["steady_mb"] - row["before_mb"] for row in rows),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", default="{}", help="fields of tools.bench.job.Job as JSON")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--stacks", default="ours torch,ours deepspeed,deepspeed,fsdp2,ddp")
    parser.add_argument("--allocator", default="default", choices=list(allocators()))
    parser.add_argument("--json", type=Path, help="write the results here, too")
    parser.add_argument("--more", action="store_true", help="add to the cases of the JSON file")
    arguments = parser.parse_args()
    job = replace(JOB, **json.loads(arguments.job))
    wanted = arguments.stacks.split(",")
    raw = raw_of(arguments.json).get("cases", {}) if arguments.more else {}
    for name, (stack, module, variant) in cases().items():
        if stack not in wanted:
            continue
        try:
            library = allocators()[arguments.allocator]
            raw[name] = measure(module, variant, job, arguments.ranks, library)
        except RuntimeError as error:
            print(f"left out: {name}: {error}", file=sys.stderr)
            continue
        print(f"{name}: {raw[name]}", file=sys.stderr)
    rows = [(name, _cells(row)) for name, row in raw.items()]
    print_table(COLUMNS, rows)
    if arguments.json:
        note = (
            f"{job.parameters / 1e6:.0f} million parameters, {job.dtype}, AdamW, "
            f"{arguments.ranks} ranks, {job.micro_batch_size} x {job.seq_length} tokens a rank; "
            f"allocator: {arguments.allocator}; the largest of the ranks."
        )
        content = {"job": json.loads(as_json(job)), "cases": raw}
        write_table(arguments.json, "Memory of a rank", note, COLUMNS, rows, content)


def _cells(row: dict[str, float]) -> list[str]:
    load = f"{row['load']:.2f}" if "load" in row else ""
    return [f"{row['live']:.2f}", f"{row['start']:.2f}", load, f"{row['steady_mb']:,.0f}"]


if __name__ == "__main__":
    main()
