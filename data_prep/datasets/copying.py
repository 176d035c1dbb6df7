"""Documents of one dataset written again as shards of another, without reading them as text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.datasets.opening import open_corpus
from data_prep.progress import Advance
from data_prep.shard_runner import ShardResult, ShardTask
from megascale.data.corpus import TokenCorpus
from megascale.data.manifest import DatasetManifest, ShardRecord
from megascale.data.token_file import TokenFile, TokenFileWriter
from megascale.data.tokenizer import Tokenizer

_CHUNK_TOKENS = 1 << 22


@dataclass(frozen=True)
class DocumentRange:
    """The documents [start, stop) of a dataset, counted over all its shards."""

    start: int
    stop: int


@dataclass(frozen=True)
class CopyDocuments:
    """The work of a shard that is filled with a `DocumentRange` of the dataset at `path`."""

    path: Path

    def __call__(self, task: ShardTask, folder: Path, advance: Advance) -> ShardResult:
        """Write `task.name` into `folder`."""
        corpus = open_corpus(self.path)
        wanted: DocumentRange = task.content
        counts = {"documents": wanted.stop - wanted.start, "tokens": 0, "utf8_bytes": 0}
        with TokenFileWriter(folder / task.name, corpus.token_files[0].dtype) as writer:
            for number, first, last in overlaps(document_counts(corpus), wanted):
                shard = corpus.token_files[number]
                for begin, end in document_chunks(shard, first, last):
                    counts["tokens"] += copy_documents(shard, begin, end, writer)
                    advance(0)
                counts["utf8_bytes"] += _text_bytes(corpus, number, first, last)
        return ShardResult(counts)


def document_counts(corpus: TokenCorpus) -> list[int]:
    """Documents of each shard."""
    return [shard.num_documents for shard in corpus.token_files]


def overlaps(counts: Sequence[int], wanted: DocumentRange) -> Iterator[tuple[int, int, int]]:
    """(shard, first, last): the documents [first, last) of each shard that lie in `wanted`.

    Args:
        counts: documents of each shard.
        wanted: counted over all of them.
    """
    begin = 0
    for number, count in enumerate(counts):
        first, last = max(wanted.start - begin, 0), min(wanted.stop - begin, count)
        if first < last:
            yield number, first, last
        begin += count


def document_chunks(shard: TokenFile, first: int, last: int) -> Iterator[tuple[int, int]]:
    """[first, last) in pieces of about 4 M tokens, or of one document."""
    starts = np.append(shard.document_starts(), shard.num_tokens)
    begin = first
    while begin < last:
        room = starts[begin] + _CHUNK_TOKENS
        end = int(np.searchsorted(starts, room, side="right")) - 1
        end = min(max(end, begin + 1), last)
        yield begin, end
        begin = end


def copy_documents(shard: TokenFile, first: int, last: int, writer: TokenFileWriter) -> int:
    """Append the documents [first, last) of a shard; returns their tokens."""
    begin, end = (int(shard.document_indices[i]) for i in (first, last))
    lengths = np.asarray(shard.sequence_lengths[begin:end], dtype=np.int64)
    tokens = int(lengths.sum())
    at = int(shard.sequence_pointers[begin]) // shard.dtype.itemsize if begin < end else 0
    sequences = np.diff(shard.document_indices[first : last + 1])
    writer.add_documents(np.asarray(shard.tokens[at : at + tokens]), lengths, sequences)
    return tokens


def text_bytes_of(tokens: np.ndarray, byte_lengths: np.ndarray) -> int:
    """UTF-8 bytes that tokens stand for, see `Tokenizer.byte_lengths`."""
    return sum(
        int(byte_lengths[tokens[begin : begin + _CHUNK_TOKENS]].sum(dtype=np.int64))
        for begin in range(0, len(tokens), _CHUNK_TOKENS)
    )


def _text_bytes(corpus: TokenCorpus, number: int, first: int, last: int) -> int:
    """Bytes of text of the documents [first, last) of a shard; parts of a shard sum to the whole.

    Exact for byte-level tokenizers. Others normalise, and the bytes that were counted when the
    text was read are shared out in proportion.
    """
    assert corpus.manifest is not None
    assert corpus.tokenizer is not None
    shard, whole = corpus.token_files[number], corpus.manifest.shards[number].utf8_bytes
    if (first, last) == (0, shard.num_documents):
        return whole
    starts = np.append(shard.document_starts(), shard.num_tokens)
    lengths = corpus.tokenizer.byte_lengths()
    before = text_bytes_of(shard.tokens[: starts[first]], lengths)
    until = before + text_bytes_of(shard.tokens[starts[first] : starts[last]], lengths)
    total = until + text_bytes_of(shard.tokens[starts[last] :], lengths)
    return whole * until // max(total, 1) - whole * before // max(total, 1)


def shard_records(results: dict[str, ShardResult]) -> list[ShardRecord]:
    """What a manifest keeps of the shards of a run; those without files are left out."""
    return [
        ShardRecord(
            prefix=name,
            bin_bytes=result.files[f"{name}.bin"].bytes,
            idx_bytes=result.files[f"{name}.idx"].bytes,
            bin_xxh3=result.files[f"{name}.bin"].xxh3,
            idx_xxh3=result.files[f"{name}.idx"].xxh3,
            documents=result.counts["documents"],
            tokens=result.counts["tokens"],
            utf8_bytes=result.counts["utf8_bytes"],
        )
        for name, result in results.items()
        if result.files
    ]


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer's folder, in place of one that a killed run left half written."""
    if folder.exists():
        for entry in folder.iterdir():
            entry.unlink()
    folder.mkdir(exist_ok=True)
    tokenizer.save(folder)


def described(manifest: DatasetManifest, path: Path) -> dict[str, object]:
    """What the manifest of a derived dataset keeps of the one it was made from."""
    return {
        "dataset": str(path),
        "fingerprint": manifest.fingerprint,
        "documents": sum(shard.documents for shard in manifest.shards),
        "tokens": sum(shard.tokens for shard in manifest.shards),
    }


def even_ranges(starts: np.ndarray, total: int, parts: int) -> list[DocumentRange]:
    """All documents in `parts` ranges of about equal tokens, none empty.

    Args:
        starts: (D,) first token of each document, ascending.
        total: tokens of all.
        parts: at most D.
    """
    count = len(starts)
    assert 1 <= parts <= count
    cuts = [0]
    for part in range(1, parts):
        nearest = int(np.searchsorted(starts, total * part / parts))
        # each part needs a document, and so does each after it
        cuts.append(min(max(nearest, cuts[-1] + 1), count - (parts - part)))
    return [DocumentRange(*pair) for pair in itertools.pairwise([*cuts, count])]
