"""How a rank that fails says so, and how the launcher finds the rank that failed first.

When one rank ends, the collectives of the others fail too, and whose process the operating system
reports first is chance. So each failing rank leaves a note before it lets go of its connections:
a file for `launch_local` or for the batch script, a key of the rendezvous store for ranks on other
machines, and torchrun's error file. A rank that only lost its peer knows that it is not the cause,
and stays silent where the launcher will speak.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megascale.errors import (
    DiskFullError,
    NodeError,
    NumericalError,
    PeerError,
    TakenOverError,
    UserError,
)
from megascale.launcher.environment import ATTEMPT_DIR, FAILURE_DIR

_BACKEND_ERRORS = ("DistBackendError", "DistNetworkError", "DistStoreError")
_BACKEND_WORDS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")


@dataclass(frozen=True)
class Failure:
    """A failing rank's note.

    Attributes:
        time_s: when it was written, seconds of the machine's clock.
        text: the error, as a person should read it.
        lost_peer: the error is the consequence of another rank's.
        kind: config error, disk full, bad node, numerical, out of memory, lost peer or error.
        host: the machine.
        trace: the traceback, for an error that is not the user's.
        exit_code: that the rank will end with.
    """

    rank: int
    time_s: float
    text: str
    lost_peer: bool
    kind: str = ""
    host: str = ""
    trace: str = ""
    exit_code: int = 1


def describe(error: BaseException, rank: int) -> Failure:
    """The note of an error of this process."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    trace = "" if isinstance(error, UserError) else "".join(traceback.format_exception(error))
    return Failure(
        rank,
        time.time(),
        text,
        lost_peer(error),
        kind_of(error),
        socket.gethostname(),
        trace,
        exit_code=getattr(error, "exit_code", 1),
    )


def kind_of(error: BaseException) -> str:
    """What sort of failure an error is, as `Failure.kind` says it."""
    if lost_peer(error):
        return "lost peer"
    if isinstance(error, NumericalError):
        return "numerical"
    if isinstance(error, NodeError):
        return "bad node"
    if isinstance(error, TakenOverError):
        return "node failure"
    if isinstance(error, DiskFullError):
        return "disk full"
    if isinstance(error, UserError):
        return "config error"
    if isinstance(error, OSError) and error.errno in DiskFullError.NUMBERS:
        return "disk full"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory"
    # the CPU allocator raises a plain RuntimeError
    return "out of memory" if "can't allocate memory" in str(error) else "error"


def lost_peer(error: BaseException) -> bool:
    """Whether the error only says that another rank is gone, silent, or failed itself."""
    if isinstance(error, PeerError) or type(error).__name__ in _BACKEND_ERRORS:
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _BACKEND_WORDS)


def launcher_speaks() -> bool:
    """Whether `launch_local` started this process and tells the user what failed."""
    return FAILURE_DIR in os.environ


def leave_note(failure: Failure) -> None:
    """Write the note for `launch_local` or the batch script, where there is one.

    A folder that cannot be written to (a full disk, one that is gone) may be the failure itself,
    which is told by other ways, too.
    """
    folder = os.environ.get(FAILURE_DIR) or os.environ.get(ATTEMPT_DIR)
    if folder:
        path = _path(Path(folder), failure.rank)
        partial = path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(asdict(failure)))
            partial.replace(path)
        except OSError as error:
            print(f"warning: no note in {path}: {error.strerror}", file=sys.stderr, flush=True)


def leave_mark(rank: int) -> None:
    """Tell `launch_local` that all ranks have come to the end together, and only tidy up now."""
    folder = os.environ.get(FAILURE_DIR)
    if folder:
        _mark(Path(folder), rank).touch()


def has_mark(folder: Path, rank: int) -> bool:
    """Whether this rank has been at the end with all others."""
    return _mark(folder, rank).exists()


def clear_notes(folder: Path, nproc: int) -> None:
    """Remove the notes and marks of an earlier run in the same folder."""
    for rank in range(nproc):
        _path(folder, rank).unlink(missing_ok=True)
        _mark(folder, rank).unlink(missing_ok=True)


def read_notes(folder: Path, nproc: int | None = None) -> dict[int, Failure]:
    """The notes so far, by rank; of all ranks, or of the first `nproc`."""
    paths = sorted(folder.glob("rank_*.failure.json"))
    notes = [Failure(**json.loads(path.read_text())) for path in paths]
    return {note.rank: note for note in notes if nproc is None or note.rank < nproc}


def blamed(codes: Sequence[int | None], notes: Mapping[int, Failure]) -> int:
    """The rank that failed first.

    In this order: an error of its own (the earliest), a signal, an exit code without a note, a
    good end before the others', a lost peer (the earliest).

    Args:
        codes: exit code of each rank; negative: the signal that ended it; None: still running.
    """

    def order(rank: int) -> tuple[int, float, int]:
        note, code = notes.get(rank), codes[rank]
        if note is not None:
            return (4 if note.lost_peer else 0), note.time_s, rank
        if code is None:
            return 5, 0.0, rank
        return (1 if code < 0 else 2 if code else 3), 0.0, rank

    return min(range(len(codes)), key=order)


def _mark(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.ended"


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.failure.json"
