"""Memory that the ranks of a group on one machine share, and the signals by which they take turns.

The memory has no name: the group's first rank makes it (memfd_create), the others open it by that
process's descriptor. It is gone when the last rank has ended, however that ended. A signal from one
rank to another is a POSIX semaphore in it: posting and waiting order memory on every processor, and
a waiting rank sleeps, so that many ranks can share few cores.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import time
from contextlib import suppress
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

SLOT_BYTES = 1 << 19
"""What a rank puts in at once; with those of some ranks it should stay in a core's cache."""

_BUFFERS = 2
_SEMAPHORE_BYTES = 64  # sem_t has 32 in glibc; a cache line each
_LOOK_S = 0.1
"""A rank that waits looks so often whether the other one still lives."""


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


@cache
def _libc() -> ctypes.CDLL:
    """The C library, for its semaphores.

    Raises:
        AttributeError: it has none that processes can share.
    """
    libc = ctypes.CDLL(None)
    libc.sem_init.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint)
    libc.sem_post.argtypes = libc.sem_trywait.argtypes = (ctypes.c_void_p,)
    libc.sem_clockwait.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Timespec))
    return libc


class Segment:
    """The shared memory of one group, seen from one of its ranks.

    Args:
        memory: mapped by every rank.
        processes: descriptors of the other ranks' processes, by rank.
        rank: index of this one.
        timeout: longest wait for another rank.
    """

    def __init__(
        self, memory: mmap.mmap, processes: dict[int, int], rank: int, timeout: timedelta
    ) -> None:
        self.rank, self.size = rank, len(processes) + 1
        self.timeout = timeout
        self._buffer = 0
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)  # holds the memory, too
        self._views: dict[torch.dtype, list[list[torch.Tensor]]] = {}
        self._processes = processes
        libc = _libc()
        self._post, self._try, self._wait = libc.sem_post, libc.sem_trywait, libc.sem_clockwait
        start, peers = self._bytes.data_ptr(), self._processes
        self._outgoing = [start + _semaphore(rank, p, self.size) for p in peers]
        self._incoming = [(p, start + _semaphore(p, rank, self.size)) for p in peers]

    def slots(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Each rank's slot, as flat tensors of a type: the next ones of two sets by turns.

        A rank may fill its slot at once: nobody reads it any more. It was last read before the
        `meet` that is before the last, and who came to the last one had read it.
        """
        views = self._views.get(dtype)
        if views is None:
            views = self._views[dtype] = self._view(dtype)
        self._buffer = (self._buffer + 1) % _BUFFERS
        return views[self._buffer]

    def _view(self, dtype: torch.dtype) -> list[list[torch.Tensor]]:
        first = _slots_start(self.size)
        slots = self._bytes[first:].view(dtype).view(_BUFFERS, self.size, -1)
        return [list(buffer.unbind()) for buffer in slots.unbind()]

    def meet(self) -> None:
        """Wait until every rank has come here; what each wrote before is then seen by all.

        Raises:
            RuntimeError: another rank has ended, or does not come in time.
        """
        for semaphore in self._outgoing:
            self._post(semaphore)
        for peer, semaphore in self._incoming:
            if self._try(semaphore):
                self._wait_for(peer, semaphore)

    def close(self) -> None:
        """Tell the others that this rank comes to no further meeting."""
        if self._processes:
            self._bytes[_left(self.rank, self.size)] = 1
        for process in self._processes.values():
            with suppress(OSError):
                os.close(process)
        self._processes = {}

    def _wait_for(self, peer: int, semaphore: int) -> None:
        deadline = time.monotonic() + self.timeout.total_seconds()
        while True:
            until = time.monotonic() + _LOOK_S
            limit = _Timespec(int(until), int(until % 1 * 1e9))
            # whether it has ended is asked before the wait: what it did before its end counts
            ended = self._has_ended(peer)
            if self._wait(semaphore, time.CLOCK_MONOTONIC, ctypes.byref(limit)) == 0:
                return
            if ended:
                raise RuntimeError(
                    f"shared memory in front of gloo: connection closed by peer {peer} of the group"
                )
            if time.monotonic() > deadline:
                raise RuntimeError(
                    "shared memory in front of gloo: timed out waiting "
                    f"{self.timeout.total_seconds():g} s for peer {peer} of the group"
                )

    def _has_ended(self, peer: int) -> bool:
        if self._bytes[_left(peer, self.size)]:
            return True
        process = self._processes.get(peer)
        if process is None:
            return True
        looked = select.poll()  # select takes no descriptor above 1023
        looked.register(process, select.POLLIN)
        return bool(looked.poll(0))


def open_segment(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Segment | None:
    """The shared memory of a group; None where its ranks cannot share any. Collective.

    Args:
        store: the group's own.
    """
    made = _make(size) if rank == 0 else None
    descriptor = -1 if made is None else made[0]
    store.set(f"place {rank}", f"{_machine()} {os.getpid()} {descriptor}")
    places = [store.get(f"place {r}").decode().split() for r in range(size)]
    try:
        memory = made[1] if made is not None else _open(places, size)
        processes = _watch([int(pid) for _, pid, _ in places], rank)
        ready = memory is not None and processes is not None
        store.set(f"open {rank}", "yes" if ready else "no")
        agreed = [store.get(f"open {r}") == b"yes" for r in range(size)]
    finally:
        if made is not None:
            os.close(made[0])
    if memory is None or processes is None or not all(agreed):
        for process in (processes or {}).values():
            os.close(process)
        return None
    return Segment(memory, processes, rank, timeout)


def _watch(pids: list[int], rank: int) -> dict[int, int] | None:
    """Descriptors that tell of the end of the other ranks' processes."""
    with _unavailable_is_none():
        return {peer: os.pidfd_open(pid) for peer, pid in enumerate(pids) if peer != rank}
    return None


def _make(size: int) -> tuple[int, mmap.mmap] | None:
    """A descriptor of new shared memory, and the memory with its semaphores."""
    with _unavailable_is_none():
        libc = _libc()
        descriptor = os.memfd_create("megascale")
        os.ftruncate(descriptor, _num_bytes(size))
        memory = mmap.mmap(descriptor, _num_bytes(size))
        start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        for number in range(size * size):
            libc.sem_init(start + number * _SEMAPHORE_BYTES, 1, 0)
        return descriptor, memory
    return None


def _open(places: list[list[str]], size: int) -> mmap.mmap | None:
    """The first rank's memory, if all ranks run on one machine and it lets this one in."""
    (machine, pid, descriptor), *others = places
    if descriptor == "-1" or any(other[0] != machine for other in others):
        return None
    with _unavailable_is_none():
        _libc()
        handle = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR)
        try:
            return mmap.mmap(handle, _num_bytes(size))
        finally:
            os.close(handle)
    return None


def _unavailable_is_none() -> suppress:
    """Not on Linux, an old kernel or C library, a container that forbids it: there is no memory."""
    return suppress(AttributeError, OSError)


def _machine() -> str:
    """The same for processes that can see each other's descriptors."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    return f"process/{os.getpid()}"


def _semaphore(source: int, target: int, size: int) -> int:
    """Where the signal from one rank to another lies, in bytes from the start."""
    return (source * size + target) * _SEMAPHORE_BYTES


def _left(rank: int, size: int) -> int:
    """Where a rank notes that it has left, in bytes from the start."""
    return (size * size + rank) * _SEMAPHORE_BYTES


def _slots_start(size: int) -> int:
    return -(-(size * size + size) * _SEMAPHORE_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE


def _num_bytes(size: int) -> int:
    return _slots_start(size) + _BUFFERS * size * SLOT_BYTES
