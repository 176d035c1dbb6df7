"""Starting ranks and joining them: what train, evaluate and later commands share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from megascale.errors import UserError
from megascale.launcher.environment import is_launched
from megascale.launcher.local import launch_local

if TYPE_CHECKING:
    import torch


def launch_ranks(nproc: int | None, log_dir: Path) -> bool:
    """With --nproc N > 1, run this very command line on N ranks; returns whether it did so.

    Raises:
        UserError: --nproc inside a process that some launcher started.
        typer.Exit: with the run's exit code, when it failed.
    """
    if nproc is None or nproc == 1:
        return False
    if is_launched():
        return False
    code = launch_local(_without_nproc(sys.argv[1:]), nproc, log_dir)
    if code:
        raise typer.Exit(code)
    return True


@contextmanager
def distributed_process(device_name: str) -> Iterator[torch.device]:
    """This process's device, inside the initialised default process group."""
    import torch.distributed as dist

    from megascale.launcher.environment import process_info
    from megascale.launcher.rendezvous import choose_device, init_distributed

    info = process_info()
    device = choose_device(device_name, info)
    init_distributed(info, device)
    try:
        yield device
    except UserError:
        raise
    else:
        dist.barrier()  # nobody leaves while another rank still needs it
    finally:
        dist.destroy_process_group()


def _without_nproc(arguments: list[str]) -> list[str]:
    """The command line without --nproc: the ranks are told by their environment."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--nproc":
            skip = True
        elif not argument.startswith("--nproc="):
            kept.append(argument)
    return kept
