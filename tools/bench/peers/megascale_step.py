"""Our own step, through everything that `megascale train` runs in one: loader, engine, schedule."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megascale.cli.config import all_checks
from megascale.config.load import load_config
from megascale.config.schema import Config
from megascale.data.protocol import IGNORE_LABEL
from megascale.data.token_file import TokenFileWriter, token_dtype
from megascale.training.assemble import assemble_engine, assemble_step, build_schedule, mesh_of
from megascale.training.host import prepare_host
from megascale.training.state import TrainState
from megascale.training.step import train_step
from megascale.training.tasks.registry import build_task
from tools.bench.job import Job, Meter, job_of_command_line

# variant -> settings that make it
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "plain": {
        "performance": {
            "fused_loss": "never",
            "attention": "sdpa",
            "recompute_activation": "never",
            "fused_optimizer": "never",
            "compiled_kernels": "never",
            "keep_memory": "never",
            "shared_memory": "never",
        }
    },
    "zero1": {
        "parallel": {"zero_stage": 1, "engine": "torch"},
    },
}


def config_of(job: Job, variant: str, folder: Path) -> dict[str, Any]:
    """The job as a config; its batches become a dataset below `folder`."""
    steps = job.warmup + job.steps
    bert = {"family": "bert", "activation": "gelu", "norm_eps": 1e-12}
    with TokenFileWriter(folder / "data", token_dtype(job.vocab_size)) as writer:
        for index in range(steps + 2):
            writer.add_document([job.batch(index)[0].numpy().ravel()])
    return {
        "run": {"output_dir": str(folder / "out"), "device": "cpu"},
        "model": {
            **(bert if job.model == "bert" else {}),
            "num_layers": job.num_layers,
            "hidden_size": job.hidden_size,
            "num_attention_heads": job.num_heads,
            "vocab_size": job.vocab_size,
            "seq_length": job.seq_length,
            "dropout": job.dropout,
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


@contextmanager
def open_step(
    config: Config, job: Job, weights_of: Config | None = None
) -> Iterator[Callable[[int], float]]:
    """What gives the loss of a step of the job by its number; call it in order.

    Args:
        weights_of: a config whose seed draws the initial weights instead.
    """
    if job.model == "bert":
        with _masked_step(config, job, weights_of) as masked:
            yield masked
        return
    parts = assemble_step(config, torch.device("cpu"), weights_of=weights_of)
    state = TrainState()
    try:
        yield lambda _: train_step(parts, state).loss
    finally:
        parts.loader.close()
        parts.engine.close()


@contextmanager
def _masked_step(
    config: Config, job: Job, weights_of: Config | None
) -> Iterator[Callable[[int], float]]:
    """The step of a BERT on the job's own batches: what `train_step` does but for the loader, whose
    masking would not be that of the other stacks."""
    device = torch.device("cpu")
    prepare_host(config.performance, device)
    mesh = mesh_of(config, device)
    start = build_task(weights_of or config)
    engine = assemble_engine(config, build_task(config), mesh, device, start)
    schedule = build_schedule(config)

    def step(index: int) -> float:
        tokens, labels = job.masked_batch(index)
        batch = {
            "input_ids": tokens,
            "labels": labels,
            "token_type_ids": torch.zeros_like(tokens),
            "attention_mask": torch.ones_like(tokens),
            "sample_ids": torch.arange(len(tokens)) + index * len(tokens),
        }
        targets = (labels != IGNORE_LABEL).sum().double()[None]
        loss = (engine.forward_backward([batch], targets).double() / targets).sum().item()
        engine.step(schedule.lr_at(index))
        return loss

    try:
        yield step
    finally:
        engine.close()


def main() -> None:
    """Run the job."""
    job, arguments = job_of_command_line()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        tree = config_of(job, arguments.variant, Path(folder))
        config = load_config(tree, checks=all_checks(), world_size=1)
        meter = Meter(job)
        with open_step(config, job) as step:
            for index in range(job.warmup + job.steps):
                meter.begin()
                meter.end(step(index))
        meter.report()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
