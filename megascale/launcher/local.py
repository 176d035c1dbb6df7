"""`--nproc N`: N processes on this machine, without a port race."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from megascale.errors import UserError
from megascale.launcher.environment import FAILURE_DIR, LISTEN_FD
from megascale.launcher.failure import Failure, blamed, clear_notes, has_mark, read_notes
from megascale.launcher.forked import Entry, ForkedRank, Rank

_POLL_S = 0.05
_GRACE_S = 10.0  # from a signal to the next, stronger one
_END_S = 3.0  # the same when the run has failed: there is nothing to save
_NOTE_S = 5.0  # for a rank to end after it has noted its failure
_EARLY_END_S = 10.0  # for the others to end after a rank has left them
_TIDY_S = 120.0  # for the others to end when all were at the end: a busy machine takes its time
_CAUSE_S = 1.0  # for the cause to be seen after its first consequence
_STACK_S = 0.5  # for a silent rank to write where it is
_TAIL_LINES = 60


def launch_local(
    arguments: Sequence[str],
    nproc: int,
    log_dir: Path,
    entry: Entry | None = None,
    started: Callable[[], None] | None = None,
) -> int:
    """Run `python -m megascale ARGUMENTS` on `nproc` ranks; returns the exit code of the run.

    Rank 0 writes to this terminal, the others to `log_dir`/rank_XXXXX.log. The first rank that
    fails ends the others within seconds, and its error is printed (rank 0 has printed its own).

    Args:
        entry: what `python -m megascale` calls: the ranks are forked from this process and call
            it, too; see `can_fork`. None: they are programs of their own.
        started: called once all ranks are started: from then on threads may run here.
    """
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder of the ranks' logs {log_dir}: {error.strerror}",
            rule="a run needs a folder that it may write to",
            remedy="choose another run.output_dir, or free space",
        ) from error
    clear_notes(log_dir, nproc)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        ranks = [_start(arguments, rank, nproc, listener, log_dir, entry) for rank in range(nproc)]
    try:
        if started is not None:
            started()
        with _passed_on(ranks):
            failed = _wait(ranks, log_dir)
        if not failed:
            return 0
    except KeyboardInterrupt:
        _stop(ranks, signal.SIGINT)
        return 130
    except BaseException:
        _stop(ranks, signal.SIGTERM, _END_S)
        raise
    return _end(ranks, log_dir)


def _start(
    arguments: Sequence[str],
    rank: int,
    nproc: int,
    listener: socket.socket,
    log_dir: Path,
    entry: Entry | None,
) -> Rank:
    port = listener.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // nproc)
    environment = {
        "OMP_NUM_THREADS": str(threads),  # the user's own setting wins
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LISTEN_FD: str(listener.fileno()),
        FAILURE_DIR: str(log_dir.resolve()),
    }
    log = log_dir / f"rank_{rank:05d}.log" if rank else None
    if entry is not None:
        closes = (listener.fileno(),) if rank else ()
        return ForkedRank(entry, arguments, environment, log, closes)
    with ExitStack() as stack:
        return subprocess.Popen(
            [sys.executable, "-m", "megascale", *arguments],
            env=environment,
            stdout=stack.enter_context(open(log, "wb")) if log is not None else None,
            stderr=subprocess.STDOUT if rank else None,
            pass_fds=() if rank else (listener.fileno(),),
        )


def _wait(ranks: Sequence[Rank], log_dir: Path) -> bool:
    """Wait for all ranks; returns at once when one has failed, and whether one has.

    A rank that left a note of its failure but does not end counts after some seconds, and so does
    one that ended well while others go on: these wait for it in vain, unless all have been at the
    end together.
    """
    first_end: float | None = None
    patience_s = _EARLY_END_S
    while True:
        codes = [process.poll() for process in ranks]
        if any(codes):
            return True
        if all(code == 0 for code in codes):
            return False
        notes = read_notes(log_dir, len(ranks)).values()
        if any(time.time() - note.time_s > _NOTE_S for note in notes):
            return True
        if first_end is None and 0 in codes:
            first_end = time.monotonic()
            patience_s = _TIDY_S if has_mark(log_dir, codes.index(0)) else _EARLY_END_S
        if first_end is not None and time.monotonic() - first_end > patience_s:
            return True
        time.sleep(_POLL_S)


def _end(ranks: Sequence[Rank], log_dir: Path) -> int:
    """End what still runs and tell which rank failed first; returns the exit code of the run."""
    deadline = time.monotonic() + _CAUSE_S
    codes, notes, first = _who_failed(ranks, log_dir)
    while time.monotonic() < deadline and (codes[first] is None or _is_consequence(first, notes)):
        time.sleep(_POLL_S)  # the cause may not have been seen yet, or not have ended
        codes, notes, first = _who_failed(ranks, log_dir)
    silent = [rank for rank, code in enumerate(codes) if code is None and rank not in notes]
    waited = codes[first] == 0 or _is_consequence(first, notes)
    if waited and silent:  # they never came: where are they?
        for rank in silent:
            ranks[rank].send_signal(signal.SIGUSR2)
        time.sleep(_STACK_S)
    for rank in silent if waited else ():
        ranks[rank].kill()  # what waits in a collective does not hear SIGTERM
    _stop(ranks, signal.SIGTERM, _END_S)
    _tell(first, codes, notes, silent if waited else [], log_dir)
    code = codes[first]
    if code is None and first in notes:  # a busy machine: it has failed, but not yet ended
        code = notes[first].exit_code
    code = code or 1
    return code if code > 0 else 128 - code


def _who_failed(
    ranks: Sequence[Rank], log_dir: Path
) -> tuple[list[int | None], dict[int, Failure], int]:
    codes = [process.poll() for process in ranks]
    notes = read_notes(log_dir, len(ranks))
    return codes, notes, blamed(codes, notes)


def _is_consequence(rank: int, notes: dict[int, Failure]) -> bool:
    return rank in notes and notes[rank].lost_peer


def _tell(
    first: int,
    codes: list[int | None],
    notes: dict[int, Failure],
    never_came: list[int],
    log_dir: Path,
) -> None:
    """The first failing rank's error on top, then what became of the others."""
    code, note = codes[first], notes.get(first)
    lines = []
    if note is not None and (first or note.lost_peer):  # rank 0 has told its own error already
        lines.append(f"rank {first} failed: {note.text}")
    elif code is not None and code < 0:
        lines.append(f"rank {first} was ended by signal {-code}: {_signal_name(-code)}")
    elif code == 0:
        lines.append(f"rank {first} ended while other ranks waited for it")
    elif note is None and first:
        lines.append(f"rank {first} failed with exit code {code}")
    for rank in never_came:
        lines.append(f"rank {rank} did not answer and was ended")
    for rank in never_came if _is_consequence(first, notes) else [first, *never_came]:
        lines += _tail(rank, log_dir)
    for rank, other in sorted(notes.items()):
        if rank != first and other.text != getattr(note, "text", ""):
            lines.append(f"rank {rank} ended after that: {other.text.splitlines()[0]}")
    print("\n".join(lines), file=sys.stderr, flush=True)


@contextmanager
def _passed_on(ranks: Sequence[Rank]) -> Iterator[None]:
    """Give SIGTERM and SIGUSR1, which ask a run to save, to every rank."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, pass_on) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(ranks: Sequence[Rank], how: int, grace_s: float = _GRACE_S) -> None:
    deadline = time.monotonic() + grace_s
    for process in ranks:
        if process.poll() is None:
            process.send_signal(how)
    for process in ranks:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return "unknown"
    return f"{name} (out of memory?)" if name == "SIGKILL" else name


def _tail(rank: int, log_dir: Path) -> list[str]:
    """The end of a rank's log; rank 0 has none, it writes to the terminal."""
    path = log_dir / f"rank_{rank:05d}.log"
    if not rank or not path.exists():
        return []
    lines = path.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
    return [f"the end of {path}:", *lines] if lines else []
