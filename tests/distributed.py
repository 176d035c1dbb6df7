"""Pools of ranks for tests: real processes, started once, reused by every test.

Starting a process that imports torch and deepspeed costs seconds, so a pool keeps its ranks and
their process group; `run` sends them a module-level function. A rank that fails or does not
answer in time ends the pool: the next test that asks gets a fresh one, and no test can hang.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT_S = 180.0


class RankError(AssertionError):
    """A rank raised; carries the first failing rank's traceback."""


def _worker(rank: int, world_size: int, store_path: str, conn: Connection) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(world_size))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store_path, world_size), rank=rank, world_size=world_size
    )
    modules = 0
    while True:
        if len(sys.modules) > modules:
            modules = len(sys.modules)
            gc.collect()  # what imports made is never garbage, and there is much of it
            gc.freeze()
        task = conn.recv()
        if task is None:
            break
        function, kwargs = task
        try:
            conn.send(("ok", function(**kwargs)))
        except BaseException as error:
            conn.send(("error", (type(error).__name__, str(error), traceback.format_exc())))
        _drop_groups()
    dist.destroy_process_group()


def _drop_groups() -> None:
    """Destroy the groups that a task left behind, and their threads.

    Each has three polling threads: after some hundred meshes (1,600 threads a rank were seen) a
    pool did nothing but poll. DeepSpeed keeps some groups for the life of the process.
    """
    import torch.distributed as dist

    kept = {id(dist.group.WORLD)}
    if "deepspeed" in sys.modules:
        kept |= {id(value) for value in vars(sys.modules["deepspeed.utils.groups"]).values()}
    left = [group for group in dist.distributed_c10d._world.pg_map if id(group) not in kept]
    for group in left:
        dist.destroy_process_group(group)
    if left:
        from megascale.parallel.mesh import forget_groups

        forget_groups()


class RankPool:
    """`world_size` processes in one gloo group."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.broken = False
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_worker,
                args=(rank, world_size, f"{self._folder.name}/store", theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], **kwargs: Any) -> list[Any]:
        """Call `function(**kwargs)` on every rank; returns the results in rank order."""
        for connection in self._connections:
            connection.send((function, kwargs))
        results: dict[int, Any] = {}
        while len(results) < self.world_size:
            pending = [c for r, c in enumerate(self._connections) if r not in results]
            ready = wait(pending, timeout=TIMEOUT_S)
            if not ready:
                silent = [r for r in range(self.world_size) if r not in results]
                self.close()
                raise RankError(f"ranks {silent} did not answer within {TIMEOUT_S} s")
            for connection in ready:
                rank = self._connections.index(connection)  # type: ignore[arg-type]
                results[rank] = self._receive(rank)
        return [results[rank] for rank in range(self.world_size)]

    def _receive(self, rank: int) -> Any:
        try:
            status, value = self._connections[rank].recv()
        except EOFError as error:
            self.close()
            raise RankError(f"rank {rank} died") from error
        if status == "error":
            self.close()
            raise RankError(f"rank {rank}: {value[0]}: {value[1]}\n{value[2]}")
        return value

    def close(self) -> None:
        """End the ranks; a pool is not used after that."""
        self.broken = True
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()


class Pools:
    """One pool for each world size, made when first asked for."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}

    def __call__(self, world_size: int) -> RankPool:
        pool = self._pools.get(world_size)
        if pool is None or pool.broken:
            pool = self._pools[world_size] = RankPool(world_size)
        return pool

    def close(self) -> None:
        """End all pools."""
        for pool in self._pools.values():
            if not pool.broken:
                pool.close()
