"""`--nproc N`: N processes on this machine, without torch in the parent and without a port race."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from megascale.errors import UserError
from megascale.launcher.environment import LISTEN_FD

_GRACE_S = 10.0
_TAIL_LINES = 60


def launch_local(arguments: Sequence[str], nproc: int, log_dir: Path) -> int:
    """Run `python -m megascale ARGUMENTS` on `nproc` ranks; returns the exit code of the run.

    Rank 0 writes to this terminal, the others to `log_dir`/rank_XXXXX.log. The first rank that
    fails ends the others within seconds; when it is not rank 0, the end of its log is printed.
    """
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder of the ranks' logs {log_dir}: {error.strerror}",
            rule="a run needs a folder that it may write to",
            remedy="choose another run.output_dir, or free space",
        ) from error
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        ranks = [_start(arguments, rank, nproc, listener, log_dir) for rank in range(nproc)]
    try:
        with _passed_on(ranks):
            failed = _wait(ranks)
    except KeyboardInterrupt:
        _stop(ranks, signal.SIGINT)
        return 130
    if failed is None:
        return 0
    code = ranks[failed].returncode
    _stop(ranks, signal.SIGTERM)
    if failed != 0:
        _print_tail(failed, log_dir)
    if code < 0:
        print(f"rank {failed} was ended by signal {-code}: {_signal_name(-code)}", file=sys.stderr)
    return code if code > 0 else 128 - code


def _start(
    arguments: Sequence[str], rank: int, nproc: int, listener: socket.socket, log_dir: Path
) -> subprocess.Popen[bytes]:
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
    }
    output: IO[bytes] | None = None
    if rank:
        output = open(log_dir / f"rank_{rank:05d}.log", "wb")  # noqa: SIM115 (the child's)
    process = subprocess.Popen(
        [sys.executable, "-m", "megascale", *arguments],
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT if rank else None,
        pass_fds=(listener.fileno(),) if rank == 0 else (),
    )
    if output is not None:
        output.close()
    return process


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all ranks; returns the first one seen to fail, at once, or None."""
    while True:
        codes = [process.poll() for process in ranks]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            # A death makes the others' collectives fail too: the signalled rank is the cause.
            return min(failed, key=lambda rank: (codes[rank] > 0, rank))  # type: ignore[operator]
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


@contextmanager
def _passed_on(ranks: list[subprocess.Popen[bytes]]) -> Iterator[None]:
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


def _stop(ranks: list[subprocess.Popen[bytes]], how: int) -> None:
    deadline = time.monotonic() + _GRACE_S
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


def _print_tail(rank: int, log_dir: Path) -> None:
    path = log_dir / f"rank_{rank:05d}.log"
    lines = path.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
    print(f"rank {rank} failed; the end of {path}:", file=sys.stderr)
    print("\n".join(lines), file=sys.stderr)
