"""Saving and loading against torch's DCP and DeepSpeed: MB per CPU-second, and the stall of a step.

    python -m tools.bench.checkpoint --megabytes 400 --json docs/benchmarks/checkpoint.json
    python -m tools.bench.checkpoint --steps CONFIG      two processes that save while they train

Rounds are interleaved; the median of each is printed. CPU seconds are user + system time of the
process; a memory file system leaves the disk out. Each load is the first one of a process of its
own, as in a resume: one that loads again and again gets its buffers from memory that is mapped
already.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megascale.checkpoint.manager import CheckpointManager
from megascale.checkpoint.reader import CheckpointReader
from megascale.parallel.fragment import Fragment, whole_box
from tools.bench.job import print_table, write_table

KINDS = ("master", "exp_avg", "exp_avg_sq")
COLUMNS = ("MB per CPU-second", "wall s", "share of a CPU")


def main() -> None:
    """Print one line a measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/megascale-bench"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", metavar="CONFIG", help="measure steps of this run instead")
    parser.add_argument("--load", metavar="WORK", help="only load, once; prints its seconds")
    parser.add_argument("--json", type=Path, help="write the results here, too")
    arguments = parser.parse_args()
    if arguments.steps:
        _steps_during_saves(arguments.steps, arguments.folder)
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    state = make_state(arguments.megabytes)
    if arguments.load:
        print(json.dumps(_timed(_works(state, arguments.folder, arguments.load)[arguments.load])))
        return
    size = sum(t.numel() * 4 for kinds in state.values() for t in kinds.values())
    works = _works(state, arguments.folder)
    for _ in range(2):  # the next one finds the files of the first
        works["ours save, reuse_files"]()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(arguments.rounds):
        for name, work in works.items():
            if name in _LOADS:
                times[name].append(_loaded_by_another(name, arguments))
                continue
            _clear(arguments.folder, name)  # removing old files is not what is measured
            times[name].append(_timed(work))
    table = [(name, _cells(size, rows)) for name, rows in times.items()]
    print_table(COLUMNS, table)
    written = sum(p.stat().st_size for p in (arguments.folder / "ours").rglob("*") if p.is_file())
    stall = _stall(state, arguments.folder, arguments.rounds)
    note = (
        f"{size / 1e6:.0f} MB of fp32 weights and moments, one process, in {arguments.folder}; "
        f"bytes written / state {written / size:.4f}; a save in the background makes its step wait "
        f"for {stall:.3f} of a whole save, where nothing else is done meanwhile; medians of "
        f"{arguments.rounds} rounds, glibc's allocator."
    )
    print(note)
    if arguments.json:
        write_table(arguments.json, "Saving and loading", note, COLUMNS, table, times)
    _disk(arguments.megabytes)
    shutil.rmtree(arguments.folder, ignore_errors=True)
    dist.destroy_process_group()


_LOADS = {  # and what they are part of
    "ours verify and load": "ours",
    "torch DCP load": "torch DCP",
    "DeepSpeed load_checkpoint": "DeepSpeed",
    "raw read": "raw",
}

_NEW_FILES = {  # and the folder that they write
    "ours save, new files": "ours",
    "torch DCP save": "dcp",
    "DeepSpeed save_checkpoint": "deepspeed",
    "raw write": "raw",
}


def _works(state: Any, folder: Path, only: str | None = None) -> dict[str, Callable[[], Any]]:
    """What is measured, by name; `only` those that belong to one load."""
    makers = {"ours": _ours, "torch DCP": _dcp, "DeepSpeed": _deepspeed, "raw": _raw}
    wanted = [make for name, make in makers.items() if only is None or _LOADS[only] == name]
    return {name: work for make in wanted for name, work in make(state, folder).items()}


