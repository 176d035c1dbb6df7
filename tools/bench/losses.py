"""The losses of a whole run, with every optimisation and with none: is the fast path the same?

    python -m tools.bench.losses --json docs/benchmarks/losses.json
    python -m tools.bench.losses --steps 20 --models bert

A small GPT and a small BERT train on the words of docs/ in one process on the CPU, fast (head and
loss fused, attention by blocks, everything compiled, one-pass optimizer, the token table's gradient
in place) and plain (none of these; ZeRO-1, where autograd makes the token table's gradient). The
BERT has dropout, whose attention is by blocks in both. Code 1: in fp32 a loss differs by more than
1e-5, or in bf16 losses differ by as much as those of a plain run from other initial weights do (at
most, or on average).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megascale.cli.config import all_checks
from megascale.config.load import load_config
from tools.bench.job import Job, as_json, print_table, write_table
from tools.bench.peers.megascale_step import VARIANTS, config_of, open_step
from tools.bench.report import PAGE


@functools.cache
def text(ids: int) -> torch.Tensor:
    """The words of docs/ by how common they are; what has no id below `ids` is `ids`."""
    pages = [path for path in sorted(PAGE.parent.glob("*.md")) if path != PAGE]  # not its result
    words = [w for page in pages for w in re.findall(r"\w+|\s+|[^\w\s]", page.read_text())]
    numbers = {word: i for i, (word, _) in enumerate(Counter(words).most_common(ids))}
    return torch.tensor([numbers.get(word, ids) for word in words])


class TextJob(Job):
    """A job on text, in which there is context to learn."""

    def batch(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Job.batch`; after the last word comes the first."""
        words = text(self.vocab_size - 2)  # the last id is a BERT's mask
        size = self.micro_batch_size * (self.seq_length + 1)
        places = torch.arange(index * size, (index + 1) * size) % len(words)
        rows = words[places].view(self.micro_batch_size, -1)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


JOB = TextJob(
    num_layers=4, hidden_size=128, num_heads=4, vocab_size=4096, seq_length=256, micro_batch_size=2
)
DROPOUT = {"gpt": 0.0, "bert": 0.1}
EPS = 1e-6  # of Adam: at 1e-8 rounding decides some updates, see docs/numerics.md
FP32_LIMIT = 1e-5
FAST, PLAIN, OTHER = "fast", "plain", "plain, other weights"
# run -> (settings, seed of the initial weights; the order of the data is the same)
ON = {
    "performance": {
        "fused_loss": "always",
        "attention": "blockwise",
        "fused_optimizer": "always",
        "compiled_kernels": "always",
    }
}
OFF = {**VARIANTS["plain"], **VARIANTS["zero1"]}
RUNS: dict[str, tuple[dict[str, Any], int]] = {FAST: (ON, 0), PLAIN: (OFF, 0), OTHER: (OFF, 1)}
COLUMNS = ("fast against plain", "two seeds", "first loss", "last loss")
Curves = Mapping[str, Sequence[float]]
"""Run -> losses of its steps."""


def train(job: Job, settings: Mapping[str, Any], seed: int) -> list[float]:
    """The losses of a run; the default process group must be initialised."""
    with tempfile.TemporaryDirectory(prefix="megascale-bench-") as folder:
        tree = {**config_of(job, "", Path(folder)), **settings}
        tree["optimizer"]["eps"] = EPS
        config = load_config(tree, checks=all_checks(), world_size=1)
        other = config.run.model_copy(update={"seed": config.run.seed + seed})
        weights_of = config.model_copy(update={"run": other})
        with open_step(config, job, weights_of) as step:
            return [step(index) for index in range(job.steps)]


def differences(found: Sequence[float], expected: Sequence[float]) -> list[float]:
    """Relative differences of the losses."""
    return [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]


def failure(dtype: str, curves: Curves) -> str | None:
    """Why the fast path is not the plain one; None if it is."""
    for run, losses in curves.items():
        for step, loss in enumerate(losses, start=1):
            if not math.isfinite(loss):
                return f"{run}: the loss of step {step} is {loss}"
    difference = max(differences(curves[FAST], curves[PLAIN]))
    if dtype == "fp32":
        over = difference > FP32_LIMIT
        return f"fast and plain differ by {difference:.1e} > {FP32_LIMIT:.0e}" if over else None
    # single steps stand out in bf16: their mean says more than the largest
    for measure in (max, statistics.mean):
        found, spread = (measure(differences(curves[r], curves[PLAIN])) for r in (FAST, OTHER))
        if found >= spread:
            return f"fast and plain differ by {found:.1e}, two seeds only by {spread:.1e}"
    return None


def cells(curves: Curves) -> list[str]:
    """A row of the table."""
    fast, plain = curves[FAST], curves[PLAIN]
    found = [differences(run, plain) for run in (fast, curves[OTHER])]
    shown = [f"{max(d):.1e} ({statistics.mean(d):.1e})" for d in found]
    return [*shown, f"{fast[0]:.4f}", f"{fast[-1]:.4f}"]


def main() -> None:
    """Train, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--models", nargs="+", choices=list(DROPOUT), default=list(DROPOUT))
    parser.add_argument("--json", type=Path, help="write the results here, too")
    arguments = parser.parse_args()
    torch.set_num_threads(JOB.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rows, raw, failures = [], {}, []
    for model in arguments.models:
        for dtype in ("fp32", "bf16"):
            name, rate = f"{model}, {dtype}", DROPOUT[model]
            job = replace(JOB, model=model, dtype=dtype, dropout=rate, steps=arguments.steps)
            curves = {run: train(job, *how) for run, how in RUNS.items()}
            rows.append((name, cells(curves)))
            raw[name] = {run: losses[::10] for run, losses in curves.items()}
            print(f"{name}: {rows[-1][1]}", file=sys.stderr)
            if why := failure(dtype, curves):
                failures.append(f"{name}: {why}")
    dist.destroy_process_group()
    print_table(COLUMNS, rows)
    if arguments.json:
        note = (
            f"Largest (mean) relative difference of a loss in {arguments.steps} steps; about "
            f"{JOB.parameters / 1e6:.1f} million parameters, {JOB.micro_batch_size} x "
            f"{JOB.seq_length} tokens a step, AdamW with eps {EPS:.0e}, dropout "
            f"{DROPOUT['bert']} in the BERT, one process."
        )
        content = {"job": json.loads(as_json(JOB)), "every tenth loss": raw}
        write_table(arguments.json, "Fast and plain losses", note, COLUMNS, rows, content)
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
