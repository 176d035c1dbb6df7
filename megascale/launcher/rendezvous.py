"""How the processes of a run meet, and which device each takes."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from megascale.errors import PeerError, UserError
from megascale.launcher.environment import LISTEN_FD, ProcessInfo
from megascale.launcher.meeting import (
    MEET_S,
    MeetingPoint,
    announce,
    check_names,
    find,
    listen,
    meeting_point,
)

_FIRST_FAILURE = "megascale/first_failure"
_STORE_ANSWERS = timedelta(seconds=3)


def choose_device(name: str, info: ProcessInfo) -> torch.device:
    """The device of this process: `auto` takes the GPU of its local rank where there is one.

    Raises:
        UserError: an unknown name, or cuda is asked for and this process has no GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"device {name!r}", rule="a device is auto, cpu or cuda", remedy="choose one of these"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    index = 0 if info.own_gpu and count == 1 else info.local_rank
    if index >= count:
        here = (
            "" if info.local_world_size is None else f" and runs {info.local_world_size} processes"
        )
        raise UserError(
            f"local rank {info.local_rank} has no GPU: this machine shows {count}{here}",
            rule="each process on a machine needs a GPU of its own",
            remedy=f"start at most {count} processes here (Slurm: --ntasks-per-node equal to "
            "--gpus-per-node), or set run.device=cpu",
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def init_distributed(info: ProcessInfo, device: torch.device, timeout: timedelta) -> None:
    """Join the default process group (gloo on CPU, nccl and gloo with GPUs).

    A single process gets a group of one, so that no caller has two ways.

    Args:
        timeout: longest wait for the other ranks, here and in each collective.

    Raises:
        UserError: the rendezvous port is taken, or a name leads to a loopback address.
        PeerError: the other ranks cannot be reached.
    """
    # deepspeed asks the environment for these instead of its caller
    os.environ.setdefault("LOCAL_RANK", str(info.local_rank))
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store: dist.Store | None = None
    if info.world_size == 1 and not info.launched:
        store = dist.HashStore()
    elif LISTEN_FD in os.environ:
        store = _store_on_inherited_socket(info, timeout)
    elif "RANK" not in os.environ:  # tasks of a Slurm step
        store = store_of_step(info, meeting_point(info), timeout)
    elif (info.num_nodes or 1) > 1:
        check_names(os.environ.get("MASTER_ADDR", ""))
    try:
        if store is None:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(
                backend,
                store=store,
                rank=info.rank,
                world_size=info.world_size,
                timeout=timeout,
            )
    except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
        raise _explain(error) from error
    if info.launched:  # libraries ask the environment for these, whichever launcher it was
        os.environ.setdefault("RANK", str(info.rank))
        os.environ.setdefault("WORLD_SIZE", str(info.world_size))


def first_failure(text: str, *, cause: bool) -> str:
    """What the first failing rank said, through the store that all ranks share.

    Args:
        text: this rank's error, left there if no other rank was earlier.
        cause: whether it may be the first cause; False only asks.

    Returns:
        the first failing rank's text; "" when there is none or the store is gone.
    """
    store = dist.distributed_c10d._get_default_store()
    try:
        store.set_timeout(_STORE_ANSWERS)
        if cause:
            return store.compare_set(_FIRST_FAILURE, "", text).decode()
        return store.get(_FIRST_FAILURE).decode() if store.check([_FIRST_FAILURE]) else ""
    except RuntimeError:  # the rank that serves the store has ended
        return ""


def store_of_step(
    info: ProcessInfo, point: MeetingPoint, timeout: timedelta, wait_s: float = MEET_S
) -> dist.Store:
    """The store of a Slurm step: on rank 0, which tells its port at the meeting point.

    Args:
        timeout: of the store's answers.
        wait_s: longest time to look for rank 0.

    Raises:
        UserError: no port of the meeting point is free.
        PeerError: rank 0 is not found.
    """
    if info.rank == 0:
        meeting = listen(point.ports)
        with socket.create_server(("", 0), backlog=1024) as listener:
            port = listener.getsockname()[1]
            store = _store("127.0.0.1", port, timeout, os.dup(listener.fileno()))
        announce(meeting, point, port, info.world_size - 1)
        return store
    return _store(point.address, find(point, wait_s), timeout)


def _store(address: str, port: int, timeout: timedelta, listening: int | None = None) -> dist.Store:
    """A store, or with the descriptor of a listening socket its server."""
    return dist.TCPStore(
        address,
        port,
        is_master=listening is not None,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listening,
        use_libuv=False,
    )


def _store_on_inherited_socket(info: ProcessInfo, timeout: timedelta) -> dist.Store:
    """Rank 0 serves on the socket that the local launcher bound: no port can be lost meanwhile."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    descriptor = int(os.environ[LISTEN_FD]) if info.rank == 0 else None
    return dist.TCPStore(
        address,
        port,
        info.world_size,
        is_master=info.rank == 0,
        timeout=timeout,
        master_listen_fd=descriptor,
        use_libuv=False,
    )


def _explain(error: Exception) -> UserError:
    where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    text = str(error)
    if "RANK" not in os.environ:
        where = "the head node of the Slurm step"
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        return UserError(
            f"the rendezvous port of {where} is in use",
            rule="rank 0 must be able to listen on MASTER_PORT",
            remedy="choose another MASTER_PORT (torchrun --master-port, deepspeed --master_port), "
            "or start with --nproc, which finds a free one",
        )
    # a variable that is not set is the user's; who does not answer may be on a lost machine
    return (UserError if isinstance(error, ValueError) else PeerError)(
        f"the processes could not meet at {where}: {text.splitlines()[0] if text else error!r}",
        rule="every rank must reach MASTER_ADDR:MASTER_PORT",
        remedy="check MASTER_ADDR, MASTER_PORT and that all ranks were started",
    )
