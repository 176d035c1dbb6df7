"""One training job for every stack, and the meter that each runs it under.

Speed is tokens per CPU-second of the process (user and system): a busy machine takes the wall
clock away, the work stays the same. Only the step is measured: forward, loss, backward, clipping,
update and reading the loss, as any training loop does it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Job:
    """A model and its batches; GPT-2's or BERT's architecture with tied embeddings.

    Attributes:
        dropout: of embeddings, attention probabilities and what each block adds.
        model: gpt, or bert, with the masked-LM objective alone.
        vocab_size: of the model; token ids are below `vocab_size` - 47, as 50,257 of 50,304.
        dtype: fp32 or bf16, as each stack means it (autocast, or bf16 weights with fp32 masters).
        warmup, steps: steps that are not measured, and those that are.
    """

    model: str = "gpt"
    num_layers: int = 6
    hidden_size: int = 384
    num_heads: int = 6
    vocab_size: int = 50304
    seq_length: int = 512
    micro_batch_size: int = 4
    dropout: float = 0.0
    dtype: str = "bf16"
    threads: int = 1
    warmup: int = 2
    steps: int = 3
    lr: float = 3e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0

    @property
    def parameters(self) -> int:
        """Of the model: biases and norms too."""
        size = self.hidden_size
        layers = self.num_layers * (12 * size**2 + 13 * size)
        return (self.vocab_size + self.seq_length) * size + layers + 2 * size

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.micro_batch_size * self.seq_length

    @property
    def flops_per_token(self) -> float:
        """Forward and backward as PaLM counts them (arXiv:2204.02311, appendix B); of a BERT the
        head is counted for the masked tokens only."""
        seen = MASKED if self.model == "bert" else 1.0
        head = self.vocab_size * self.hidden_size
        matrices = self.num_layers * 12 * self.hidden_size**2 + seen * head
        return 6 * matrices + 12 * self.num_layers * self.seq_length * self.hidden_size

    def batch(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (micro_batch_size, seq_length) of a step; word counts fall as
        Zipf's law has them."""
        generator = np.random.default_rng(1000 + index)
        ids = self.vocab_size - 47
        weights = 1.0 / np.arange(1, ids + 1)
        size = (self.micro_batch_size, self.seq_length + 1)
        drawn = torch.from_numpy(generator.choice(ids, size=size, p=weights / weights.sum()))
        return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()

    def masked_batch(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels of a step of a BERT: at 15 % of the places the last id stands instead
        of the token, which is the label there; elsewhere it is -100."""
        tokens, _ = self.batch(index)
        generator = torch.Generator().manual_seed(index)
        chosen = torch.rand(tokens.shape, generator=generator) < MASKED
        return tokens.masked_fill(chosen, self.vocab_size - 1), tokens.masked_fill(~chosen, -100)


MASKED = 0.15
"""Share of a BERT's tokens that are predicted."""


def job_of_command_line() -> tuple[Job, argparse.Namespace]:
    """The job that `step.py` hands to a peer, and the peer's own choices."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", default="{}", help="fields of Job as JSON")
    parser.add_argument("--variant", default="", help="of the peer: e.g. compile")
    arguments = parser.parse_args()
    fields = json.loads(arguments.job)
    if "betas" in fields:
        fields["betas"] = tuple(fields["betas"])
    job = Job(**fields)
    torch.set_num_threads(job.threads)
    return job, arguments


class Meter:
    """CPU and wall time of steps."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._cpu: list[float] = []
        self._wall: list[float] = []
        self._losses: list[float] = []
        self._begun = (0.0, 0.0)

    def begin(self) -> None:
        """Before a step."""
        self._begun = (time.process_time(), time.perf_counter())

    def end(self, loss: float) -> None:
        """After a step whose loss was read."""
        self._cpu.append(time.process_time() - self._begun[0])
        self._wall.append(time.perf_counter() - self._begun[1])
        self._losses.append(loss)

    def set_loss(self, step: int, loss: float) -> None:
        """The loss of a step (from 0) of a stack that tells it later."""
        self._losses[step] = loss

    def report(self, **more: Any) -> None:
        """Print the measurement as one JSON line, with `more` that a peer knows."""
        cpu, wall = self._cpu[self._job.warmup :], self._wall[self._job.warmup :]
        result = {
            "tokens_per_cpu_s": self._job.tokens / statistics.median(cpu),
            "cpu_share": sum(cpu) / sum(wall) / self._job.threads,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "first_step_s": self._wall[0],
            "step_s": statistics.median(wall),
            "losses": self._losses,
            **more,
        }
        print(json.dumps(result), flush=True)


def run(job: Job, step: Callable[[torch.Tensor, torch.Tensor], float]) -> None:
    """Run a stack's step on every batch of the job and report."""
    meter = Meter(job)
    for index in range(job.warmup + job.steps):
        inputs, targets = job.batch(index)
        meter.begin()
        meter.end(step(inputs, targets))
    meter.report()


def as_json(job: Job) -> str:
    """For `--job`."""
    return json.dumps(asdict(job))


def matmul_peak(dtype: torch.dtype, threads: int) -> float:
    """FLOP per CPU-second of the best matrix product found: what an MFU of 1 means here."""
    torch.set_num_threads(threads)
    best = 0.0
    for rows, inner, columns in ((2048, 1024, 2048), (2048, 2048, 2048), (1024, 4096, 1024)):
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
        for _ in range(5):
            begun = time.process_time()
            a @ b
            best = max(best, 2.0 * rows * inner * columns / (time.process_time() - begun))
    return best


def machine() -> dict[str, str]:
    """What a figure was measured on."""
    names = ("torch", "transformers", "accelerate", "deepspeed", "megatron-core", "litgpt")
    versions = []
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    model = cpus[0].partition(":")[2].strip() if cpus else platform.processor()
    return {
        "cpu": f"{model}, {os.cpu_count()} cores",
        "versions": ", ".join(versions),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "load": f"{os.getloadavg()[1]:.1f} on average over 5 minutes at the end",
    }


Table = Sequence[tuple[str, Sequence[str]]]
"""Rows: what was measured, and a cell for each column."""


def print_table(columns: Sequence[str], rows: Table) -> None:
    """Print rows under their columns."""
    widths = [
        max(map(len, cells)) + 2 for cells in zip(columns, *(c for _, c in rows), strict=True)
    ]
    first = max(len(name) for name, _ in rows) + 2
    print(" " * first + "".join(map(str.rjust, columns, widths)))
    for name, cells in rows:
        print(name.ljust(first) + "".join(map(str.rjust, cells, widths)))


def raw_of(path: Path | None) -> dict[str, Any]:
    """The measurements in a file of `write_table`; {} without one."""
    if path is None or not path.exists():
        return {}
    return json.loads(path.read_text())["raw"]


def write_table(
    path: Path, title: str, note: str, columns: Sequence[str], rows: Table, raw: Any
) -> None:
    """Write a table for `tools.bench.report`, with the measurements that it came from."""
    content = {
        "title": title,
        "machine": machine(),
        "note": note,
        "columns": list(columns),
        "rows": [[name, *cells] for name, cells in rows],
        "raw": raw,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
