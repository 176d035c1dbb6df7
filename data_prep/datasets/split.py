"""One dataset cut into several, such as training and validation, or into another number of shards.

Cuts are between documents, and documents keep their order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.datasets.copying import (
    CopyDocuments,
    DocumentRange,
    described,
    document_counts,
    even_ranges,
    overlaps,
    save_tokenizer,
    shard_records,
)
from data_prep.datasets.opening import open_with_manifest
from data_prep.shard_runner import ShardTask, finished_report, open_run
from megascale.data.corpus import TokenCorpus
from megascale.data.manifest import MANIFEST_NAME, DatasetManifest
from megascale.data.places import absolute
from megascale.errors import UserError

REST = -1
_NAMES = {2: ("train", "validation"), 3: ("train", "validation", "test")}


@dataclass(frozen=True)
class Part:
    """One of the datasets that are made: its folder's name and its shards."""

    name: str
    ranges: tuple[DocumentRange, ...]


def split_parts(
    dataset: Path, fractions: Sequence[float] | None, documents: Sequence[int] | None
) -> list[Part]:
    """The parts by their share of tokens, or by numbers of documents.

    Args:
        dataset: what is split.
        fractions: positive, summing to 1; cuts are at the nearest document boundary.
        documents: of each part; one may be REST.

    Raises:
        UserError: they do not fit the dataset.
    """
    corpus, _ = open_with_manifest(dataset)
    if fractions is not None:
        bounds = [start for start, _ in corpus.split(fractions)]
        cuts = [int(np.searchsorted(corpus.document_starts, start)) for start in bounds]
        cuts = [*cuts, corpus.num_documents]
    else:
        assert documents is not None
        cuts = [0, *itertools.accumulate(_counts(documents, corpus.num_documents))]
    names = _NAMES.get(len(cuts) - 1, tuple(f"part_{i}" for i in range(len(cuts) - 1)))
    counts = document_counts(corpus)
    return [
        Part(name, tuple(_by_shard(counts, DocumentRange(start, stop))))
        for name, (start, stop) in zip(names, itertools.pairwise(cuts), strict=True)
    ]


def reshard_parts(dataset: Path, shards: int) -> list[Part]:
    """All documents in `shards` shards of about equal tokens.

    Raises:
        UserError: not a positive number, or more than documents.
    """
    corpus, _ = open_with_manifest(dataset)
    if not 1 <= shards <= corpus.num_documents:
        raise UserError(
            f"--shards {shards} of {corpus.num_documents} documents",
            rule="each shard holds at least one document",
            remedy=f"give 1 to {corpus.num_documents}",
        )
    ranges = even_ranges(corpus.document_starts, corpus.num_tokens, shards)
    return [Part("", tuple(ranges))]


def write_parts(
    dataset: Path, output: Path, parts: Sequence[Part], workers: int, overwrite: bool = False
) -> dict[str, DatasetManifest] | None:
    """Write each part as the dataset `output`/name, or as `output` itself where it has no name.

    Returns:
        Name -> manifest; None when all were there already.

    Raises:
        UserError: an output is taken, the disk is full, or a worker was killed.
    """
    made = {}
    for part in parts:
        where = output / part.name if part.name else output
        manifest = _write_part(dataset, where, part, workers, overwrite)
        if manifest is not None:
            made[part.name] = manifest
    return made or None


def _write_part(
    dataset: Path, output: Path, part: Part, workers: int, overwrite: bool
) -> DatasetManifest | None:
    corpus, manifest = open_with_manifest(dataset)
    identity: dict[str, Any] = {
        "dataset": manifest.fingerprint,
        "documents": [[item.start, item.stop] for item in part.ranges],
    }
    if finished_report(output, "split", identity, MANIFEST_NAME) is not None:
        return None
    tasks = [
        ShardTask(f"shard_{number:05}", _token_bytes(corpus, item), item)
        for number, item in enumerate(part.ranges)
    ]
    with open_run(output, "split", identity, MANIFEST_NAME, overwrite) as run:
        outcome = run.run(tasks, CopyDocuments(absolute(dataset)), workers)
        made = DatasetManifest(
            mode=manifest.mode,
            tokenizer=manifest.tokenizer.model_copy(update={"folder": "tokenizer"}),
            shards=shard_records(outcome.results),
            source={"split": described(manifest, dataset), "documents": identity["documents"]},
            recipe={"step": "split"},
        )
        assert corpus.tokenizer is not None
        save_tokenizer(corpus.tokenizer, run.folder / "tokenizer")
        made.save(run.folder)
        run.finish(outcome, {"fingerprint": made.fingerprint})
    return made


def _token_bytes(corpus: TokenCorpus, item: DocumentRange) -> int:
    starts = np.append(corpus.document_starts, corpus.num_tokens)
    return int(starts[item.stop] - starts[item.start]) * corpus.token_files[0].dtype.itemsize


def _by_shard(counts: Sequence[int], wanted: DocumentRange) -> list[DocumentRange]:
    """A range cut where the dataset's shards end."""
    begins = [0, *itertools.accumulate(counts)]
    return [
        DocumentRange(begins[number] + first, begins[number] + last)
        for number, first, last in overlaps(counts, wanted)
    ]


def _counts(documents: Sequence[int], total: int) -> list[int]:
    given = sum(count for count in documents if count != REST)
    counts = [total - given if count == REST else count for count in documents]
    if min(counts) < 1 or sum(counts) != total or list(documents).count(REST) > 1:
        said = ", ".join("rest" if count == REST else str(count) for count in documents)
        raise UserError(
            f"--documents {said} of {total} documents",
            rule="each part has at least one document, and together they are all",
            remedy="give one of them as rest: --documents rest --documents 1000",
        )
    return counts
