"""`megascale profile CONFIG`: where the time and memory of a step go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from megascale.cli.config import ConfigFile, Overrides, all_checks
from megascale.cli.process import distributed_process, launch_ranks
from megascale.cli.train import Nproc
from megascale.config.load import load_config
from megascale.config.schema import Config

if TYPE_CHECKING:
    from megascale.training.profiling import Profile, Share

FOLDER = "profile"
"""Below run.output_dir."""


def profile(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Nproc = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to record, after two others.")] = 3,
) -> None:
    """Run a few steps under torch's profiler; nothing is saved but the profile.

    Below run.output_dir/profile: a Chrome trace of each rank (chrome://tracing, ui.perfetto.dev)
    and rank 0's numbers as profile.json.
    """
    from megascale.engine.capabilities import choose_engine
    from megascale.launcher.environment import world_size_of

    checked = load_config(
        config, overrides or (), checks=all_checks(), world_size=world_size_of(nproc)
    )
    folder = Path(checked.run.output_dir) / FOLDER
    if launch_ranks(nproc, folder / "logs", checked.run.device, choose_engine(checked)):
        return
    with distributed_process(checked.run.device, checked.parallel.collective_timeout_s) as device:
        _run(checked, device, steps, folder)


def _run(config: Config, device: object, steps: int, folder: Path) -> None:
    import torch

    from megascale.engine.factory import DTYPES
    from megascale.training.assemble import assemble_step
    from megascale.training.datasets import open_corpora, resolve_vocab_size
    from megascale.training.hardware import memory_bytes, peak_flops
    from megascale.training.profiling import profile_steps
    from megascale.training.tasks.registry import build_task

    assert isinstance(device, torch.device)
    parts = assemble_step(config, device)
    task = build_task(resolve_vocab_size(config, open_corpora(config)))
    peak = peak_flops(device, DTYPES[config.precision.dtype])
    rank = parts.mesh.rank
    trace = folder / f"trace_rank_{rank:05d}.json"
    found = profile_steps(parts, steps, trace, task.flops_per_sample(), peak)
    parts.loader.close()
    parts.engine.close()
    if parts.mesh.is_main:
        numbers = {**found.as_json(), "memory_bytes": memory_bytes(device)}
        (folder / "profile.json").write_text(json.dumps(numbers, indent=1) + "\n")
        _show(found, memory_bytes(device), folder, Console())


def _show(found: Profile, memory: int, folder: Path, console: Console) -> None:
    mfu = found.model_flops / found.peak / found.wall_seconds
    console.print(
        f"{found.wall_seconds * 1e3:.1f} ms a step of this rank, MFU {mfu:.2f} against "
        f"{found.peak / 1e9:.0f} GFLOP/s, {memory / 2**20:.0f} MiB of memory"
    )
    for title, shares in (
        ("Phase", found.phases),
        ("Module, forward and backward", found.modules),
        ("Kind of work", found.kinds),
    ):
        console.print(_table(title, shares, found.wall_seconds))
    if found.collectives:
        console.print(_collectives(found))
    gap = Table("What the step's time is", "ms", "share")
    for reason, seconds in found.gap():
        gap.add_row(reason, f"{seconds * 1e3:.1f}", f"{seconds / found.wall_seconds:.0%}")
    console.print(gap)
    console.print(f"traces and numbers: {folder}", soft_wrap=True)


def _collectives(found: Profile) -> Table:
    table = Table("Collective, beside the step", "calls", "ms")
    for name, one in sorted(found.collectives.items(), key=lambda item: -item[1].seconds):
        table.add_row(name, f"{one.calls:.0f}", f"{one.seconds * 1e3:.1f}")
    return table


def _table(title: str, shares: dict[str, Share], whole: float) -> Table:
    table = Table(title, "ms", "share", "GFLOP/s", "MiB kept")
    for name, share in sorted(shares.items(), key=lambda item: -item[1].seconds):
        if share.seconds < 1e-3 * whole:
            continue
        rate = f"{share.flops / share.seconds / 1e9:.0f}" if share.flops else ""
        kept = f"{share.kept_bytes / 2**20:.1f}" if share.kept_bytes > 2**16 else ""
        percent = f"{share.seconds / whole:.0%}"
        table.add_row(name, f"{share.seconds * 1e3:.1f}", percent, rate, kept)
    return table
