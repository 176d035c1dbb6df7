"""Starting the ranks of `verify layout`, and judging each layout as soon as it is recorded."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from megascale.cli.config import all_checks
from megascale.config.load import load_config
from megascale.config.problems import ConfigError
from megascale.config.schema import Config
from megascale.launcher.failure import read_notes
from megascale.launcher.forked import Entry, can_fork
from megascale.launcher.local import launch_local
from megascale.verification.layout import SINGLE, Layout

if TYPE_CHECKING:
    from megascale.verification.record import RunRecord
    from megascale.verification.report import Row

# The config's own optimizer, and SGD without clipping: Adam and clipping hide scale.
_SGD = ("optimizer.name=sgd", "optimizer.lr=0.02", "optimizer.grad_clip=0.0")
_SGD_RESETS = ("optimizer.betas=[0.9, 0.95]", "optimizer.eps=1.0e-8")
VARIANTS = ("config", "sgd")

SGD_STEPS = 20
"""Longest run with SGD. A wrong scale of what the optimizer is given shows in its first update,
copies that drift apart later; hundreds of unclipped steps only amplify the rounding of bf16."""

# Divided by the root of its own noise, a gradient of rounding moves a weight by a whole step, in a
# direction that rounding decides: with a smaller eps the single process differs from itself.
_LEAST_EPS = 1e-6
_HAVE_EPS = ("adamw", "lamb", "muon")

# The reference's engine offloads nothing; where states lie is no part of the training.
_AT_HOME = ("parallel.offload_optimizer=false", "parallel.offload_parameters=false")

_EXACTLY = "precision.dtype=fp64"

_STOPPED = (130, 143)
"""Exit codes of ranks that were interrupted or asked to end: no verdict on their layout."""

_POLL_S = 0.1


def changes(config: Path, overrides: Sequence[str], variant: str) -> tuple[str, ...]:
    """What a variant changes in the config."""
    if variant == "sgd":
        return (*_SGD_RESETS, *_SGD)
    optimizer = load(config, overrides, SINGLE).optimizer
    raised = optimizer.name in _HAVE_EPS and optimizer.eps < _LEAST_EPS
    return (f"optimizer.eps={_LEAST_EPS:.1e}",) if raised else ()


def load(config: Path, overrides: Sequence[str], chosen: Layout) -> Config:
    """The config in a layout, checked."""
    everything = [*overrides, *chosen.overrides(), *(_AT_HOME if chosen == SINGLE else ())]
    return load_config(config, everything, checks=all_checks(), world_size=chosen.world_size)


def done_mark(folder: Path, chosen: Layout, rank: int) -> Path:
    """A file that a rank makes when its record of a layout is complete."""
    return folder / str(chosen) / f"done_{rank:05d}"


@dataclass(frozen=True)
class Verification:
    """One comparison of layouts with the single process.

    Attributes:
        config: file. overrides: dotted settings. steps: to compare. device: cpu or cuda.
        entry: what ranks are forked into where that can be, see `launch_local`.
        folder: where ranks write their records; they are removed when they are judged.
        say: prints a line of progress.
    """

    config: Path
    overrides: tuple[str, ...]
    steps: int
    device: str
    folder: Path
    say: Callable[[str], None]
    entry: Entry | None = None
    references: dict[str, RunRecord] = field(default_factory=dict)

    def run(self, chosen: Sequence[Layout]) -> list[Row]:
        """The verdicts, in the order of the number of processes. Starts them.

        Raises:
            typer.Exit: the single process failed, or somebody stopped the ranks.
        """
        rows = self._run(chosen)
        exact = replace(
            self,
            overrides=(*self.overrides, _EXACTLY),
            folder=self.folder / "fp64",
            references={},
        )
        doubtful = [row.layout for row in rows if self._is_for_fp64(row)]
        if not doubtful:
            return rows
        # rounding vanishes in fp64, a mistake does not
        self.say(f"{len(doubtful)} layouts are off a little: once more in fp64")
        settled = {row.layout: row for row in exact._run(doubtful)}
        return [replace(row, exact=settled.get(row.layout)) for row in rows]

    def _run(self, chosen: Sequence[Layout]) -> list[Row]:
        from megascale.verification.report import Row, progress

        rows: list[Row] = []

        def add(row: Row) -> None:
            rows.append(row)
            shown = progress(row, is_settled_later=self._is_for_fp64(row))
            self.say(f"{len(rows)} of {len(chosen)}: {shown}")

        if self._start([SINGLE]):
            raise typer.Exit(2)
        for size in sorted({one.world_size for one in chosen}):
            waiting = [one for one in chosen if one.world_size == size]
            while waiting:
                # ranks are started once for many layouts; after a failure, anew for the rest
                before = len(rows)
                with self._judging(waiting, add) as begin:
                    code = self._start(waiting, begin)
                if code in _STOPPED:
                    raise typer.Exit(code)
                del waiting[: len(rows) - before]
                if code and waiting:
                    failure = _failure(self.folder / "logs", size)
                    failure = failure or f"its processes ended with code {code}"
                    add(Row(waiting.pop(0), {}, failure))
        return rows

    def _start(self, group: Sequence[Layout], started: Callable[[], None] | None = None) -> int:
        """Record these layouts, all of one number of processes; returns the ranks' exit code."""
        self.folder.mkdir(parents=True, exist_ok=True)
        names = self.folder / "layouts"  # hundreds are too long for a command line
        names.write_text(";".join(map(str, group)))
        arguments = ["verify", "ranks", str(self.config), *self.overrides]
        arguments += ["--layouts", str(names), "--steps", str(self.steps)]
        arguments += ["--device", self.device, "--folder", str(self.folder)]
        entry = self.entry if can_fork() else None
        logs = self.folder / "logs"
        return launch_local(arguments, group[0].world_size, logs, entry, started)

    @contextmanager
    def _judging(
        self, waiting: Sequence[Layout], add: Callable[[Row], None]
    ) -> Iterator[Callable[[], None]]:
        """Judge layouts in their order while their ranks run; at the end, what is complete.

        Yields what begins it, in a thread: it is called when the ranks are forked.
        """
        ended = threading.Event()

        def judge() -> None:
            for one in waiting:
                marks = [done_mark(self.folder, one, rank) for rank in range(one.world_size)]
                while not all(mark.exists() for mark in marks):
                    if ended.is_set():  # nothing comes any more
                        return
                    ended.wait(_POLL_S)
                add(self._compare(one))
                shutil.rmtree(self.folder / str(one), ignore_errors=True)

        judged: list[Future[None]] = []
        with ThreadPoolExecutor(1) as pool:
            try:
                yield lambda: judged.append(pool.submit(judge))
            finally:
                ended.set()
        for done in judged:
            done.result()

    def _compare(self, chosen: Layout) -> Row:
        from megascale.engine.capabilities import choose_engine
        from megascale.verification.compare import FP32, FP32_ALONE, TOLERANCES, compare
        from megascale.verification.record import read_record
        from megascale.verification.report import Row

        verdicts, costs = {}, {}
        for variant in VARIANTS:
            settings = changes(self.config, self.overrides, variant)
            checked = load(self.config, [*self.overrides, *settings], chosen)
            tolerance = TOLERANCES[checked.precision.dtype]
            if tolerance is FP32 and choose_engine(checked) == "deepspeed":
                tolerance = FP32_ALONE
            with ExitStack() as stack:
                found = read_record(self.folder / str(chosen) / variant, chosen.world_size)
                stack.callback(found.close)
                train = checked.train
                micro = train.global_batch_size // (train.micro_batch_size * chosen.dp)
                lr = checked.optimizer.lr
                expected = self._reference(variant)
                verdicts[variant] = compare(found, expected, chosen, tolerance, micro, lr)
                costs[variant] = found.sent, found.held
        sent, held = costs["config"]
        return Row(chosen, verdicts, sent=sent, held=held)

    def _reference(self, variant: str) -> RunRecord:
        """The single process's record, opened once."""
        from megascale.verification.record import read_record

        if variant not in self.references:
            self.references[variant] = read_record(self.folder / str(SINGLE) / variant, 1)
        return self.references[variant]

    def _is_for_fp64(self, row: Row) -> bool:
        """Whether something in fp32 is off a little, and fp64 runs on the engine that it ran on."""
        from megascale.engine.capabilities import choose_engine

        if not row.may_be_rounding:
            return False
        before = load(self.config, self.overrides, row.layout)
        if before.precision.dtype != "fp32":
            return False
        try:
            after = load(self.config, (*self.overrides, _EXACTLY), row.layout)
        except ConfigError:
            return False
        return choose_engine(before) == choose_engine(after)


def _failure(log_dir: Path, size: int) -> str:
    """What the rank that failed first noted; "" for one that died without a word."""
    notes = read_notes(log_dir, size)
    first = min(notes.values(), key=lambda note: (note.lost_peer, note.time_s), default=None)
    return "" if first is None else f"rank {first.rank}: {first.text}"
