"""Peers of several processes: how they are started and meet, and what each tells of its memory."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tools.bench.job import Job, Meter, as_json

ROOT = Path(__file__).resolve().parents[2]
_MEET = "MEGASCALE_BENCH_MEET"

Batch = tuple[torch.Tensor, torch.Tensor]
Step = Callable[[Sequence[Batch]], float]


def start_ranks(
    module: str, job: Job, variant: str, ranks: int, library: str = "", timeout_s: float = 1800
) -> list[dict[str, Any]]:
    """Run `tools.bench.peers.MODULE` on so many processes; what each of them printed.

    Raises:
        RuntimeError: one did not print its line; with the end of what it said.
    """
    command = [sys.executable, "-m", f"tools.bench.peers.{module}"]
    command += ["--job", as_json(job), "--variant", variant]
    with tempfile.TemporaryDirectory(prefix="megascale-bench-") as folder, ExitStack() as stack:
        started = []
        for rank in range(ranks):
            said = stack.enter_context(open(Path(folder) / f"{rank}.err", "wb+"))
            environment = {
                **os.environ,
                **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(job.threads)),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LD_PRELOAD": library,
                "DS_ACCELERATOR": "cpu",
                "HF_HUB_OFFLINE": "1",
                _MEET: folder,
            }
            one = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=said
            )
            stack.callback(one.kill)  # a rank whose peer failed waits for it
            started.append((one, said))
        return [_result(one, said, timeout_s) for one, said in reversed(started)][::-1]


def _result(process: subprocess.Popen[bytes], said: Any, timeout_s: float) -> dict[str, Any]:
    printed, _ = process.communicate(timeout=timeout_s)
    lines = [line for line in printed.decode().splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        said.seek(0)
        text = said.read().decode(errors="replace")[-1500:]
        raise RuntimeError(f"{process.args}: code {process.returncode}\n{text}")
    return json.loads(lines[-1])


# in a rank -------------------------------------------------------------------------------------


def join() -> tuple[int, int, Path]:
    """Meet the other ranks (gloo); rank, their number, and a folder that all share."""
    rank, size, folder = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.environ[_MEET]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    return rank, size, Path(folder)


def run_ranks(job: Job, build: Callable[[], Step], passes: int) -> None:
    """Build, run the job's steps of `passes` micro-batches a rank, and print the report.

    Besides the meter's: resident MB before the build, the most during it (`start_mb`) and the most
    during the measured steps (`steady_mb`); `live_bytes` of all tensors after the last step.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    gc.collect()
    forget_peak()
    before = resident_mb("VmRSS")
    step = build()
    start = resident_mb("VmHWM")
    meter = Meter(job)
    for index in range(job.warmup + job.steps):
        first = (index * size + rank) * passes
        batches = [job.batch(first + part) for part in range(passes)]
        if index == job.warmup:
            forget_peak()
        meter.begin()
        meter.end(step(batches))
    steady = resident_mb("VmHWM")
    del batches
    meter.report(before_mb=before, start_mb=start, steady_mb=steady, live_bytes=live_tensor_bytes())


def forget_peak() -> None:
    """Let VmHWM begin at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_mb(what: str) -> float:
    """VmRSS (now) or VmHWM (the most since `forget_peak`) of this process, MB of 2**20 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def live_tensor_bytes() -> int:
    """Bytes of all storages that torch made and tensors of this process hold, in whatever library.

    Memory that the ranks of a machine share for their collectives is none of them.
    """
    gc.collect()
    seen = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and item.device.type == "cpu":
            local = getattr(item, "_local_tensor", item)
            storage = local.untyped_storage()
            if storage.resizable():  # torch's own
                seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())
