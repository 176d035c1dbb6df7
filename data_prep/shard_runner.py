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
run with another identity is refused: its shards would not fit to those that are there. In an
object store the same lies in OUT itself, see `workplace`.
"""

from __future__ import annotations

import itertools
import json
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
from data_prep.workplace import ShardStore, Workplace, tidy_output, workplace_of
from megascale.data.atomic_files import file_checksum, full_disk_errors, write_file
from megascale.data.places import absolute, open_binary, remote_errors
from megascale.errors import UserError

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
        place: where the output is made.
        folder: local folder; files that concern all shards are written here.
    """

    def __init__(
        self,
        place: Workplace,
        step: str,
        identity: dict[str, Any],
        marker: str,
        replaceable: Callable[[Path], bool],
        share: Share | None = None,
    ) -> None:
        self.place, self.step, self.identity, self.share = place, step, identity, share
        self.folder = place.folder
        self._marker, self._replaceable = marker, replaceable
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
        store = self.place.store
        with remote_errors(store.kept):
            found = {task.name: load_marker(store, task.name) for task in tasks}
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
                partial(complete_shard, store, work),
                workers,
                lambda task, result: found.update({task.name: result}),
                advance,
            )
        if self.share:
            raise ShareDone
        results = {name: result for name, result in found.items() if result is not None}
        assert len(results) == len(tasks)
        return RunOutcome(results, [task.name for task in missing], uses)

    def forget(self) -> None:
        """Drop the shards made so far: no output is to be made of them."""
        _enter(self, anew=True)

    def finish(self, outcome: RunOutcome, more: dict[str, Any] | None = None) -> None:
        """Write `report.json` and complete the output.

        Args:
            outcome: from `run`.
            more: further entries of the report.

        Raises:
            UserError: the disk is full, or another process began the output in a store anew.
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
        write_file(self.folder / REPORT_NAME, content.encode("utf-8", "backslashreplace"))
        _enter(self, anew=False)  # in a store, another run may have begun anew meanwhile
        self.place.publish(self._marker, self._replaceable)


@contextmanager
def open_run(
    output: Path,
    step: str,
    identity: dict[str, Any],
    marker: str,
    overwrite: bool = False,
    share: Share | None = None,
    aside: str = "",
) -> Iterator[ShardRun]:
    """Take hold of an output folder for one run of a step.

    Args:
        output: the folder to make, or its URL.
        step: its name, for messages and the report.
        identity: all that decides the result, as JSON: a fingerprint of the input's content (see
            `describe_source`), tokenizer, options. Not: number of workers, paths of output.
        marker: a file that a finished output of this step holds, see `check_output_folder`.
        overwrite: replace a finished output; drop an unfinished one of another identity.
        share: make some of the shards only, beside other processes that make the others.
        aside: see `ShardStore`.

    Raises:
        UserError: another process holds the output, it may not be replaced, or an unfinished run
            has another identity.
    """
    output = absolute(output)
    check_output_folder(output, marker, overwrite, step)
    place = workplace_of(output, aside)
    run = ShardRun(
        place,
        step,
        identity,
        marker,
        lambda path: overwrite and may_replace(path, marker, step),
        share,
    )
    if share:
        _enter(run, anew=False)
        with full_disk_errors(output):
            yield run
        return
    lock = place.lock(partial(_taken, output))
    try:
        _prepare(run, overwrite)
        with full_disk_errors(output):
            yield run
    finally:
        place.leave()
        lock.release()


def _enter(run: ShardRun, anew: bool) -> None:
    """Begin the unfinished output, or enter one that others may enter at the same time."""
    identity, previous = _full_identity(run), None if anew else run.place.identity()
    if previous is None:
        previous = run.place.begin(identity, anew)
    if previous != identity:
        raise _other_identity(run, previous)


def _prepare(run: ShardRun, overwrite: bool) -> None:
    """The unfinished output, empty or with shards of the same identity."""
    previous = run.place.identity()
    anew = previous != _full_identity(run)
    if anew and previous is not None and not overwrite and run.place.store.has_markers():
        raise _other_identity(run, previous)
    _enter(run, anew)
    run.place.clear()


def finished_report(
    output: Path, step: str, identity: dict[str, Any], marker: str = REPORT_NAME
) -> dict[str, Any] | None:
    """The report of an output that was finished by the same step with the same identity.

    Args:
        output, step, identity, marker: see `open_run`.
    """
    try:
        with remote_errors(output), open_binary(output / REPORT_NAME) as file:
            report = json.loads(file.read())
        if marker != REPORT_NAME and not (output / marker).is_file():
            return None  # a store gets it last
    except (OSError, ValueError):
        return None
    if not isinstance(report, dict) or report.get("step") != step:
        return None
    if report.get("identity") != json.loads(json.dumps(identity)):
        return None
    tidy_output(output)
    return report


def complete_shard(
    store: ShardStore, work: ShardWork, task: ShardTask, advance: Advance
) -> ShardResult:
    """Make one shard and hand it to the store: files under final names, then its marker.

    Runs in a worker; also what a task of another scheduler calls.
    """
    reported = 0

    def count(done_bytes: int) -> None:
        nonlocal reported
        done_bytes = min(done_bytes, task.size - reported)  # packed input gives more than its size
        reported += done_bytes
        advance(done_bytes)

    scratch = store.scratch_for(task.name)
    with full_disk_errors(store.scratch):
        shutil.rmtree(scratch, ignore_errors=True)  # of a machine that died at this task
        scratch.mkdir(parents=True)
        try:
            result = work(task, scratch, count)
            for path in sorted(scratch.iterdir()):
                result.files[path.name] = FileRecord(path.stat().st_size, file_checksum(path))
                store.keep(path)
            content = json.dumps({"shard": task.name, **asdict(result)}, ensure_ascii=False)
            store.put_marker(task.name, content.encode("utf-8", "backslashreplace"))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    advance(task.size - reported)
    return result


def load_marker(store: ShardStore, name: str) -> ShardResult | None:
    """The result of a finished shard, or None when it is not there whole."""
    try:
        result = ShardResult.from_json(json.loads(store.marker(name)))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if any(store.size(file) != record.bytes for file, record in result.files.items()):
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


def _full_identity(run: ShardRun) -> Any:
    identity = {"format": "megascale-run", "version": _VERSION, "step": run.step, **run.identity}
    return json.loads(json.dumps(identity))


def _other_identity(run: ShardRun, previous: Any) -> UserError:
    before, now = _flat(previous), _flat(_full_identity(run))
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    values = "; ".join(
        f"{name}: {before.get(name)} before, now {now.get(name)}" for name in changed
    )
    return UserError(
        f"{run.place.where} holds an unfinished run that differs: {values}",
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
