"""Steps from shards of documents to shards of documents, on the frame of `shard_runner`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import orjson
import xxhash

from data_prep.records import shard_name, shard_paths
from data_prep.report import REPORT_NAME
from data_prep.shard_runner import (
    RunOutcome,
    ShardTask,
    ShardWork,
    Share,
    check_workers,
    finished_report,
    open_run,
)
from megascale.data.atomic_files import file_checksum
from megascale.data.places import location, open_binary, remote_errors
from megascale.errors import UserError

Counts = dict[str, Any]
"""Numbers, in mappings of any depth."""


@dataclass(frozen=True)
class Step:
    """A run of one step, ready to start; the same for any number of workers.

    Attributes:
        name: for messages and the report.
        output: the folder to make, or its URL.
        identity: see `open_run`.
        tasks, work: see `ShardRun.run`.
        summary: further entries of the report, out of what the shards gave; may refuse.
        subfolder: files named `SUBFOLDER_NAME` become `SUBFOLDER/NAME`, out of the way of the
            next step.
    """

    name: str
    output: Path
    identity: dict[str, Any]
    tasks: list[ShardTask]
    work: ShardWork
    summary: Callable[[RunOutcome], Counts]
    subfolder: str = ""


@dataclass(frozen=True)
class StepResult:
    """The report of a finished step, and whether it was there already."""

    report: Counts
    already_done: bool = False


def run_step(
    step: Step, workers: int, overwrite: bool = False, share: Share | None = None
) -> StepResult:
    """Make the step's output, or take up where an earlier run of it stopped.

    Raises:
        UserError: see `open_run` and `ShardRun.run`.
        ShareDone: a share was asked for, and is done.
    """
    check_workers(workers)
    if report := finished_report(step.output, step.name, step.identity):
        return StepResult(report, already_done=True)
    identity, aside = step.identity, step.subfolder
    with open_run(step.output, step.name, identity, REPORT_NAME, overwrite, share, aside) as run:
        outcome = run.run(step.tasks, step.work, workers)
        more = step.summary(outcome)
        files = {
            name: {"bytes": record.bytes, "xxh3": record.xxh3}
            for result in outcome.results.values()
            for name, record in result.files.items()
        }
        run.finish(outcome, {**more, "files": files})
    return StepResult(read_report(step.output))


def read_report(folder: Path) -> Counts:
    """The report of a finished output of this version."""
    with open_binary(folder / REPORT_NAME) as file:
        content: Counts = orjson.loads(file.read())
    return content


def tasks_of_shards(folder: Path) -> list[ShardTask]:
    """One task a shard of a folder of documents; its content is the shard's path or URL."""
    return [
        ShardTask(shard_name(path), path.stat().st_size, location(path))
        for path in shard_paths(folder)
    ]


def shards_fingerprint(folder: Path) -> str:
    """xxh3_128 over names and checksums of a folder's shards.

    Checksums are taken from the report of the step that wrote them, where sizes still agree.
    """
    try:
        with remote_errors(folder):
            known = read_report(folder).get("files", {})
    except (OSError, ValueError):
        known = {}
    digest = xxhash.xxh3_128()
    for path in shard_paths(folder):
        record = known.get(path.name, {})
        same_size = record.get("bytes") == path.stat().st_size
        checksum = record["xxh3"] if same_size else file_checksum(path)
        digest.update(f"{path.name} {checksum}\n".encode())
    return digest.hexdigest()


def check_apart(source: Path, output: Path) -> None:
    """Refuse an output that lies in, holds or is the input.

    Raises:
        UserError: it does.
    """
    inner, outer = (PurePosixPath(location(path)) for path in (source, output))
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise UserError(
            f"--output {output} and --input {source} lie in one another",
            rule="a step leaves its input as it is",
            remedy="choose another --output",
        )


def sum_nested(parts: Iterable[Mapping[str, Any]]) -> Counts:
    """Mappings of numbers added up, key by key at any depth; keys sorted."""
    total: Counts = {}
    for part in parts:
        _add(total, part)
    return _sorted(total)


def _add(total: Counts, part: Mapping[str, Any]) -> None:
    for key, value in part.items():
        if isinstance(value, Mapping):
            _add(total.setdefault(key, {}), value)
        else:
            total[key] = total.get(key, 0) + value


def _sorted(counts: Counts) -> Counts:
    return {
        key: _sorted(counts[key]) if isinstance(counts[key], dict) else counts[key]
        for key in sorted(counts)
    }
