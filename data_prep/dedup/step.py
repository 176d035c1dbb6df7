"""The step `dedup`: signatures per shard, one search over all of them, then the shards without
what was found. Three runs of the frame, so that each can be cut off and taken up again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.dedup.filter import REMOVED, Filter
from data_prep.dedup.join import find_duplicates
from data_prep.dedup.self_test import self_test
from data_prep.dedup.signatures import DedupOptions, Signatures, Signer
from data_prep.local_copies import local_folder
from data_prep.progress import Advance
from data_prep.records import read_documents, shard_name, shard_paths
from data_prep.shard_runner import RunOutcome, ShardResult, ShardTask, finished_report
from data_prep.step import (
    Counts,
    Step,
    StepResult,
    check_apart,
    read_report,
    run_step,
    shards_fingerprint,
    sum_nested,
    tasks_of_shards,
)
from megascale.data.places import as_path, location, remove_file, remove_tree


@dataclass(frozen=True)
class DedupRun:
    """The options of a run that do not decide which documents stay.

    Attributes:
        keep_removed: write removed documents to the folder `removed` inside the output.
        self_test: plant duplicates in a sample, and report precision and recall.
        memory_bytes: of the search; see `find_duplicates`.
    """

    keep_removed: bool = False
    self_test: bool = True
    memory_bytes: int = 1 << 30


def dedup_phases(
    source: Path, output: Path, options: DedupOptions, run: DedupRun = DedupRun()
) -> list[Callable[[], Step]]:
    """The three steps, each to be prepared when the one before is done."""
    signed, joined = _beside(output, "signatures"), _beside(output, "duplicates")
    return [
        partial(_prepare_signatures, source, signed, options, output),
        partial(_prepare_join, source, signed, joined, options, run),
        partial(_prepare_filter, source, signed, joined, output, options, run),
    ]


def dedup(
    source: Path,
    output: Path,
    options: DedupOptions,
    run: DedupRun = DedupRun(),
    workers: int = 1,
    overwrite: bool = False,
) -> StepResult:
    """Remove duplicates from a folder of documents.

    Raises:
        UserError: the input holds no shards, or the output may not be written.
    """
    if finished := finished_dedup(source, output, options, run):
        remove_intermediate(output)  # an earlier run may have been killed just before this
        return finished
    for prepare in dedup_phases(source, output, options, run):
        result = run_step(prepare(), workers, overwrite)
    remove_intermediate(output)
    return result


def finished_dedup(
    source: Path, output: Path, options: DedupOptions, run: DedupRun
) -> StepResult | None:
    """The report of the same run, if it is finished."""
    report = finished_report(output, "dedup", _identity(source, options, run))
    return StepResult(report, already_done=True) if report else None


def remove_intermediate(output: Path) -> None:
    """Remove signatures and the list of duplicates, when the output is done."""
    for name in ("signatures", "duplicates"):
        remove_tree(_beside(output, name))
        remove_file(_beside(output, name).with_name(f".{_beside(output, name).name}.lock"))


def _beside(output: Path, name: str) -> Path:
    return output.with_name(f".{output.name}.{name}")


def _identity(source: Path, options: DedupOptions, run: DedupRun) -> dict[str, Any]:
    return {
        "input": shards_fingerprint(source),
        "options": {**asdict(options), "keep_removed": run.keep_removed},
    }


# ---- signatures -------------------------------------------------------------------------------


def _prepare_signatures(source: Path, signed: Path, options: DedupOptions, output: Path) -> Step:
    check_apart(source, output)
    identity = {"input": shards_fingerprint(source), "options": asdict(options)}
    work = _Sign(options)
    return Step("dedup signatures", signed, identity, tasks_of_shards(source), work, _no_summary)


@dataclass(frozen=True)
class _Sign:
    options: DedupOptions

    def __call__(self, task: ShardTask, folder: Path, advance: Advance) -> ShardResult:
        signer = Signer(self.options)
        documents = (document for _, document in read_documents(task.content))
        signatures = signer.sign(documents)
        signatures.save(folder, task.name)
        names = "\n".join(signer.source_names).encode()
        (folder / f"{task.name}.sources.txt").write_bytes(names)
        return ShardResult({"documents": len(signatures)})


def _no_summary(outcome: RunOutcome) -> Counts:
    return {}


# ---- the search -------------------------------------------------------------------------------


def _prepare_join(
    source: Path, signed: Path, joined: Path, options: DedupOptions, run: DedupRun
) -> Step:
    names = [shard_name(path) for path in shard_paths(source)]
    identity = {**_identity(source, options, run), "self_test": run.self_test}
    size = sum(path.stat().st_size for path in signed.iterdir())
    task = ShardTask("duplicates", size, (location(source), location(signed), names))
    return Step("dedup search", joined, identity, [task], _Join(options, run), _join_summary)


@dataclass(frozen=True)
class _Join:
    options: DedupOptions
    run: DedupRun

    def __call__(self, task: ShardTask, folder: Path, advance: Advance) -> ShardResult:
        source, signed, names = task.content
        with local_folder(as_path(signed)) as near:
            shards = [Signatures.load(near, name) for name in names]
            found = find_duplicates(shards, self.options, self.run.memory_bytes)
        start = 0
        for name, shard, lines in zip(names, shards, found.lines, strict=True):
            np.save(folder / f"{name}.fates.npy", found.fates[start : start + len(shard)])
            np.save(folder / f"{name}.lines.npy", np.packbits(lines))
            start += len(shard)
        counts = {"compared_pairs": found.compared, "near_pairs": found.near_pairs}
        details: Counts = {}
        if self.run.self_test and (self.options.exact or self.options.near):
            details["self_test"] = self_test(as_path(source), names, self.options)
        return ShardResult(counts, details=details)


def _join_summary(outcome: RunOutcome) -> Counts:
    (result,) = outcome.results.values()
    return {**result.counts, **result.details}


# ---- what stays -------------------------------------------------------------------------------


def _prepare_filter(
    source: Path, signed: Path, joined: Path, output: Path, options: DedupOptions, run: DedupRun
) -> Step:
    report = read_report(joined)
    found = {key: report[key] for key in ("compared_pairs", "near_pairs")}
    near = options.near
    if near:
        found["bands"] = {
            **asdict(near.bands),
            "probability_at_threshold": round(near.bands.probability(near.threshold), 4),
        }
    if "self_test" in report:
        found["self_test"] = report["self_test"]
    work = Filter(options, run.keep_removed, location(signed), location(joined))
    return Step(
        "dedup",
        output,
        _identity(source, options, run),
        tasks_of_shards(source),
        work,
        partial(_filter_summary, found),
        REMOVED,
    )


def _filter_summary(found: Counts, outcome: RunOutcome) -> Counts:
    details = sum_nested(result.details for result in outcome.results.values())
    return {**details, "search": found}
