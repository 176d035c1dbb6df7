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

ATTEMPT_DIR = "MEGASCALE_ATTEMPT_DIR"
"""Folder of this attempt at a run, set by the batch script; see `megascale.launcher.attempt`."""


@dataclass(frozen=True)
class ProcessInfo:
    """This process's place, as the launcher that started it says.

    Attributes:
        rank: global rank.
        world_size: number of processes.
        local_rank: rank within this machine (selects the GPU).
        launched: whether some launcher set the environment; False for a plain single process.
        local_world_size: number of processes on this machine; None where the launcher does not say.
        own_gpu: whether the launcher shows each process its own GPU only (Slurm's
            --gpus-per-task and --gpu-bind).
        num_nodes: machines of the run; None where the launcher does not say.
    """

    rank: int
    world_size: int
    local_rank: int
    launched: bool
    local_world_size: int | None = None
    own_gpu: bool = False
    num_nodes: int | None = None


def process_info(environment: Mapping[str, str] | None = None) -> ProcessInfo:
    """Read RANK, WORLD_SIZE, LOCAL_RANK as torchrun, deepspeed and our own launcher set them.

    Where neither RANK nor WORLD_SIZE is set, the tasks of a Slurm step (srun, and the deepspeed
    launcher with --launcher slurm) are the ranks, by SLURM_PROCID and SLURM_STEP_NUM_TASKS.

    Raises:
        UserError: only some of them are set, or they contradict each other.
    """
    env = os.environ if environment is None else environment
    if "RANK" not in env and "WORLD_SIZE" not in env:
        if step_tasks(env) > 1:
            return _place_in_step(env)
        return ProcessInfo(rank=0, world_size=1, local_rank=0, launched=False)
    try:
        rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
        local = int(env.get("LOCAL_RANK", "0"))
        local_world = _first_number(env, "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
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
    _check_agents(env)
    nodes = _first_number(env, "GROUP_WORLD_SIZE", "CROSS_SIZE")
    return ProcessInfo(rank, world, local, True, local_world, num_nodes=nodes)


def _first_number(env: Mapping[str, str], *names: str) -> int | None:
    """The first of these variables that is a number: torchrun's name, then deepspeed's."""
    return next((int(env[name]) for name in names if env.get(name, "").isdecimal()), None)


def step_tasks(env: Mapping[str, str]) -> int:
    """Tasks of the Slurm step that this process belongs to; 0 outside of a step.

    A batch script has SLURM_PROCID=0 and the job's SLURM_NTASKS too, but is no task of a step: only
    srun sets SLURM_STEP_NUM_TASKS.
    """
    if "SLURM_PROCID" not in env:
        return 0
    text = env.get("SLURM_STEP_NUM_TASKS", "")
    return int(text) if text.isdecimal() else 0


def _place_in_step(env: Mapping[str, str]) -> ProcessInfo:
    """The place of a task that srun started, one process a task."""
    world, nodes = step_tasks(env), int(env.get("SLURM_STEP_NUM_NODES", "1"))
    try:
        rank, local = int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"])
        here = tasks_of_nodes(env["SLURM_STEP_TASKS_PER_NODE"])[int(env["SLURM_NODEID"])]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"the environment of this Slurm task is incomplete: {error}",
            rule="srun sets SLURM_PROCID, SLURM_LOCALID, SLURM_NODEID, SLURM_STEP_TASKS_PER_NODE",
            remedy="start with srun and pass its variables on (into a container too), or set RANK, "
            "WORLD_SIZE and LOCAL_RANK",
        ) from error
    bound = ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "SLURM_TRES_PER_TASK")
    own_gpu = any(env.get(name, "none") != "none" for name in bound)
    return ProcessInfo(rank, world, local, True, here, own_gpu, nodes)


def tasks_of_nodes(text: str) -> list[int]:
    """Slurm's short form of the tasks on each node: "2(x3),1" is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        number, _, times = part.partition("(x")
        counts += [int(number)] * int(times.rstrip(")") or 1)
    return counts


def _check_agents(env: Mapping[str, str]) -> None:
    """Refuse a torchrun in each of several tasks of a machine: it would start too many ranks."""
    tasks, nodes = step_tasks(env), env.get("SLURM_STEP_NUM_NODES", "")
    if "TORCHELASTIC_RUN_ID" in env and nodes.isdecimal() and tasks > int(nodes):
        raise UserError(
            f"torchrun was started by {tasks} tasks on {nodes} machines",
            rule="torchrun starts the processes of a machine itself, so it is one task a machine",
            remedy="srun --ntasks-per-node=1 torchrun --nproc-per-node N ..., or without torchrun "
            "srun --ntasks-per-node=N python -m megascale ...",
        )


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
