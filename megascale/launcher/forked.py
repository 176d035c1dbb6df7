"""Ranks that share the imports of the process that starts them.

Importing torch and the engines costs some 3 s of CPU time. Paid once, before the ranks are forked,
it is paid for all of them: a machine with few cores starts many ranks in the time of one.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

# One thread each while modules are imported: a pool of threads does not survive a fork.
_QUIET = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
_TASKS = Path("/proc/self/task")
_GPU = Path("/dev/nvidiactl")
_LAST_STEPS_S = 0.1

Entry = Callable[[Sequence[str]], None]
"""What a rank runs, with the command line's arguments."""


class Rank(Protocol):
    """A started rank: the part of `subprocess.Popen` that a launcher needs."""

    def poll(self) -> int | None: ...
    def send_signal(self, sig: int) -> None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


def preload(modules: Sequence[str], *, on_gpu: bool) -> bool:
    """Import what ranks need; returns whether they can be forked from this process.

    They cannot where threads run already, and not where there is no /proc to count them. With
    `on_gpu` nothing is imported that might look for GPUs: a driver does not survive a fork.
    """
    if not can_fork() or (on_gpu and _GPU.exists()):
        return False
    was_enabled = gc.isenabled()
    gc.disable()  # 500,000 objects that all live on
    try:
        with _environment(_QUIET), suppress(ImportError):  # the ranks will say it
            for module in modules:
                importlib.import_module(module)
    finally:
        gc.freeze()  # a collection in a rank leaves these pages shared
        if was_enabled:
            gc.enable()
    return can_fork()


def can_fork() -> bool:
    """Whether this process has one thread only: others would not be there in a fork of it.

    One that was joined may still be on its way out: it is waited for.
    """
    deadline = time.monotonic() + _LAST_STEPS_S
    while not _is_single() and threading.active_count() == 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    return _is_single()


def _is_single() -> bool:
    return _TASKS.is_dir() and len(list(_TASKS.iterdir())) == 1


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class ForkedRank:
    """A rank that was forked from this process.

    Args:
        entry, arguments: what it runs.
        environment: of the rank, whole.
        log: where it writes; None: to this terminal.
        closes: descriptors that it must not hold.
    """

    def __init__(
        self,
        entry: Entry,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path | None,
        closes: Sequence[int] = (),
    ) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # or the rank writes it again
        self._process = get_context("fork").Process(
            target=_run, args=(entry, arguments, environment, log, closes)
        )
        self._process.start()

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def send_signal(self, sig: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None and self._process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, sig)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("rank", timeout or 0.0)
        return code

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(
    entry: Entry,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    log: Path | None,
    closes: Sequence[int],
) -> None:
    for descriptor in closes:
        os.close(descriptor)
    if log is not None:
        with open(log, "wb", buffering=0) as stream:
            for old in (1, 2):
                os.dup2(stream.fileno(), old)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    _set_threads(int(environment["OMP_NUM_THREADS"]))
    entry(arguments)


def _set_threads(count: int) -> None:
    """What torch would have taken from the environment, had it been imported in the rank."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(count)
