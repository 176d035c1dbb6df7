"""The frame of every step that goes shard by shard: parallel, restartable, all or nothing.

A step cuts its input into named shards, in a way that depends on the input and its options only,
and says what it does with one. The rest is here:

    OUT                    appears by one rename, when all is done
    .OUT.lock              held while a process works on OUT
    .OUT.unfinished/       what is done so far
        .run.json          the identity of the run: input and options
        SHARD*             files of finished shards
        .done/SHARD.json   marker, written after the shard's files: sizes, xxh3, counts, skips
        .SHARD.PID.tmp/    the shard that a process is at; nothing reads it

A run that was killed anywhere and is started again takes up the finished shards and goes on. A
run with another identity is refused: its shards would not fit to those that are there.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from data_prep.outputs import check_output_folder, may_replace
from data_prep.progress import Advance, progress_of_bytes
from data_prep.report import REPORT_NAME, make_report
from data_prep.skips import SkipReport
from data_prep.worker_pool import WorkerUse, run_tasks
from megascale.data.atomic_files import (
    disk_errors,
    file_checksum,
    fsync_path,
    full_disk_errors,
    move_into_place,
    sync_tree,
    write_file,
)
from megascale.errors import UserError
from megascale.file_lock import FileLock

_RUN_NAME = ".run.json"
_DONE_FOLDER = ".done"
_VERSION = 1


@dataclass(frozen=True)
class ShardTask:
    """One shard to make.

    Attributes:
        name: unique in the run and fit for a file name; the shard's files should begin with it.
        size: bytes of input, for progress.
        content: what the step needs to know of it; picklable.
    """

    name: str
    size: int
    content: Any = None

    def __str__(self) -> str:
        return f"shard {self.name}"


@dataclass(frozen=True)
class FileRecord:
    """Size and xxh3_128 of a finished file."""

    bytes: int
    xxh3: str


@dataclass
class ShardResult:
    """What became of a shard, as its marker keeps it.

    Attributes:
        counts: numbers that the report sums over shards, such as documents and tokens.
        skips: what was left out.
        details: anything else that JSON can hold.
        files: filled in by the runner: file name -> size and checksum.
    """

    counts: dict[str, int] = field(default_factory=dict)
    skips: SkipReport = field(default_factory=SkipReport)
    details: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ShardResult:
        """From what a marker holds."""
        files = {name: FileRecord(**record) for name, record in content["files"].items()}
        skips = SkipReport(**content["skips"])
        return cls(content["counts"], skips, content["details"], files)


@dataclass(frozen=True)
class Share:
    """The part of a run that one of `count` processes does, on any machine: each count-th shard.

    Shares make shards only; afterwards an ordinary run of the same step finds all shards there and
    finishes it.
    """

    rank: int
    count: int


class ShareDone(Exception):
    """The end of a run that was opened for a share: its shards are made, others may not be."""


class ShardWork(Protocol):
    """What a step does with a shard; picklable, one copy a process.

    Writes the shard's files into the empty `folder` under their final names, calls `advance` with
    bytes of input done since the last call, and gives the same files for the same task whenever
    and wherever it runs.
    """

    def __call__(self, task: ShardTask, folder: Path, advance: Advance) -> ShardResult: ...


@dataclass
class RunOutcome:
    """All shards of a run.

    Attributes:
        results: shard name -> result, in the order of the tasks.
        made: names of the shards that this run made; the others were there before.
        uses: what each process used.
    """

    results: dict[str, ShardResult]
    made: list[str]
    uses: list[WorkerUse]

    @property
    def skips(self) -> SkipReport:
        """Everything that was left out, in shard order."""
        return SkipReport.merged(result.skips for result in self.results.values())

    @property
    def counts(self) -> dict[str, int]:
        """The sums of the shards' counts."""
        return sum_counts(list(self.results.values()))

    @property
    def made_counts(self) -> dict[str, int]:
        """The sums over the shards that this run made."""
        return sum_counts([self.results[name] for name in self.made])


