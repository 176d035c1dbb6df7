"""Two ranks against one on the same global batch: how much faster, and with how much CPU.

    python -m tools.bench.scaling --json docs/benchmarks/scaling.json
    python -m tools.bench.scaling --rounds 1 --json docs/benchmarks/scaling.json --more

A rank has one thread. One rank does the global batch in as many more micro-batches, so the work is
the same. Rounds are interleaved; `--more` adds rounds to those that the JSON file has. The share is
CPU time over wall time of the ranks: below 1 a rank waited, for its peer or for a busy machine. If
none had waited, two ranks would be faster by the ratio of a rank's CPU times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tools.bench.job import Job, as_json, print_table, raw_of, write_table
from tools.bench.ranks import start_ranks
from tools.bench.step import allocators

JOB = Job(warmup=1, steps=3)
COLUMNS = (
    *("1 rank, s", "2 ranks, s", "faster", "share of 1", "share of 2"),
    *("faster if no rank waited", "rounds"),
)
SIZES = (1, 2)
# stack -> (module below tools.bench.peers, variant without its passes)
STACKS: dict[str, tuple[str, Any]] = {
    **{
        f"ours {engine}, stage {stage}": ("megascale_ranks", {"engine": engine, "stage": stage})
        for engine in ("torch", "deepspeed")
        for stage in (1, 3)
    },
    "ours torch, stage 0": ("megascale_ranks", {"engine": "torch", "stage": 0}),
    "DDP loop": ("torch_ranks", "ddp"),
    "FSDP2 loop": ("torch_ranks", "fsdp2"),
    "DeepSpeed alone, stage 1": ("deepspeed_ranks", "1"),
    "DeepSpeed alone, stage 3": ("deepspeed_ranks", "3"),
}


def measure(stack: str, job: Job, ranks: int, library: str) -> dict[str, float]:
    """Seconds of a step, and the share of their CPUs that the ranks used."""
    module, variant = STACKS[stack]
    passes = SIZES[-1] // ranks
    text = f"{variant}/{passes}"
    if isinstance(variant, dict):
        text = json.dumps({**variant, "passes": passes})
    rows = start_ranks(module, job, text, ranks, library)
    return {
        "step_s": max(row["step_s"] for row in rows),
        "share": statistics.mean(row["cpu_share"] for row in rows),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", default="{}", help="fields of tools.bench.job.Job as JSON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stacks", help=f"some of, by semicolons: {', '.join(STACKS)}")
    parser.add_argument("--allocator", default="default", choices=list(allocators()))
    parser.add_argument("--json", type=Path, help="write the results here, too")
    parser.add_argument("--more", action="store_true", help="add to the rounds of the JSON file")
    arguments = parser.parse_args()
    job = replace(JOB, **json.loads(arguments.job))
    chosen = arguments.stacks.split(";") if arguments.stacks else list(STACKS)
    raw: dict[str, list[list[dict[str, float]]]] = {}
    if arguments.more:
        raw = raw_of(arguments.json).get("rounds", {})
    for _ in range(arguments.rounds):
        for stack in chosen:
            library = allocators()[arguments.allocator]
            try:
                found = [measure(stack, job, ranks, library) for ranks in SIZES]
            except RuntimeError as error:
                print(f"left out: {stack}: {error}", file=sys.stderr)
                continue
            raw.setdefault(stack, []).append(found)
            print(f"{stack}: {found}", file=sys.stderr)
    rows = [(stack, _cells(rounds)) for stack, rounds in raw.items()]
    print_table(COLUMNS, rows)
    if arguments.json:
        note = (
            f"{job.parameters / 1e6:.0f} million parameters, {job.dtype}, a global batch of "
            f"{SIZES[-1] * job.micro_batch_size} samples of {job.seq_length} tokens, one thread a "
            f"rank; allocator: {arguments.allocator}; medians."
        )
        content = {"job": json.loads(as_json(job)), "rounds": raw}
        write_table(arguments.json, "Two ranks against one", note, COLUMNS, rows, content)


def _cells(rounds: list[list[dict[str, float]]]) -> list[str]:
    one, two = (
        {key: statistics.median(row[size][key] for row in rounds) for key in ("step_s", "share")}
        for size in (0, 1)
    )
    faster = statistics.median(row[0]["step_s"] / row[1]["step_s"] for row in rounds)
    at_best = statistics.median(
        row[0]["step_s"] * row[0]["share"] / (row[1]["step_s"] * row[1]["share"]) for row in rounds
    )
    return [
        f"{one['step_s']:.2f}",
        f"{two['step_s']:.2f}",
        f"{faster:.2f}x",
        f"{one['share']:.2f}",
        f"{two['share']:.2f}",
        f"{at_best:.2f}x",
        str(len(rounds)),
    ]


if __name__ == "__main__":
    main()
