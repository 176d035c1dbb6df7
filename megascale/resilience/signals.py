"""Signals that ask a run to save: remembered when they come, acted on between two steps."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

SAVE_SIGNAL = signal.SIGUSR1
STOP_SIGNAL = signal.SIGTERM
ECHO_S = 5.0
"""SIGTERM within so many seconds of the first one is the same request: a launcher passes on what
Slurm, or a terminal, has sent to the ranks too."""


class SaveSignals:
    """Remembers SIGUSR1 (save) and SIGTERM (save and end) from `install` to `restore`.

    A second SIGTERM, later than `ECHO_S` after the first, ends the process at once, as without
    this: a rank that hangs can still be ended. Signals reach the main thread only; in another one
    nothing is installed.
    """

    def __init__(self) -> None:
        self._saves = 0
        self._stop = False
        self._stop_time = 0.0
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Begin to remember."""
        if threading.current_thread() is threading.main_thread():
            for number in (SAVE_SIGNAL, STOP_SIGNAL):
                self._before[number] = signal.signal(number, self._remember)

    def restore(self) -> None:
        """Give the signals back to who had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def seen(self) -> tuple[int, bool]:
        """(how often a save was asked for so far, whether the end was)."""
        return self._saves, self._stop

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == SAVE_SIGNAL:
            self._saves += 1
            return
        now = time.monotonic()
        if not self._stop:
            self._stop, self._stop_time = True, now
        elif now - self._stop_time > ECHO_S:
            signal.signal(STOP_SIGNAL, signal.SIG_DFL)
            signal.raise_signal(STOP_SIGNAL)