def _loaded_by_another(name: str, arguments: argparse.Namespace) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of the load `name`, the first of a new process."""
    command = [sys.executable, "-m", "tools.bench.checkpoint", "--load", name]
    command += ["--folder", str(arguments.folder), "--megabytes", str(arguments.megabytes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    cpu, wall = json.loads(done.stdout.splitlines()[-1])
    return cpu, wall


def _cells(size: int, rows: list[tuple[float, float]]) -> list[str]:
    cpu, wall = (statistics.median(row[part] for row in rows) for part in (0, 1))
    share = statistics.median(cpu / wall for cpu, wall in rows)
    return [f"{size / 1e6 / cpu:,.0f}", f"{wall:.3f}", f"{share:.2f}"]


def _clear(folder: Path, name: str) -> None:
    """Remove what the last round of a writer of new files left."""
    part = _NEW_FILES.get(name)
    if part is not None:
        shutil.rmtree(folder / part, ignore_errors=True)
        (folder / part).mkdir(parents=True)


def make_state(megabytes: int) -> dict[str, dict[str, torch.Tensor]]:
    """Parameters of 16 MB with two moments each, of `megabytes` in all."""
    count = max(1, megabytes // 48)
    return {
        f"model.layers.{i}.weight": {kind: torch.randn(2048, 2048) for kind in KINDS}
        for i in range(count)
    }


def _fragments(state: dict[str, dict[str, torch.Tensor]]) -> list[Fragment]:
    return [
        Fragment(name, kind, tuple(t.shape), whole_box(tuple(t.shape)), 0, t.view(-1))
        for name, kinds in state.items()
        for kind, t in kinds.items()
    ]


def _ours(state: Any, folder: Path) -> dict[str, Callable[[], None]]:
    manager = CheckpointManager(str(folder / "ours"))

    def load() -> None:
        reader = CheckpointReader(manager.path(1))
        assert reader.damage() is None  # a resume compares every checksum
        for fragment in _fragments(state):
            reader.fill(fragment)
        reader.close()

    def save() -> None:
        manager.save(1, _fragments(state), {}, {})

    over = CheckpointManager(str(folder / "over"), keep_last=1, reuse=True)
    steps = itertools.count(1)

    def save_over() -> None:
        over.save(next(steps), _fragments(state), {}, {})

    return {
        "ours save, new files": save,
        "ours save, reuse_files": save_over,
        "ours verify and load": load,
    }


def _dcp(state: Any, folder: Path) -> dict[str, Callable[[], None]]:
    import torch.distributed.checkpoint as dcp

    flat = {f"{kind}/{name}": t for name, kinds in state.items() for kind, t in kinds.items()}
    path = str(folder / "dcp")
    return {
        "torch DCP save": partial(dcp.save, flat, checkpoint_id=path),
        "torch DCP load": partial(dcp.load, flat, checkpoint_id=path),
    }


def _deepspeed(state: Any, folder: Path) -> dict[str, Callable[[], None]]:
    from tools.bench.deepspeed_peer import works  # its import takes seconds

    return works(state, folder)


def _stall(state: Any, folder: Path, rounds: int) -> float:
    """How long the step would wait if its update came at once, of a save: for the whole copy.

    `--steps` shows what is left of that when a forward and backward pass comes first.
    """
    fragments = _fragments(state)
    blocking, whole = [], []
    manager = CheckpointManager(str(folder / "async"), asynchronous=True)
    other = CheckpointManager(str(folder / "sync"))
    for number in range(rounds + 1):
        blocking.append(_timed(partial(_save_and_wait, manager, number, fragments)))
        manager.finish()
        whole.append(_timed(partial(other.save, number, fragments, {}, {})))
        shutil.rmtree(folder / "async")
        shutil.rmtree(folder / "sync")
    waits, saves = (statistics.median(wall for _, wall in rows[1:]) for rows in (blocking, whole))
    return waits / saves


def _save_and_wait(manager: CheckpointManager, step: int, fragments: list[Fragment]) -> None:
    manager.save(step, fragments, {}, {})
    manager.wait_until_copied()


def _steps_during_saves(config: str, folder: Path) -> None:
    """Two processes that save at every 8th step: how long they stand still, and their steps."""
    stood = {}
    for setting in ("false", "true"):
        rows = _trained(config, folder, f"checkpoint.async_save={setting}")
        waits = [row["checkpoint_s"] for row in rows if row["step"] > 8 and row["step"] % 8 == 1]
        stood[setting] = statistics.median(waits)
        least, most = 1e3 * min(waits), 1e3 * max(waits)
        print(
            f"async_save={setting}: training stood still for {1e3 * stood[setting]:.1f} ms a save"
        )
        print(f"    (median of {len(waits)}, from {least:.1f} to {most:.1f})")
        _beside_and_between([row["step_time_s"] for row in rows])
    print(f"blocking part of a synchronous save: {stood['true'] / stood['false']:.3f}")
    shutil.rmtree(folder, ignore_errors=True)


def _trained(config: str, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """The metrics of a run of two processes."""
    command = [sys.executable, "-m", "megascale", "train", config, "--nproc", "2"]
    command += [f"run.output_dir={folder}", "checkpoint.save_interval=8", "checkpoint.keep_last=2"]
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([*command, *overrides], check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _beside_and_between(times: list[float]) -> None:
    """Print the steps right after a save against those between saves.

    Without async_save nothing goes on then: what differs there is no cost of it.
    """
    after = {
        part: [t for s, t in enumerate(times, 1) if s > 8 and s % 8 == part] for part in range(8)
    }
    beside = statistics.median([*after[1], *after[2]])
    between = statistics.median([*after[4], *after[5], *after[6], *after[7]])
    for part, rows in after.items():
        print(f"step {part} after a save: median {statistics.median(rows):.4f} s of {len(rows)}")
    print(f"slower beside a save (steps 1, 2 against 4 to 7): {100 * (beside / between - 1):.1f} %")


def _disk(megabytes: int) -> None:
    """A raw write and fsync of the same minute, beside which disk figures are read."""
    path, block = Path("bench.raw"), bytes(1 << 20)
    started = time.perf_counter()
    with open(path, "wb") as stream:
        for _ in range(megabytes):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    print(f"raw write + fsync here   {megabytes / (time.perf_counter() - started):8.0f} MB/s wall")
    path.unlink()


def _raw(state: Any, folder: Path) -> dict[str, Callable[[], None]]:
    """What the file system itself costs: the tensors' bytes, written and read, nothing else."""
    path = folder / "raw" / "state"

    def save() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb", buffering=0) as stream:
            for kinds in state.values():
                for tensor in kinds.values():
                    stream.write(memoryview(tensor.numpy()).cast("B"))

    def load() -> None:
        with open(path, "rb", buffering=0) as stream:
            for kinds in state.values():
                for tensor in kinds.values():
                    stream.readinto(memoryview(tensor.numpy()).cast("B"))

    return {"raw write": save, "raw read": load}


def _timed(work: Callable[[], Any]) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of `work`."""
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.perf_counter() - started


if __name__ == "__main__":
    main()
