"""A tokenised corpus as one flat stream of tokens, whatever files it lies in."""

from __future__ import annotations

import difflib
import functools
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from megascale.data.atomic_files import file_checksum
from megascale.data.dataset_cache import cached_dataset
from megascale.data.manifest import MANIFEST_NAME, PREPARE_AGAIN, DatasetManifest
from megascale.data.places import as_path, is_remote
from megascale.data.token_file import TokenFile, bin_path, idx_path
from megascale.data.tokenizer import Tokenizer, load_tokenizer
from megascale.errors import UserError

_EDGE_BYTES = 1 << 20
_FRACTION_TOLERANCE = 1e-6


@dataclass(frozen=True)
class ShardIdentity:
    """What tells one pair of token files from another.

    Attributes:
        prefix: file name without `.bin`. bytes: of the .bin.
        content, index: hashes of .bin and .idx; of a Megatron prefix's .bin that of its ends.
    """

    prefix: str
    documents: int
    tokens: int
    bytes: int
    content: str
    index: str


@dataclass(frozen=True)
class DocumentPart:
    """Tokens [start, stop) of one document of a shard; documents count from 0 in each shard."""

    shard: str
    document: int
    start: int
    stop: int


class TokenCorpus:
    """Read-only view over the shards of one dataset, in their order. Made by `open`.

    Attributes:
        path: the dataset's folder, or the Megatron prefix; of a copy, the URL it was made from.
        manifest: None for a Megatron prefix.
        fingerprint: identifies the content; a Megatron prefix has no stored checksum, so its
            fingerprint covers the index, the size of the .bin and the .bin's first and last MiB.
    """

    def __init__(
        self, path: Path, shards: Sequence[TokenFile], manifest: DatasetManifest | None
    ) -> None:
        assert shards
        self.path, self.manifest = path, manifest
        self._folder = path
        self._shards = list(shards)
        sizes = [0, *(shard.num_tokens for shard in shards)]
        self._shard_starts = np.cumsum(sizes, dtype=np.int64)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        verify: bool = False,
        cache: str | os.PathLike[str] | None = None,
    ) -> TokenCorpus:
        """Open a prepared dataset's folder, or a Megatron prefix (with or without `.bin`).

        Args:
            path: what to open; of a URL, a local copy is made first, see `dataset_cache`.
            verify: also compare every checksum, which reads all files.
            cache: folder for copies; without one a URL is refused.

        Raises:
            UserError: not there, truncated, damaged, or not what the manifest says.
        """
        location = as_path(path)
        if is_remote(location):
            if cache is None:
                raise _needs_a_cache(location)
            corpus = cls.open(cached_dataset(location, Path(cache)), verify)
            corpus.path = location
            return corpus
        if location.is_dir():
            corpus = cls._open_folder(location)
        else:
            prefix = location.with_suffix("") if location.suffix in (".bin", ".idx") else location
            if not idx_path(prefix).exists() and not bin_path(prefix).exists():
                raise _not_found(location)
            corpus = cls(prefix, [TokenFile(prefix)], None)
        if verify:
            corpus.verify()
        return corpus

    @classmethod
    def _open_folder(cls, folder: Path) -> TokenCorpus:
        prefixes = sorted(folder.glob("*.idx"))
        if not (folder / MANIFEST_NAME).exists() and prefixes:
            raise UserError(
                f"{folder} holds token files but no {MANIFEST_NAME}",
                rule="a folder is a dataset by its manifest; Megatron files are given by prefix",
                remedy=f"give the prefix, for example {prefixes[0].with_suffix('')}",
            )
        manifest = DatasetManifest.load(folder)
        shards = [TokenFile(record.path(folder)) for record in manifest.shards]
        for shard, record in zip(shards, manifest.shards, strict=True):
            found = (shard.num_documents, shard.num_tokens)
            if found != (record.documents, record.tokens):
                raise UserError(
                    f"{shard.prefix} holds {found[0]} documents and {found[1]} tokens",
                    rule=f"the manifest says {record.documents} and {record.tokens}",
                    remedy=PREPARE_AGAIN,
                )
        return cls(folder, shards, manifest)

    @property
    def num_tokens(self) -> int:
        """Tokens in all shards."""
        return int(self._shard_starts[-1])

    @property
    def num_documents(self) -> int:
        """Documents in all shards."""
        return sum(shard.num_documents for shard in self._shards)

    @property
    def token_files(self) -> tuple[TokenFile, ...]:
        """The shards, in order."""
        return tuple(self._shards)

    @functools.cached_property
    def document_starts(self) -> np.ndarray:
        """(documents,) int64: the position of each document's first token in the stream."""
        starts = [
            shard.document_starts() + offset
            for shard, offset in zip(self._shards, self._shard_starts[:-1], strict=True)
        ]
        return starts[0] if len(starts) == 1 else np.concatenate(starts)

    def read(self, start: int, length: int) -> np.ndarray:
        """(length,) int64: the tokens at positions [start, start + length)."""
        tokens = np.empty(length, dtype=np.int64)
        self.read_into(start, tokens)
        return tokens

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fill the 1-D integer array `out` with the tokens from position `start` on."""
        length = len(out)
        assert 0 <= start <= self.num_tokens - length, f"[{start}, +{length}) is out of range"
        if len(self._shards) == 1:
            out[:] = self._shards[0].tokens[start : start + length]
            return
        number = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        filled = 0
        while filled < length:
            local = start + filled - int(self._shard_starts[number])
            piece = self._shards[number].tokens[local : local + length - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            number += 1

    def read_windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(len(starts), length) int64: as many tokens from each of the positions `starts` on."""
        windows = np.empty((len(starts), length), dtype=np.int64)
        if not len(starts):
            return windows
        assert starts.min() >= 0
        assert starts.max() <= self.num_tokens - length
        if len(self._shards) == 1:
            windows[:] = self._every_window(0, length)[starts]
            return windows
        numbers = np.searchsorted(self._shard_starts, starts, side="right") - 1
        inside = starts + length <= self._shard_starts[numbers + 1]
        for number in np.unique(numbers[inside]).tolist():
            rows = np.flatnonzero(inside & (numbers == number))
            local = starts[rows] - self._shard_starts[number]
            windows[rows] = self._every_window(number, length)[local]
        for row in np.flatnonzero(~inside).tolist():
            self.read_into(int(starts[row]), windows[row])
        return windows

    def _every_window(self, number: int, length: int) -> np.ndarray:
        """(N - length + 1, length): a shard's windows at all positions, a view; rows are gathered
        by one call for a whole batch."""
        return np.lib.stride_tricks.sliding_window_view(self._shards[number].tokens, length)

    def boundaries(self, start: int, length: int) -> np.ndarray:
        """Positions in [start, start + length) at which a document begins, ascending."""
        first, last = np.searchsorted(self.document_starts, (start, start + length), side="left")
        return self.document_starts[first:last]

    def sequence_starts(self, start: int, stop: int) -> np.ndarray:
        """Positions in [start, stop) at which a sequence begins, ascending, each once."""
        first, last = np.searchsorted(self._shard_starts, (start, stop), side="right")
        parts = [np.empty(0, dtype=np.int64)]
        for number in range(int(first) - 1, min(int(last), len(self._shards))):
            offset = int(self._shard_starts[number])
            parts.append(
                self._shards[number].sequence_starts(start - offset, stop - offset) + offset
            )
        return np.unique(np.concatenate(parts))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer stored with the dataset; None for a Megatron prefix.

        Raises:
            UserError: it is not the tokenizer that made the ids.
        """
        if self.manifest is None:
            return None
        record = self.manifest.tokenizer
        tokenizer = load_tokenizer(self._folder / record.folder)
        if tokenizer.fingerprint != record.fingerprint:
            raise UserError(
                f"{self.path / record.folder} has the fingerprint {tokenizer.fingerprint}",
                rule=f"the tokens were made with the tokenizer {record.fingerprint}",
                remedy=PREPARE_AGAIN,
            )
        return tokenizer

    @property
    def vocab_size(self) -> int | None:
        """The tokenizer's, or None where it is not known."""
        return None if self.manifest is None else self.manifest.tokenizer.vocab_size

    @property
    def mode(self) -> Literal["gpt", "bert"] | None:
        """What a sequence is, see `DatasetManifest.mode`; None for a Megatron prefix."""
        return None if self.manifest is None else self.manifest.mode

    @property
    def eod_id(self) -> int | None:
        """The end-of-document id, or None where it is not known."""
        return None if self.manifest is None else self.manifest.tokenizer.eod_id

    @property
    def utf8_bytes(self) -> int | None:
        """Bytes of the text behind the tokens, or None where it is not known."""
        if self.manifest is None:
            return None
        return sum(record.utf8_bytes for record in self.manifest.shards)

    @functools.cached_property
    def fingerprint(self) -> str:
        """32 hex digits that change when the content changes."""
        if self.manifest is not None:
            return self.manifest.fingerprint
        return _prefix_fingerprint(self._shards[0])

    def was_prefix(self, fingerprint: str) -> bool:
        """Whether this dataset's only shard has that fingerprint as a prefix without manifest."""
        (first, *others) = self._shards
        has_manifest = self.manifest is not None and not others
        return has_manifest and _prefix_fingerprint(first) == fingerprint

    @functools.cached_property
    def shard_identities(self) -> list[ShardIdentity]:
        """Each shard's, in order; reads the manifest, or a Megatron prefix's index."""
        if self.manifest is not None:
            return [
                ShardIdentity(r.prefix, r.documents, r.tokens, r.bin_bytes, r.bin_xxh3, r.idx_xxh3)
                for r in self.manifest.shards
            ]
        (shard,) = self._shards
        return [
            ShardIdentity(
                shard.bin_path.stem,
                shard.num_documents,
                shard.num_tokens,
                shard.bin_path.stat().st_size,
                xxhash.xxh3_128_hexdigest(_edges(shard.bin_path)),
                file_checksum(shard.idx_path),
            )
        ]

    def documents_in(self, start: int, length: int) -> list[DocumentPart]:
        """The documents of the positions [start, start + length), in order; none is empty."""
        inner = self.boundaries(start + 1, length - 1)
        cuts = np.unique(np.concatenate([[start], inner, [start + length]]))
        documents = np.searchsorted(self.document_starts, cuts[:-1], side="right") - 1
        shards = np.searchsorted(self._shard_starts, cuts[:-1], side="right") - 1
        before = np.cumsum([0, *(shard.num_documents for shard in self._shards)])
        begins = cuts[:-1] - self.document_starts[documents]
        return [
            DocumentPart(Path(self._shards[shard].prefix).name, number, begin, begin + size)
            for shard, number, begin, size in zip(
                shards.tolist(),
                (documents - before[shards]).tolist(),
                begins.tolist(),
                np.diff(cuts).tolist(),
                strict=True,
            )
        ]

    def verify(self) -> None:
        """Read every file and compare it with the manifest; a Megatron prefix has its index read.

        Raises:
            UserError: names the file that differs.
        """
        if self.manifest is None:
            for shard in self._shards:
                shard.check_index()
            return
        for shard, record in zip(self._shards, self.manifest.shards, strict=True):
            for file, expected in (
                (shard.bin_path, record.bin_xxh3),
                (shard.idx_path, record.idx_xxh3),
            ):
                found = file_checksum(file)
                if found != expected:
                    raise UserError(
                        f"{file} has the checksum {found}",
                        rule=f"{self.path / MANIFEST_NAME} says {expected}",
                        remedy=PREPARE_AGAIN,
                    )
        assert self.tokenizer is not None  # its fingerprint is checked when it is loaded

    def split(self, fractions: Sequence[float], minimum_tokens: int = 1) -> list[tuple[int, int]]:
        """Cut the stream into contiguous parts, each cut at the nearest document boundary.

        Args:
            fractions: positive, summing to 1.
            minimum_tokens: what each part must hold, for example one window.

        Returns:
            One (start, stop) of token positions a part.

        Raises:
            UserError: the fractions are wrong, or a part would hold too few tokens.
        """
        fractions = list(fractions)
        positive = all(0 < fraction <= 1 for fraction in fractions)  # False for NaN too
        if not fractions or not positive or abs(sum(fractions) - 1) > _FRACTION_TOLERANCE:
            raise UserError(
                f"split {fractions} sums to {sum(fractions):g}",
                rule="the fractions are positive and sum to 1",
                remedy="for example [0.98, 0.02] or [0.9, 0.05, 0.05]",
            )
        candidates = np.append(self.document_starts, self.num_tokens)
        targets = np.cumsum(fractions[:-1]) * self.num_tokens
        cuts = [0, *(_nearest(candidates, target) for target in targets), self.num_tokens]
        parts = list(itertools.pairwise(cuts))
        for number, (start, stop) in enumerate(parts):
            if stop - start < max(minimum_tokens, 1):
                self._refuse_part(fractions, number, stop - start, max(minimum_tokens, 1))
        return parts

    def _refuse_part(self, fractions: list[float], number: int, found: int, needed: int) -> None:
        raise UserError(
            f"part {number} of split {fractions} would hold {found} tokens of "
            f"{self.num_tokens} in {self.num_documents} documents ({self.path})",
            rule=f"each part needs at least {needed} tokens, and parts are cut between documents",
            remedy="give that part a larger fraction, or prepare more or shorter documents "
            "(`--documents paragraph` or `line` cuts text files)",
        )


