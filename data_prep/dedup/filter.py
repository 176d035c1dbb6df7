"""A shard without the documents and lines that were found to be duplicates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.dedup.join import EXACT, KEPT, NEAR
from data_prep.dedup.signatures import DedupOptions, Signatures, long_lines
from data_prep.local_copies import local_folder
from data_prep.progress import Advance
from data_prep.records import Document, ShardWriter, read_lines
from data_prep.shard_runner import ShardResult, ShardTask
from data_prep.step import Counts
from megascale.data.places import as_path

REMOVED = "removed"
_KINDS = {EXACT: "exact_duplicate", NEAR: "near_duplicate"}
_ONLY_REPEATED_LINES = "only_repeated_lines"


@dataclass(frozen=True)
class Filter:
    """The work on a shard.

    Attributes:
        signed, joined: folders of the signatures and of what was found.
    """

    options: DedupOptions
    keep_removed: bool
    signed: str
    joined: str

    def __call__(self, task: ShardTask, folder: Path, advance: Advance) -> ShardResult:
        """Write what stays; documents that do not change are copied as they are, unparsed."""
        path = as_path(task.content)
        found = _Found.load(self, task.name)
        sources: Counts = {}
        with ExitStack() as stack:
            kept = stack.enter_context(ShardWriter(folder / path.name))
            aside = None
            if self.keep_removed:
                aside = stack.enter_context(ShardWriter(folder / f"{REMOVED}_{path.name}"))
            for number, line in enumerate(read_lines(path)):
                counts = sources.setdefault(found.source(number), _new_row())
                counts["documents"] += 1
                content, size, reason = self._fate_of(number, line, found, counts)
                if not reason:
                    counts["kept"] += 1
                    kept.write_line(content, size)
                    continue
                counts["rejected"][reason] = counts["rejected"].get(reason, 0) + 1
                if aside is not None:
                    _write_removed(aside, line, reason)
        rows = sources.values()
        totals = {
            "documents": sum(row["documents"] for row in rows),
            "kept": kept.documents,
            "removed_lines": sum(row["removed_lines"] for row in rows),
            "text_bytes": kept.text_bytes,
        }
        return ShardResult(totals, details={"sources": sources})

    def _fate_of(
        self, number: int, line: bytes, found: _Found, counts: Counts
    ) -> tuple[bytes, int, str]:
        """(the line to write, bytes of its text, why it goes or "")."""
        if found.fates[number] != KEPT:
            return line, 0, _KINDS[found.fates[number]]
        size = found.sizes[number]
        gone = found.lines_to_remove(number)
        if not gone.any():
            return line, size, ""
        document = Document.from_line(line)
        text = document.text.encode()
        numbers = {at for (at, _), goes in zip(self._lines(text), gone, strict=True) if goes}
        rest = b"\n".join(part for at, part in enumerate(text.split(b"\n")) if at not in numbers)
        counts["removed_lines"] += len(numbers)
        counts["removed_characters"] += len(text.decode()) - len(rest.decode())
        if not rest.strip():
            return line, 0, _ONLY_REPEATED_LINES
        changed = Document(rest.decode(), document.id, document.source, document.meta)
        return changed.to_line(), len(rest), ""

    def _lines(self, text: bytes) -> Iterator[tuple[int, bytes]]:
        return iter(long_lines(text, self.options.min_line_characters))


@dataclass(frozen=True)
class _Found:
    """What is known of the documents of a shard, as plain lists."""

    fates: list[int]
    sizes: list[int]
    sources: list[int]
    names: list[str]
    lines: np.ndarray
    line_ends: list[int]

    @classmethod
    def load(cls, work: Filter, name: str) -> _Found:
        with local_folder(as_path(work.signed), f"{name}.*") as signed:
            signatures = Signatures.load(signed, name)
            names = (signed / f"{name}.sources.txt").read_text("utf-8").split("\n")
        with local_folder(as_path(work.joined), f"{name}.*") as joined:
            fates = np.load(joined / f"{name}.fates.npy", allow_pickle=False)
            bits = np.load(joined / f"{name}.lines.npy", allow_pickle=False)
        return cls(
            fates.tolist(),
            signatures.sizes.tolist(),
            signatures.sources.tolist(),
            names,
            np.unpackbits(bits, count=len(signatures.line_hashes)).astype(bool),
            [0, *np.cumsum(signatures.line_counts, dtype=np.int64).tolist()],
        )

    def source(self, number: int) -> str:
        """The name of a document's source."""
        return self.names[self.sources[number]]

    def lines_to_remove(self, number: int) -> np.ndarray:
        """bool over the long lines of a document."""
        if not self.lines.size:
            return self.lines
        return self.lines[self.line_ends[number] : self.line_ends[number + 1]]


def _new_row() -> Counts:
    return {
        "documents": 0,
        "kept": 0,
        "rejected": {},
        "removed_lines": 0,
        "removed_characters": 0,
    }


def _write_removed(aside: ShardWriter, line: bytes, reason: str) -> None:
    document = Document.from_line(line)
    meta = {**document.meta, "rejected_by": reason}
    aside.write(Document(document.text, document.id, document.source, meta))
