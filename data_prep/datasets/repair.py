"""What is whole of a damaged dataset, as a new one; what was lost is told."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.datasets.copying import save_tokenizer, shard_records, text_bytes_of
from data_prep.local_copies import local_mirror
from data_prep.progress import Advance
from data_prep.shard_runner import RunOutcome, ShardResult, ShardTask, open_run
from megascale.data.atomic_files import file_checksum
from megascale.data.manifest import MANIFEST_NAME, DatasetManifest, ShardRecord, TokenizerRecord
from megascale.data.places import absolute, location, size_of
from megascale.data.token_file import TokenFileWriter, bin_path, idx_path, read_index, token_dtype
from megascale.data.tokenizer import load_tokenizer
from megascale.errors import UserError

_CHUNK_TOKENS = 1 << 22


@dataclass(frozen=True)
class _RepairShard:
    """The work of one shard of the dataset at `path`."""

    path: Path
    tokenizer: TokenizerRecord

    def __call__(self, task: ShardTask, folder: Path, advance: Advance) -> ShardResult:
        record: ShardRecord = task.content
        prefix = record.path(self.path)
        result = ShardResult({"documents": 0, "tokens": 0, "utf8_bytes": 0})
        state = _state(prefix, record)
        result.details["state"] = state
        if state == "whole":
            for suffix in ("bin", "idx"):
                shutil.copyfile(f"{prefix}.{suffix}", folder / f"{task.name}.{suffix}")
            result.counts = {
                "documents": record.documents,
                "tokens": record.tokens,
                "utf8_bytes": record.utf8_bytes,
            }
        elif state.startswith("truncated"):
            self._save_documents(prefix, folder / task.name, result)
        return result

    def _save_documents(self, prefix: Path, target: Path, result: ShardResult) -> None:
        """Write the whole documents of a truncated pair."""
        dtype = token_dtype(self.tokenizer.vocab_size)
        lengths, sequences = whole_documents(prefix, dtype, self.tokenizer.eod_id)
        if not len(sequences):
            return
        count = int(lengths.sum())
        tokens = np.memmap(bin_path(prefix), dtype.newbyteorder("<"), mode="r", shape=(count,))
        byte_lengths = load_tokenizer(self.path / self.tokenizer.folder).byte_lengths()
        if int(tokens.max()) >= self.tokenizer.vocab_size:
            result.details["state"] = "holds ids outside the vocabulary"
            return
        with TokenFileWriter(target, dtype) as writer:
            writer.add_documents(tokens, lengths, sequences)
        result.counts["documents"] = len(sequences)
        result.counts["tokens"] = count
        result.counts["utf8_bytes"] = text_bytes_of(tokens, byte_lengths)


def repair(
    dataset: Path, output: Path, workers: int, overwrite: bool = False
) -> tuple[DatasetManifest, dict[str, Any]]:
    """Write the dataset `output` with all whole documents of `dataset`.

    A shard whose files are shorter than they were keeps the documents that are there to their
    end. A shard of the right size with another checksum was changed in a place nobody knows, and
    is left out.

    Returns:
        The new manifest, and what was lost: shard -> state, documents, tokens.

    Raises:
        UserError: there is no manifest or tokenizer, nothing is damaged, or nothing is whole.
    """
    with local_mirror(dataset) as copy:
        return _repair(absolute(copy), output, workers, overwrite, location(dataset))


def _repair(
    dataset: Path, output: Path, workers: int, overwrite: bool, name: str
) -> tuple[DatasetManifest, dict[str, Any]]:
    """Of a local dataset, which is called `name`."""
    manifest = DatasetManifest.read(dataset)
    tokenizer = load_tokenizer(dataset / manifest.tokenizer.folder)
    tasks = [
        ShardTask(f"shard_{number:05}", record.bin_bytes, record)
        for number, record in enumerate(manifest.shards)
    ]
    prefixes = [record.path(dataset) for record in manifest.shards]
    sizes = [[size_of(bin_path(prefix)), size_of(idx_path(prefix))] for prefix in prefixes]
    identity = {"dataset": manifest.fingerprint, "path": name, "sizes": sizes}
    work = _RepairShard(dataset, manifest.tokenizer)
    with open_run(output, "repair", identity, MANIFEST_NAME, overwrite) as run:
        outcome = run.run(tasks, work, workers)
        lost = _lost(manifest, outcome)
        records = shard_records(outcome.results)
        if not lost or not records:
            run.forget()  # the dataset may be damaged, or copied again, before the next try
            raise _nothing_to_save(name, lost)
        made = DatasetManifest(
            mode=manifest.mode,
            tokenizer=manifest.tokenizer.model_copy(update={"folder": "tokenizer"}),
            shards=records,
            source=manifest.source,
            recipe={"step": "repair", "lost": lost, "of": manifest.recipe},
            skipped=manifest.skipped,
        )
        save_tokenizer(tokenizer, run.folder / "tokenizer")
        made.save(run.folder)
        run.finish(outcome, {"lost": lost, "fingerprint": made.fingerprint})
    return made, lost


def _lost(manifest: DatasetManifest, outcome: RunOutcome) -> dict[str, Any]:
    lost = {}
    for record, result in zip(manifest.shards, outcome.results.values(), strict=True):
        if result.details["state"] != "whole":
            lost[record.prefix] = {
                "state": result.details["state"],
                "documents": record.documents - result.counts["documents"],
                "tokens": record.tokens - result.counts["tokens"],
            }
    return lost


def _nothing_to_save(name: str, lost: dict[str, Any]) -> UserError:
    return UserError(
        f"{name} has nothing to repair: every shard is {'lost' if lost else 'whole'}",
        rule="a repair keeps the whole documents of a dataset that is damaged in part",
        remedy="tokenise again" if lost else "use it as it is",
    )


def _state(prefix: Path, record: ShardRecord) -> str:
    """ "whole", "truncated: ...", or why nothing of it can be kept."""
    binary, index = bin_path(prefix), idx_path(prefix)
    if not binary.is_file():
        return "the .bin is missing"
    for path, size, xxh3 in (
        (binary, record.bin_bytes, record.bin_xxh3),
        (index, record.idx_bytes, record.idx_xxh3),
    ):
        found = path.stat().st_size if path.is_file() else 0
        if found == size and file_checksum(path) != xxh3:
            return f"the {path.suffix} was changed"
        if found > size:
            return f"the {path.suffix} is longer than it was"
    if binary.stat().st_size == record.bin_bytes and index.is_file():
        if index.stat().st_size == record.idx_bytes:
            return "whole"
        return "truncated: .idx"
    return "truncated: .bin" if index.is_file() else "truncated: no .idx"


def whole_documents(
    prefix: Path, dtype: np.dtype, eod_id: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """(lengths of sequences, sequences of each document) of the documents that are there whole.

    From the index where it is whole, else from the end-of-document ids of the .bin.
    """
    available = bin_path(prefix).stat().st_size // dtype.itemsize
    try:
        lengths, documents = read_index(prefix)
    except UserError:
        return _from_ends(prefix, dtype, eod_id, available)
    ends = np.cumsum(lengths, dtype=np.int64)
    whole_sequences = int(np.searchsorted(ends, available, side="right"))
    count = int(np.searchsorted(documents, whole_sequences, side="right")) - 1
    kept = int(documents[count])
    return np.asarray(lengths[:kept], dtype=np.int64), np.diff(documents[: count + 1])


def _from_ends(
    prefix: Path, dtype: np.dtype, eod_id: int | None, available: int
) -> tuple[np.ndarray, np.ndarray]:
    if eod_id is None or not available:  # sentences of a BERT's dataset cannot be found again
        return np.empty(0, np.int64), np.empty(0, np.int64)
    tokens = np.memmap(bin_path(prefix), dtype.newbyteorder("<"), mode="r", shape=(available,))
    found = [
        np.flatnonzero(tokens[begin : begin + _CHUNK_TOKENS] == eod_id) + begin
        for begin in range(0, available, _CHUNK_TOKENS)
    ]
    ends = np.concatenate(found) + 1
    return np.diff(ends, prepend=0), np.ones(len(ends), dtype=np.int64)
