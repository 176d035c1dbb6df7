"""What the environment says about this process, readable before torch is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from megascale.errors import UserError

LISTEN_FD = "MEGASCALE_LISTEN_FD"
"""Descriptor of the rendezvous socket that `launch_local` hands to rank 0."""

FAILURE_DIR = "MEGASCALE_FAILURE_DIR"
"""Folder in which the ranks of `launch_local` leave notes of their failures."""


@dataclass(frozen=True)
class ProcessInfo:
    """This process's place, as the launcher that started it says.

    Attributes:
        rank: global rank.
        world_size: number of processes.
        local_rank: rank within this machine (selects the GPU).
        launched: whether some launcher set the environment; False for a plain single process.
    """

    rank: int
    world_size: int
    local_rank: int
    launched: bool


def process_info(environment: Mapping[str, str] | None = None) -> ProcessInfo:
    """Read RANK, WORLD_SIZE, LOCAL_RANK as torchrun, deepspeed and our own launcher set them.

    Raises:
        UserError: only some of them are set, or they contradict each other.
    """
    env = os.environ if environment is None else environment
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return ProcessInfo(rank=0, world_size=1, local_rank=0, launched=False)
    try:
        rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
        local = int(env.get("LOCAL_RANK", "0"))
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the launcher's environment is incomplete: {error}",
            rule="RANK and WORLD_SIZE must both be set, as whole numbers",
            remedy="start with --nproc N, torchrun or deepspeed, or unset RANK and WORLD_SIZE",
        ) from error
    if not 0 <= rank < world:
        raise UserError(
            f"RANK={rank} with WORLD_SIZE={world}",
            rule="0 <= RANK < WORLD_SIZE",
            remedy="check the launcher; unset both for a single process",
        )
    return ProcessInfo(rank=rank, world_size=world, local_rank=local, launched=True)


def is_launched() -> bool:
    """Whether a launcher started this process."""
    return process_info().launched


def world_size_of(nproc: int | None) -> int:
    """World size of the run: the launcher's, or what --nproc asks for.

    Raises:
        UserError: a launcher started this process and --nproc says something else.
    """
    info = process_info()
    if not info.launched:
        return nproc or 1
    if nproc is not None and nproc != info.world_size:
        raise UserError(
            f"--nproc {nproc} in a process of a launcher with WORLD_SIZE={info.world_size}",
            rule="one launcher decides the number of processes",
            remedy="leave --nproc out under torchrun, deepspeed or srun",
        )
    return info.world_size