def _prefix_fingerprint(shard: TokenFile) -> str:
    size = shard.bin_path.stat().st_size
    digest = xxhash.xxh3_128(f"{file_checksum(shard.idx_path)} {size} ".encode())
    digest.update(_edges(shard.bin_path))
    return digest.hexdigest()


def _edges(binary: Path) -> bytes:
    """The first and the last MiB of a file."""
    with open(binary, "rb") as stream:
        first = stream.read(_EDGE_BYTES)
        stream.seek(max(0, binary.stat().st_size - _EDGE_BYTES))
        return first + stream.read(_EDGE_BYTES)


def _nearest(candidates: np.ndarray, target: float) -> int:
    after = min(int(np.searchsorted(candidates, target)), len(candidates) - 1)
    before = max(after - 1, 0)
    closer = min((before, after), key=lambda i: abs(float(candidates[i]) - target))
    return int(candidates[closer])


def _not_found(location: Path) -> UserError:
    names = {entry.stem if entry.suffix == ".idx" else entry.name for entry in _siblings(location)}
    close = difflib.get_close_matches(location.name, sorted(names), n=1)
    return UserError(
        f"no dataset at {location}",
        rule=f"a dataset is a folder with {MANIFEST_NAME}, or the prefix of a .bin/.idx pair",
        remedy=f"did you mean {location.parent / close[0]}?"
        if close
        else "check the path, or prepare one with `python -m data_prep tokenize`",
    )


def _needs_a_cache(location: Path) -> UserError:
    return UserError(
        f"{location} is not on this machine",
        rule="token files are mapped into memory, so a dataset in a store is copied once to each "
        "machine",
        remedy="set data.cache_dir to a folder on the machines' own disks",
    )


def _siblings(location: Path) -> list[Path]:
    folder = location.parent
    return list(folder.iterdir()) if folder.is_dir() else []