class ShardRun:
    """One run of a step, from `open_run`.

    Attributes:
        output: the folder that is to be made.
        folder: where it is made; files that concern all shards are written here too.
    """

    def __init__(
        self,
        output: Path,
        step: str,
        identity: dict[str, Any],
        replaceable: Callable[[Path], bool],
        share: Share | None = None,
    ) -> None:
        self.output, self.step, self.identity, self.share = output, step, identity, share
        self.folder = output.with_name(f".{output.name}.unfinished")
        self._replaceable = replaceable
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time since the run was opened."""
        return time.monotonic() - self._started

    def run(self, tasks: Sequence[ShardTask], work: ShardWork, workers: int) -> RunOutcome:
        """Make all shards that are not there yet.

        Args:
            tasks: the same for the same identity, whatever `workers` is.
            work: what to do with a task.
            workers: most processes at a time, at least 1.

        Raises:
            UserError: raised by `work`, a worker was killed, or the disk is full. Shards that
                are finished stay and are not made again.
            ShareDone: the run was opened for a share, which is done now.
        """
        check_workers(workers)
        assert len({task.name for task in tasks}) == len(tasks), "names of shards are unique"
        found = {task.name: load_marker(self.folder, task.name) for task in tasks}
        if self.share:
            tasks = tasks[self.share.rank :: self.share.count]
        missing = [task for task in tasks if found[task.name] is None]
        if done := len(tasks) - len(missing):
            print(f"{self.step}: {done} of {len(tasks)} shards are done, going on", file=sys.stderr)
        total = sum(task.size for task in tasks)
        with progress_of_bytes(self.step, total) as advance:
            advance(total - sum(task.size for task in missing))
            uses = run_tasks(
                missing,
                partial(complete_shard, self.folder, work),
                workers,
                lambda task, result: found.update({task.name: result}),
                advance,
            )
        if self.share:
            raise ShareDone
        results = {name: result for name, result in found.items() if result is not None}
        assert len(results) == len(tasks)
        return RunOutcome(results, [task.name for task in missing], uses)

    def finish(self, outcome: RunOutcome, more: dict[str, Any] | None = None) -> None:
        """Write `report.json` and give the folder its final name.

        Args:
            outcome: from `run`.
            more: further entries of the report.
        """
        report = make_report(
            self.step,
            self.identity,
            outcome.counts,
            outcome.made_counts,
            outcome.skips,
            self.seconds,
            outcome.uses,
        )
        report["shards"] = {"all": len(outcome.results), "made_by_this_run": len(outcome.made)}
        content = json.dumps({**report, **(more or {})}, indent=2, ensure_ascii=False) + "\n"
        with disk_errors(self.output):
            write_file(self.folder / REPORT_NAME, content.encode("utf-8", "backslashreplace"))
            sync_tree(self.folder)
            move_into_place(self.folder, self.output, self._replaceable)
        tidy_output(self.output)


@contextmanager
def open_run(
    output: Path,
    step: str,
    identity: dict[str, Any],
    marker: str,
    overwrite: bool = False,
    share: Share | None = None,
) -> Iterator[ShardRun]:
    """Take hold of an output folder for one run of a step.

    Args:
        output: the folder to make.
        step: its name, for messages and the report.
        identity: all that decides the result, as JSON: a fingerprint of the input's content (see
            `describe_source`), tokenizer, options. Not: number of workers, paths of output.
        marker: a file that a finished output of this step holds, see `check_output_folder`.
        overwrite: replace a finished output; drop an unfinished one of another identity.
        share: make some of the shards only, beside other processes that make the others.

    Raises:
        UserError: another process holds the output, it may not be replaced, or an unfinished run
            has another identity.
    """
    output = Path(os.path.abspath(output))
    check_output_folder(output, marker, overwrite)
    run = ShardRun(
        output, step, identity, lambda path: overwrite and may_replace(path, marker), share
    )
    if share:
        _join_run(run)
        with full_disk_errors(output):
            yield run
        return
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output.with_name(f".{output.name}.lock"), partial(_taken, output))
    try:
        _prepare(run, overwrite)
        with full_disk_errors(output):
            yield run
    finally:
        _leave(run.folder)
        lock.release()


def _join_run(run: ShardRun) -> None:
    """Begin or enter an unfinished folder that others may enter at the same time."""
    identity = _full_identity(run)
    if (previous := _previous_identity(run.folder)) not in (None, identity):
        raise _other_identity(run, previous, identity)
    with disk_errors(run.folder):
        (run.folder / _DONE_FOLDER).mkdir(parents=True, exist_ok=True)
        if previous is None:
            content = json.dumps(identity, indent=2, ensure_ascii=False) + "\n"
            write_file(run.folder / _RUN_NAME, content.encode())


def finished_report(output: Path, step: str, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The report of an output that was finished by the same step with the same identity."""
    try:
        report = json.loads((output / REPORT_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(report, dict) or report.get("step") != step:
        return None
    if report.get("identity") != json.loads(json.dumps(identity)):
        return None
    tidy_output(output)
    return report


def tidy_output(output: Path) -> None:
    """Remove what only an unfinished run needs; a run killed right after its last rename has it."""
    shutil.rmtree(output / _DONE_FOLDER, ignore_errors=True)
    (output / _RUN_NAME).unlink(missing_ok=True)


def complete_shard(folder: Path, work: ShardWork, task: ShardTask, advance: Advance) -> ShardResult:
    """Make one shard in the unfinished folder: files under final names, then its marker.

    Runs in a worker; also what a task of another scheduler calls.
    """
    reported = 0

    def count(done_bytes: int) -> None:
        nonlocal reported
        reported += done_bytes
        advance(done_bytes)

    scratch = folder / f".{task.name}.{os.getpid()}.tmp"
    with full_disk_errors(folder):
        shutil.rmtree(scratch, ignore_errors=True)  # of a machine that died at this task
        scratch.mkdir()
        try:
            result = work(task, scratch, count)
            for path in sorted(scratch.iterdir()):
                result.files[path.name] = FileRecord(path.stat().st_size, file_checksum(path))
                fsync_path(path)
                os.replace(path, folder / path.name)
            fsync_path(folder)
            content = json.dumps({"shard": task.name, **asdict(result)}, ensure_ascii=False)
            write_file(_marker_path(folder, task.name), content.encode("utf-8", "backslashreplace"))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    advance(task.size - reported)
    return result


def load_marker(folder: Path, name: str) -> ShardResult | None:
    """The result of a finished shard, or None when it is not there whole."""
    try:
        result = ShardResult.from_json(json.loads(_marker_path(folder, name).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for file, record in result.files.items():
        path = folder / file
        if not path.is_file() or path.stat().st_size != record.bytes:
            return None
    return result


def sum_counts(results: Sequence[ShardResult]) -> dict[str, int]:
    """The counts of several shards added up."""
    names = dict.fromkeys(itertools.chain.from_iterable(result.counts for result in results))
    return {name: sum(result.counts.get(name, 0) for result in results) for name in names}


def check_workers(workers: int) -> None:
    """Refuse a number of workers that is not positive."""
    if workers < 1:
        raise UserError(
            f"--workers {workers}",
            rule="at least one process does the work",
            remedy="leave it out to use every processor",
        )


def _marker_path(folder: Path, name: str) -> Path:
    return folder / _DONE_FOLDER / f"{name}.json"


def _prepare(run: ShardRun, overwrite: bool) -> None:
    """The unfinished folder, empty or with shards of the same identity."""
    identity, previous = _full_identity(run), _previous_identity(run.folder)
    if previous != identity:
        if previous is not None and not overwrite and _has_markers(run.folder):
            raise _other_identity(run, previous, identity)
        shutil.rmtree(run.folder, ignore_errors=True)
        with disk_errors(run.folder):
            (run.folder / _DONE_FOLDER).mkdir(parents=True)
            content = json.dumps(identity, indent=2, ensure_ascii=False) + "\n"
            write_file(run.folder / _RUN_NAME, content.encode())
    _remove_scratch(run.folder)
    shutil.rmtree(run.folder.with_suffix(".old"), ignore_errors=True)


def _full_identity(run: ShardRun) -> Any:
    identity = {"format": "megascale-run", "version": _VERSION, "step": run.step, **run.identity}
    return json.loads(json.dumps(identity))


def _previous_identity(folder: Path) -> Any:
    """What an unfinished folder was begun with; None: nothing was finished, it comes first."""
    try:
        return json.loads((folder / _RUN_NAME).read_bytes())
    except (OSError, ValueError):
        return None


def _has_markers(folder: Path) -> bool:
    return any((folder / _DONE_FOLDER).glob("*.json"))


def _leave(folder: Path) -> None:
    """After a run that did not finish: keep what can be continued, remove the rest."""
    if not _has_markers(folder):
        shutil.rmtree(folder, ignore_errors=True)
    _remove_scratch(folder)


def _remove_scratch(folder: Path) -> None:
    """What workers that were killed left: shards they were at, and half-written markers."""
    for entry in folder.glob(".*.tmp"):
        shutil.rmtree(entry, ignore_errors=True)
    for entry in folder.glob(f"{_DONE_FOLDER}/.*.tmp"):
        entry.unlink(missing_ok=True)


def _other_identity(run: ShardRun, previous: Any, identity: dict[str, Any]) -> UserError:
    before = _flat(previous)
    now = _flat(identity)
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    values = "; ".join(
        f"{name}: {before.get(name)} before, now {now.get(name)}" for name in changed
    )
    return UserError(
        f"{run.folder} holds an unfinished run that differs: {values}",
        rule="shards of one output come from one input, with one set of options",
        remedy="run it with the former ones to continue, or add --overwrite to begin anew",
    )


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {prefix.removesuffix("."): content}
    parts = [_flat(value, f"{prefix}{name}.") for name, value in content.items()]
    return {name: value for part in parts for name, value in part.items()}


def _taken(output: Path, holder: str) -> UserError:
    return UserError(
        f"another process is writing {output}: {holder}",
        rule="one process writes one output folder",
        remedy="wait for it or end it, or choose another --output",
    )
