"""Tasks over worker processes, one task at a time each; a worker that dies is named.

`concurrent.futures` says only that "a process terminated abruptly": neither which, nor by what, nor
in which task, which is what the user needs to know of a worker that ran out of memory.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol

from data_prep.progress import Advance
from megascale.errors import UserError

_SECONDS_BETWEEN_MESSAGES = 0.25
_SECONDS_TO_END = 5.0


@dataclass(frozen=True)
class WorkerUse:
    """What a process used, from its start to the end of its last task."""

    cpu_seconds: float
    peak_rss_bytes: int


class Work(Protocol):
    """What a worker does with a task: picklable; the result is picklable and small."""

    def __call__(self, task: Any, advance: Advance) -> Any: ...


OnResult = Callable[[Any, Any], None]


def available_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    tasks: Sequence[Any], work: Work, workers: int, on_result: OnResult, advance: Advance
) -> list[WorkerUse]:
    """Do every task once, in any order; with one worker, or one task, in this process.

    Args:
        tasks: picklable; `str(task)` is what errors call it.
        work: called as `work(task, advance)`, in the process that does the task.
        workers: most processes at a time.
        on_result: called here with each task and its result, as they come.
        advance: called here with what the workers' `advance` was called with.

    Returns:
        What each process used.

    Raises:
        UserError: raised by `work`, or a worker was killed. Running tasks are given up.
        RuntimeError: `work` has a bug; holds the worker's traceback.
    """
    if min(workers, len(tasks)) <= 1:
        for task in tasks:
            on_result(task, work(task, advance))
        return [_own_use()]
    with _started(work, min(workers, len(tasks))) as processes:
        return _deal_out(list(reversed(tasks)), processes, on_result, advance)


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    task: Any = None
    use: WorkerUse = WorkerUse(0.0, 0)


@contextmanager
def _started(work: Work, count: int) -> Iterator[list[_Worker]]:
    # Spawned, not forked: the libraries behind tokenizers have threads of their own.
    context = multiprocessing.get_context("spawn")
    workers: list[_Worker] = []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            process.start()
            theirs.close()
            workers.append(_Worker(process, ours))
        yield workers
    finally:
        for worker in workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in workers:
            worker.process.join(_SECONDS_TO_END)
            worker.process.kill()


def _deal_out(
    waiting: list[Any], workers: list[_Worker], on_result: OnResult, advance: Advance
) -> list[WorkerUse]:
    busy = {worker.connection: worker for worker in workers}
    for worker in workers:
        _hand_over(worker, waiting)
    while busy:
        for connection in wait(list(busy)):
            worker = busy[connection]  # type: ignore[index]
            try:
                kind, content = worker.connection.recv()
            except (EOFError, OSError):
                raise _killed(worker) from None
            if kind == "advance":
                advance(content)
            elif kind == "done":
                result, worker.use = content
                on_result(worker.task, result)
                _hand_over(worker, waiting)
                if worker.task is None:
                    del busy[worker.connection]
            elif kind == "refused":
                what, rule, remedy = content
                raise UserError(what, rule=rule, remedy=remedy)
            else:
                raise RuntimeError(f"a worker failed in {worker.task}:\n{content}")
    return [worker.use for worker in workers]


def _hand_over(worker: _Worker, waiting: list[Any]) -> None:
    worker.task = waiting.pop() if waiting else None
    with suppress(BrokenPipeError):  # it is dead: the next look at its connection tells
        worker.connection.send(worker.task)


def _killed(worker: _Worker) -> UserError:
    worker.process.join(_SECONDS_TO_END)
    code = worker.process.exitcode
    how = f"ended with exit code {code}"
    if code is not None and code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    return UserError(
        f"the worker process {worker.process.pid} {how} in {worker.task}",
        rule="a worker lives until its shards are done; the kernel sends SIGKILL when memory ends",
        remedy="finished shards are kept: run the command again to continue, with fewer --workers "
        "if memory was short",
    )


def _serve(connection: Connection, work: Work) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # A parent that was killed is gone from the pipe a moment before this process ends with it.
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _work_off(connection, work)


def _work_off(connection: Connection, work: Work) -> None:
    advance = _reporter(connection)
    while (task := connection.recv()) is not None:
        try:
            result = work(task, advance)
        except UserError as error:
            connection.send(("refused", (error.what, error.rule, error.remedy)))
            return
        except BaseException:
            connection.send(("failed", traceback.format_exc()))
            return
        connection.send(("done", (result, _own_use())))


def _end_with_parent() -> None:
    """A worker whose parent was killed must not go on writing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _reporter(connection: Connection) -> Advance:
    pending, last = 0, time.monotonic()

    def advance(done_bytes: int) -> None:
        nonlocal pending, last
        pending += done_bytes
        if time.monotonic() - last >= _SECONDS_BETWEEN_MESSAGES:
            connection.send(("advance", pending))
            pending, last = 0, time.monotonic()

    return advance


def _own_use() -> WorkerUse:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return WorkerUse(used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)
