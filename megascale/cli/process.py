"""Starting ranks and joining them: what train, evaluate and later commands share."""

from __future__ import annotations

import faulthandler
import gc
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from megascale.launcher.environment import ProcessInfo, is_launched
from megascale.launcher.failure import describe, launcher_speaks, leave_mark, leave_note
from megascale.launcher.forked import Entry, preload
from megascale.launcher.local import launch_local

if TYPE_CHECKING:
    import torch


def launch_ranks(nproc: int | None, log_dir: Path, device: str, engine: str = "torch") -> bool:
    """With --nproc N > 1, run this very command line on N ranks; returns whether it did so.

    Args:
        device, engine: of the ranks: what they need is imported once, here.

    Raises:
        UserError: --nproc inside a process that some launcher started.
        typer.Exit: with the run's exit code, when it failed.
    """
    if nproc is None or nproc == 1:
        return False
    if is_launched():
        return False
    entry = entry_of_ranks(device, engine)
    code = launch_local(_without_nproc(sys.argv[1:]), nproc, log_dir, entry)
    if code:
        raise typer.Exit(code)
    return True


def entry_of_ranks(device: str, engine: str) -> Entry | None:
    """What `launch_local` forks ranks into, with their modules imported; None: it cannot."""
    from megascale.cli.main import main

    modules = ["megascale.training.assemble"]
    if engine == "deepspeed":
        modules.append("megascale.engine.deepspeed_engine")
    return main if preload(modules, on_gpu=engine == "deepspeed" and device != "cpu") else None


@contextmanager
def collector_paused() -> Iterator[Callable[[], None]]:
    """Without Python's cyclic collector, until the end or the call of what it yields.

    Importing torch makes 500,000 objects that all live on. Looking among them for garbage took
    0.4 to 1.7 of 3.7 to 4.8 s of CPU time.
    """
    go_on = gc.enable if gc.isenabled() else lambda: None
    gc.disable()
    try:
        yield go_on
    finally:
        go_on()


@contextmanager
def distributed_process(device_name: str, timeout_s: int = 600) -> Iterator[torch.device]:
    """This process's device, inside the initialised default process group.

    An error of this rank is made known to the launcher and to the other ranks before the
    connections are closed.

    Args:
        timeout_s: longest wait for the other ranks in a collective, in seconds.
    """
    import torch.distributed as dist

    from megascale.launcher.environment import process_info
    from megascale.launcher.rendezvous import choose_device, init_distributed

    info = process_info()
    if launcher_speaks():
        faulthandler.register(signal.SIGUSR2, all_threads=False)  # where is a silent rank?
    try:
        with _failure_is_told(info):
            device = choose_device(device_name, info)
            init_distributed(info, device, timedelta(seconds=timeout_s))
            yield device
            dist.barrier()  # nobody leaves while another rank still needs it
            leave_mark(info.rank)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _failure_is_told(info: ProcessInfo) -> Iterator[None]:
    """Leave a note of an error; where `launch_local` speaks, a rank that lost its peer does not."""
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    from megascale.launcher.rendezvous import first_failure

    try:
        yield
    except (typer.Exit, SystemExit):
        raise
    except Exception as error:
        failure = describe(error, info.rank)
        leave_note(failure)
        if failure.lost_peer and launcher_speaks():
            if info.rank:  # into its log
                traceback.print_exc()
            raise SystemExit(getattr(error, "exit_code", 1)) from None
        if info.world_size > 1 and dist.is_initialized():
            if not launcher_speaks():
                get_error_handler().record_exception(error)  # torchrun's, if that started us
            told = first_failure(f"rank {info.rank}: {failure.text}", cause=not failure.lost_peer)
            if told and failure.lost_peer:
                print(f"the first failure was that of {told}", file=sys.stderr, flush=True)
        raise


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
