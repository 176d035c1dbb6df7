"""Our step on several processes, through everything that `megascale train` runs in one.

The variant is JSON: engine, stage, passes (micro-batches a rank and step), performance (that
section of the config) and, for a run that continues, checkpoint: a folder that is written after the
last step if it is empty, or else loaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megascale.checkpoint.manager import CheckpointManager
from megascale.checkpoint.ranks import make_ranks
from megascale.cli.config import all_checks
from megascale.config.load import load_config
from megascale.training.assemble import assemble_step
from megascale.training.resume import load_state
from megascale.training.state import TrainState
from megascale.training.step import StepParts, train_step
from tools.bench.job import Job, job_of_command_line
from tools.bench.peers.megascale_step import config_of
from tools.bench.ranks import Batch, Step, join, run_ranks


def _config(job: Job, variant: dict[str, Any], folder: Path) -> dict[str, Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    passes = variant["passes"]
    plenty = replace(job, steps=(job.warmup + job.steps) * passes * size)
    own = folder / str(rank)
    own.mkdir()
    tree = config_of(plenty, "", own)
    tree["train"]["global_batch_size"] = job.micro_batch_size * passes * size
    tree["parallel"] = {"zero_stage": variant["stage"], "engine": variant["engine"]}
    tree["performance"] = variant.get("performance", {})
    return tree


def _start(tree: dict[str, Any], manager: CheckpointManager | None, made: list[Any]) -> Step:
    """Build, and load where there is something to load; the parts of the step go to `made`."""
    config = load_config(tree, checks=all_checks(), world_size=dist.get_world_size())
    parts, state = assemble_step(config, torch.device("cpu")), TrainState()
    if manager is not None and manager.steps():
        reader, _ = manager.open_newest_intact()
        assert reader is not None
        state, _ = load_state(reader, parts.engine, parts.mesh)
        reader.close()
    made += [parts, state]

    def step(_: Sequence[Batch]) -> float:
        return train_step(parts, state).loss  # its loader has the batches

    return step


def _save(manager: CheckpointManager, parts: StepParts, state: TrainState) -> None:
    engine = parts.engine
    saved = {"train": state.state_dict(), "engine": engine.state_dict(), "callbacks": {}}
    manager.save(state.step, engine.fragments(engine.state_kinds), saved, {})


def main() -> None:
    """Run the job."""
    job, arguments = job_of_command_line()
    variant = json.loads(arguments.variant)
    _, _, folder = join()
    tree = _config(job, variant, folder)
    kept = variant.get("checkpoint")
    manager = CheckpointManager(kept, ranks=make_ranks()) if kept else None
    made: list[Any] = []
    run_ranks(job, partial(_start, tree, manager, made), variant["passes"])
    parts, state = made
    if manager is not None and not manager.steps():
        _save(manager, parts, state)
    parts.loader.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
