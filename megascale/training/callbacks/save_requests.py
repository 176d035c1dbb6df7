"""Who asks for a checkpoint beside the interval: signals, the clock, files that a person makes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megascale.resilience.signals import SaveSignals

SAVE_FILE, STOP_FILE = "SAVE", "STOP"
_WAYS = ("failed", "SIGUSR1", "time", "file SAVE", "SIGTERM", "file STOP")
STOPPING_WAYS = ("SIGTERM", "file STOP")
"""Requests that end a run before its time, as they stand in `Trainer.stop_reason`."""


@dataclass(frozen=True)
class Asked:
    """What all ranks agreed on after a step.

    Attributes:
        failed: a save in the background failed on some rank.
        save: a checkpoint is wanted now.
        stop: why the run is to end after it; "" to go on.
    """

    failed: bool = False
    save: bool = False
    stop: str = ""


class SaveRequests:
    """Collects requests on any rank, so that all ranks act after the same step.

    A signal may reach one rank only, and reaches two ranks at different steps: what counts is the
    largest number of signals that any rank has had, so that each is acted on once. A file is seen
    by rank 0. One small all-reduce a step makes one decision of it.

    Args:
        folder: where the files SAVE and STOP are looked for; each is removed when it was seen.
        minutes: a checkpoint is due so long after the last one; None: never by time.
        clock: seconds, monotonic.
    """

    def __init__(
        self, folder: Path, minutes: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder
        self._seconds = None if minutes is None else minutes * 60
        self._clock = clock
        self._last = clock()
        self._signals = SaveSignals()
        self._signals_done = 0

    def start(self) -> None:
        """Begin to listen; the clock starts."""
        self._signals.install()
        self._last = self._clock()

    def close(self) -> None:
        """Listen no more."""
        self._signals.restore()

    def saved(self) -> None:
        """A checkpoint was saved: the clock starts again."""
        self._last = self._clock()

    def agreed(self, failed: bool, device: torch.device | None = None) -> Asked:
        """What is asked for; collective, the same on every rank.

        Args:
            failed: whether this rank's background save has failed.
            device: on which the ranks' collectives run; None: the CPU.
        """
        saves, stop = self._signals.seen()
        here = {"failed": failed, "SIGUSR1": saves, "SIGTERM": stop}
        if not dist.is_initialized() or dist.get_rank() == 0:
            due = self._seconds is not None and self._clock() - self._last >= self._seconds
            here["time"] = due
            here["file SAVE"] = self._seen(SAVE_FILE)
            here["file STOP"] = self._seen(STOP_FILE)
        numbers = torch.tensor([int(here.get(way, False)) for way in _WAYS], device=device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        counts = dict(zip(_WAYS, numbers.tolist(), strict=True))
        signals, self._signals_done = self._signals_done, counts["SIGUSR1"]
        counts["SIGUSR1"] -= signals
        asked = {way for way, count in counts.items() if count}
        stops = ", ".join(way for way in STOPPING_WAYS if way in asked)
        return Asked("failed" in asked, bool(asked - {"failed"}), stops)

    def _seen(self, name: str) -> bool:
        path = self._folder / name
        if not path.exists():
            return False
        path.unlink(missing_ok=True)
        return True
