"""Continuing a run from a checkpoint, in whatever layout."""

from __future__ import annotations

import json
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megascale.checkpoint.ranks import make_ranks
from megascale.checkpoint.reader import CheckpointReader
from megascale.checkpoint.sharing import fill_all
from megascale.config.schema import Config
from megascale.engine.protocol import Engine
from megascale.errors import UserError
from megascale.parallel.mesh import ParallelMesh
from megascale.training.data_record import require_same_samples
from megascale.training.datasets import Corpora
from megascale.training.state import TrainState


def require_same_data(reader: CheckpointReader, config: Config, corpora: Corpora) -> None:
    """Refuse to continue on other data or another order: samples would be lost or repeated.

    Raises:
        UserError: a dataset that was read, its mix, or the seed differs from the checkpoint's, or
            it is no checkpoint of a run.
    """
    state = reader.manifest.state
    if "train" not in state:
        raise UserError(
            f"checkpoint {reader.storage.root} holds weights only",
            rule="a run is continued from a checkpoint that a run saved",
            remedy="start a new run with checkpoint.init_from set to it, and another "
            "run.output_dir",
        )
    require_same_samples(reader, config, corpora, int(state["train"]["samples_seen"]))
    seed = config.run.seed
    if state.get("seed") != seed:
        raise UserError(
            f"run.seed {seed}",
            rule=f"checkpoint {reader.storage.root} was trained with seed {state.get('seed')}; "
            "another seed would change the order of samples in the middle of a run",
            remedy=f"set run.seed={state.get('seed')}",
        )


def load_state(
    reader: CheckpointReader, engine: Engine, mesh: ParallelMesh
) -> tuple[TrainState, dict[str, Any]]:
    """Load weights, optimizer state, counters and RNG; collective.

    Returns:
        (position of the run, saved states of the callbacks by name).

    Raises:
        UserError: the checkpoint holds another model or optimizer.
    """
    saved = reader.manifest.state
    state = TrainState.from_dict(saved["train"])
    # before the first update (all steps skipped so far) there is no optimizer state
    kinds = engine.state_kinds if state.updates else ("master",)
    fragments = [f for f in engine.prepare_load(state.updates) if f.kind in kinds]
    _check_model(reader, engine, mesh, kinds)
    with torch.no_grad():
        fill_all(reader, fragments, make_ranks())
    engine.finish_load()
    restore(engine, saved.get("engine", {}), reader)
    if reader.manifest.world_size == mesh.world_size:
        random = reader.rng_state(mesh.rank)
        if random is not None:
            torch.set_rng_state(random)
    return state, saved.get("callbacks", {})


class _Restorable(Protocol):
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def restore(owner: _Restorable, state: dict[str, Any], reader: CheckpointReader | None) -> None:
    """Give `owner` its saved state.

    Raises:
        UserError: it is not what such an owner saves; its checksum only tells that it was written
            so.
    """
    try:
        owner.load_state_dict(state)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        where = reader.storage.root if reader is not None else "a checkpoint"
        raise UserError(
            f"{where}: {type(owner).__name__} cannot continue from its saved state "
            f"{json.dumps(state)[:200]} ({type(error).__name__}: {error})",
            rule="the state in the manifest is what this version of megascale writes",
            remedy="use another checkpoint, or the version that wrote it",
        ) from error


def _check_model(
    reader: CheckpointReader, engine: Engine, mesh: ParallelMesh, kinds: tuple[str, ...]
) -> None:
    shapes = {name: place.global_shape for name, place in engine.placements.items()}
    if mesh.pp_size > 1:  # a rank knows its own layers only
        stages: list[Any] = [None] * mesh.pp_size
        dist.all_gather_object(stages, shapes, group=mesh.pp_group)
        shapes = {name: shape for stage in stages for name, shape in stage.items()}
    reader.check_parameters(shapes, kinds)
