"""Saving beside training: a thread copies to host memory, then writes.

Weights and moments change in the optimizer's update only. So the copy goes on beside the forward
and backward pass of the next step, and the update alone waits for its end.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch

from megascale.errors import UserError
from megascale.parallel.fragment import Fragment

NICENESS = 10
"""Added to that of the thread while it writes, so that training goes first; see docs/design.md."""
_ALIGNMENT = 64  # bytes
_AFTER_START_S = 0.001
T = TypeVar("T")


class Snapshot:
    """Copies of fragments in host memory, which is kept from one save to the next.

    Fresh memory has to be mapped page by page, which costs more than the copy itself.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._pinned = False

    def take(
        self, fragments: Sequence[Fragment], ready: torch.cuda.Event | None = None
    ) -> list[Fragment]:
        """The fragments with copies of their data; valid until the next call.

        Args:
            ready: of `mark_ready`, where the data is on a GPU.
        """
        sizes = [-(-f.tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for f in fragments]
        device = next((f.tensor.device for f in fragments if f.tensor.is_cuda), None)
        places = self._at_least(sum(sizes), pinned=device is not None).split(sizes)
        stream = None if device is None else torch.cuda.Stream(device)
        if stream is not None and ready is not None:
            stream.wait_event(ready)
        copies = []
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            for fragment, place in zip(fragments, places, strict=True):
                source = fragment.tensor.detach()
                copy = place[: source.nbytes].view(source.dtype).view(source.shape)
                _copy(copy, source)
                copies.append(replace(fragment, tensor=copy))
        if stream is not None:
            stream.synchronize()
        return copies

    def _at_least(self, size: int, pinned: bool) -> torch.Tensor:
        """The first `size` bytes of the memory, which grows where it is too small."""
        if len(self._memory) < size or pinned != self._pinned:
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old goes before the new comes
            self._memory = _host_memory(size, pinned)
            self._pinned = pinned
        return self._memory[:size]


def mark_ready() -> torch.cuda.Event | None:
    """A point in the GPU's work after which all that was asked for is done; None without a GPU.

    To be called in the thread that trains, when it has asked for all that changes the data.
    """
    if not torch.cuda.is_initialized():
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream())
    return event


def _host_memory(size: int, pinned: bool) -> torch.Tensor:
    """(size,) uint8 of its own: pinned for a GPU, else in large pages, which are mapped faster."""
    if pinned or not size:
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    block = mmap.mmap(-1, size)
    with contextlib.suppress(AttributeError, OSError):  # Linux only, and not on every one
        block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=torch.uint8)


def _copy(into: torch.Tensor, source: torch.Tensor) -> None:
    """Copy without torch's threads, which training needs: numpy's copy is one memcpy."""
    if source.is_cuda or not source.is_contiguous():
        into.copy_(source, non_blocking=True)
        return
    np.copyto(into.view(-1).view(torch.uint8).numpy(), source.view(-1).view(torch.uint8).numpy())


def _step_back() -> None:
    """Lower the priority of this thread alone, as Linux allows; elsewhere nothing happens."""
    with contextlib.suppress(AttributeError, OSError):
        thread = threading.get_native_id()
        now = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, min(now + NICENESS, 19))


class BackgroundTask:
    """At most one piece of work at a time in a thread, its failure kept."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._prepared = threading.Event()
        self._prepared.set()

    def start(self, prepare: Callable[[], T], work: Callable[[T], None]) -> None:
        """Begin `prepare`, then with what it gives `work`, at low priority.

        The work before must have been waited for.
        """
        assert self._thread is None, "one at a time"
        self._prepared.clear()
        self._thread = threading.Thread(target=self._run, args=(prepare, work), name="checkpoint")
        self._thread.start()

    def wait_until_prepared(self) -> None:
        """Wait for the end of `prepare` only, also of one that failed: that is told by `wait`."""
        self._prepared.wait()

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

    def _run(self, prepare: Callable[[], T], work: Callable[[T], None]) -> None:
        # the thread that trains waits for the begin of this one, and gets the interpreter back
        time.sleep(_AFTER_START_S)
        try:
            prepared = prepare()
            self._prepared.set()
            _step_back()
            work(prepared)
        except BaseException as error:  # told by wait(), in the thread that trains
            self._failure = error
        finally:
            self._prepared.set()
