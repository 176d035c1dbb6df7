"""What the search for duplicates needs to know of a shard: hashes, and no text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_prep.dedup.minhash import Bands, band_keys, choose_bands, make_signatures, shorten
from data_prep.records import Document
from megascale.errors import UserError

_BATCH_BYTES = 1 << 17  # the arrays of a batch stay in the second-level cache
_BATCH_DOCUMENTS = 512


@dataclass(frozen=True)
class NearOptions:
    """How alike two documents must be to be near duplicates.

    Args:
        threshold: smallest estimated Jaccard index of their sets of n-grams.
        ngram: words in an n-gram.
        bins: of a signature, a power of two; the estimate's standard deviation at 0.8 is
            0.4 / sqrt(bins).

    Raises:
        UserError: a value is out of range.
    """

    threshold: float = 0.8
    ngram: int = 5
    bins: int = 256

    def __post_init__(self) -> None:
        power_of_two = self.bins >= 16 and self.bins & (self.bins - 1) == 0
        if not (0 < self.threshold <= 1 and 1 <= self.ngram <= 100 and power_of_two):
            raise UserError(
                f"near duplicates with threshold {self.threshold}, n-grams of {self.ngram} words "
                f"and {self.bins} bins",
                rule="0 < threshold <= 1, n-grams have 1 to 100 words, bins are a power of two "
                "from 16 on",
                remedy="leave them out to take 0.8, 5 and 256",
            )

    @property
    def bands(self) -> Bands:
        """How candidates are found: by half of the bins, which is enough and halves the keys."""
        return choose_bands(self.threshold, self.bins // 2)


@dataclass(frozen=True)
class DedupOptions:
    """What is searched for.

    Args:
        exact: documents with the same bytes.
        near: documents that are nearly the same; None: not searched for.
        lines: lines that occurred before, in any document of any shard.
        min_line_characters: shorter lines (without white space around) are left alone.

    Raises:
        UserError: nothing is searched for, or the length is not positive.
    """

    exact: bool = True
    near: NearOptions | None = field(default_factory=NearOptions)
    lines: bool = False
    min_line_characters: int = 30

    def __post_init__(self) -> None:
        if not (self.exact or self.near or self.lines):
            raise UserError(
                "exact, near and line duplicates are all switched off",
                rule="dedup searches for at least one kind",
                remedy="switch one on",
            )
        if self.min_line_characters < 1:
            raise UserError(
                f"lines from {self.min_line_characters} characters on",
                rule="empty lines are never duplicates",
                remedy="give at least 1",
            )


@dataclass
class Signatures:
    """Arrays over the n documents of a shard; those of what is not searched for are empty.

    Attributes:
        hashes: (n, 2) uint64, xxh3_128 of the text.
        minhash: (n, bins) uint16, see `shorten`.
        keys: (bands, n) uint64, see `band_keys`.
        line_counts: (n,) uint32, lines of each document that are long enough.
        line_hashes: (sum of them, 2) uint64.
        sizes: (n,) uint64, UTF-8 bytes of the text.
        sources: (n,) uint32, number of the document's source.
    """

    hashes: np.ndarray
    minhash: np.ndarray
    keys: np.ndarray
    line_counts: np.ndarray
    line_hashes: np.ndarray
    sizes: np.ndarray
    sources: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)

    def save(self, folder: Path, name: str) -> None:
        """Write one file an array."""
        for kind, array in vars(self).items():
            np.save(folder / f"{name}.{kind}.npy", array, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path, name: str) -> Signatures:
        """Map the files of `save`; what is not looked at stays on the disk."""
        return cls(
            **{
                kind: np.load(folder / f"{name}.{kind}.npy", mmap_mode="r", allow_pickle=False)
                for kind in cls.__dataclass_fields__
            }
        )


class Signer:
    """Makes the signatures of documents.

    Attributes:
        source_names: source -> its number.
    """

    def __init__(self, options: DedupOptions) -> None:
        self.options = options
        self.source_names: dict[str, int] = {}

    def sign(self, documents: Iterable[Document]) -> Signatures:
        """The signatures of documents, in their order."""
        parts: dict[str, list[Any]] = {kind: [] for kind in Signatures.__dataclass_fields__}
        for batch in _batches(documents):
            for kind, array in self._sign_batch(batch).items():
                parts[kind].append(array)
        near = self.options.near
        return Signatures(
            hashes=_stacked(parts["hashes"], (0, 2), np.uint64),
            minhash=_stacked(parts["minhash"], (0, near.bins if near else 0), np.uint16),
            keys=np.ascontiguousarray(
                _stacked(parts["keys"], (0, near.bands.count if near else 0), np.uint64).T
            ),
            line_counts=_stacked(parts["line_counts"], (0,), np.uint32),
            line_hashes=_stacked(parts["line_hashes"], (0, 2), np.uint64),
            sizes=_stacked(parts["sizes"], (0,), np.uint64),
            sources=_stacked(parts["sources"], (0,), np.uint32),
        )

    def _sign_batch(self, batch: list[tuple[bytes, str]]) -> dict[str, np.ndarray]:
        texts = [text for text, _ in batch]
        names = self.source_names
        sources = [names.setdefault(source, len(names)) for _, source in batch]
        found: dict[str, np.ndarray] = {
            "sizes": np.array([len(text) for text in texts], dtype=np.uint64),
            "sources": np.array(sources, dtype=np.uint32),
        }
        if self.options.exact:
            found["hashes"] = digests(texts)
        if near := self.options.near:
            signatures = make_signatures(texts, near.ngram, near.bins)
            found["minhash"] = shorten(signatures)
            found["keys"] = band_keys(signatures, near.bands)
        if self.options.lines:
            lines = [long_lines(text, self.options.min_line_characters) for text in texts]
            found["line_counts"] = np.array([len(part) for part in lines], dtype=np.uint32)
            found["line_hashes"] = digests([line for part in lines for _, line in part])
        return found


def digests(contents: list[bytes]) -> np.ndarray:
    """(n, 2) uint64 of xxh3_128."""
    joined = b"".join([xxhash.xxh3_128_digest(content) for content in contents])
    return np.frombuffer(joined, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def long_lines(text: bytes, min_characters: int) -> list[tuple[int, bytes]]:
    """(number, content without white space around) of the lines that are long enough."""
    found = []
    for number, raw in enumerate(text.split(b"\n")):
        line = raw.strip()
        # characters are counted only where the bytes leave it open
        if len(line) >= min_characters and (
            line.isascii() or len(line.decode("utf-8")) >= min_characters
        ):
            found.append((number, line))
    return found


def _batches(documents: Iterable[Document]) -> Iterator[list[tuple[bytes, str]]]:
    batch: list[tuple[bytes, str]] = []
    size = 0
    for document in documents:
        content = document.text.encode()
        batch.append((content, document.source))
        size += len(content)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _stacked(parts: list[np.ndarray], shape: tuple[int, ...], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(shape, dtype), *parts])
