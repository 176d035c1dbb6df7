"""Saving beside training: the step waits for a copy in host memory, a thread does the rest."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from megascale.errors import UserError
from megascale.parallel.fragment import Fragment

NICENESS = 10
"""The thread yields the processor to training; see docs/design.md."""


class Snapshot:
    """Copies of fragments in host memory, which is kept from one save to the next.

    Fresh memory has to be mapped page by page, which costs more than the copy itself.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], torch.Tensor] = {}

    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """The fragments with copies of their data; valid until the next call."""
        copies = []
        for fragment in fragments:
            key = (fragment.kind, fragment.name)
            memory = self._kept.get(key)
            source = fragment.tensor.detach()
            if memory is None or memory.shape != source.shape or memory.dtype != source.dtype:
                memory = self._kept[key] = torch.empty(
                    source.shape, dtype=source.dtype, pin_memory=source.is_cuda
                )
            memory.copy_(source, non_blocking=True)
            copies.append(replace(fragment, tensor=memory))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies


class BackgroundTask:
    """At most one piece of work at a time in a thread of low priority, its failure kept."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work`; the one before must have been waited for."""
        assert self._thread is None, "one at a time"
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint")
        self._thread.start()

    def failed(self) -> bool:
        """Whether the work has ended badly; does not wait."""
        return self._failure is not None

    def is_busy(self) -> bool:
        """Whether the work goes on."""
        return self._thread is not None and self._thread.is_alive()

    def abandon(self) -> None:
        """Wait for the end of the work whatever it is; a failure is dropped."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._failure = None

    def wait(self) -> None:
        """Wait for the end of the work.

        Raises:
            UserError: it failed; told once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if isinstance(failure, UserError):
            raise failure
        if failure is not None:
            raise UserError(
                f"saving in the background failed: {type(failure).__name__}: {failure}",
                rule="a checkpoint must be written whole; what was saved before is untouched",
                remedy="look at the other ranks' logs; continue with --resume",
            ) from failure

    def _run(self, work: Callable[[], None]) -> None:
        with contextlib.suppress(AttributeError, OSError):  # on Linux: of this thread alone
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            work()
        except BaseException as error:  # told by wait(), in the thread that trains
            self._failure = error
