"""Our own step, through everything that `megascale train` runs in one: loader, engine, schedule."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megascale.cli.config import all_checks
from megascale.config.load import load_config
from megascale.data.token_file import TokenFileWriter, token_dtype
from megascale.training.assemble import assemble_step
from megascale.training.state import TrainState
from megascale.training.step import train_step
from tools.bench.job import Job, Meter, job_of_command_line

# variant -> settings that make it
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "plain": {
        "performance": {
            "fused_loss": "never",
            "attention": "sdpa",
            "fused_optimizer": "never",
        }
    },
    "zero1": {
        "parallel": {"zero_stage": 1, "engine": "torch"},
    },
}


def config_of(job: Job, variant: str, folder: Path) -> dict[str, Any]:
    """The job as a config; its batches become a dataset below `folder`."""
    steps = job.warmup + job.steps
    with TokenFileWriter(folder / "data", token_dtype(job.vocab_size)) as writer:
        for index in range(steps + 2):
            writer.add_document([job.batch(index)[0].numpy().ravel()])
    return {
        "run": {"output_dir": str(folder / "out"), "device": "cpu"},
        "model": {
            "num_layers": job.num_layers,
            "hidden_size": job.hidden_size,
            "num_attention_heads": job.num_heads,
            "vocab_size": job.vocab_size,
            "seq_length": job.seq_length,
            "dropout": 0.0,
        },
        "data": {"path": str(folder / "data"), "split": [1.0]},
        "train": {
            "global_batch_size": job.micro_batch_size,
            "micro_batch_size": job.micro_batch_size,
            "max_steps": steps,
        },
        "optimizer": {
            "lr": job.lr,
            "betas": list(job.betas),
            "weight_decay": job.weight_decay,
            "grad_clip": job.grad_clip,
        },
        "schedule": {"name": "constant"},
        "precision": {"dtype": job.dtype},
        **VARIANTS[variant],
    }


def main() -> None:
    """Run the job."""
    job, arguments = job_of_command_line()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        tree = config_of(job, arguments.variant, Path(folder))
        config = load_config(tree, checks=all_checks(), world_size=1)
        parts = assemble_step(config, torch.device("cpu"))
        state, meter = TrainState(), Meter(job)
        for _ in range(job.warmup + job.steps):
            meter.begin()
            meter.end(train_step(parts, state).loss)
        meter.report()
        parts.loader.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
