"""Input files cut into shards, by their sizes only: any number of workers makes the same shards.

Files are put together in their order until a shard is full. A file of lines that is larger than a
shard is cut between two documents; packed files and formats without lines stay whole.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import BinaryIO

from data_prep.documents import DocumentUnit
from data_prep.shard_runner import ShardTask
from data_prep.sources import COMPRESSED_SUFFIXES, InputFile, unreadable
from megascale.errors import UserError

_SMALLEST_SHARD = 64_000_000
_MOST_SHARDS = 1024
_BOM = b"\xef\xbb\xbf"
_UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6}
_UNITS |= {"g": 10**9, "gb": 10**9, "t": 10**12, "tb": 10**12}


def parse_size(text: str, option: str = "--shard-size") -> int:
    """Bytes of "500000", "64MB", "1.5 GB" (powers of ten).

    Raises:
        UserError: it is no size, or not positive.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", text.lower())
    size = int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if size < 1:
        raise UserError(
            f"{option} {text}",
            rule="a size is a positive number of bytes, with KB, MB, GB or TB after it or none",
            remedy="for example 64MB",
        )
    return size


def default_shard_bytes(total_bytes: int) -> int:
    """64 MB, and more where that would give over 1024 shards."""
    return max(_SMALLEST_SHARD, -(-total_bytes // _MOST_SHARDS))


def cut_inputs(files: Sequence[InputFile], unit: DocumentUnit, shard_bytes: int) -> list[ShardTask]:
    """Shards of about `shard_bytes` bytes of input each, in the order of the files.

    Args:
        files: from `find_inputs`.
        unit: what a document is in a text file: files of lines or paragraphs can be cut.
        shard_bytes: a shard is larger only where a single document or an uncuttable file is.

    Returns:
        One task a shard; its content is a tuple of `InputFile`.
    """
    groups: list[list[tuple[InputFile, int]]] = []
    room = 0
    for file in files:
        for piece, size in _pieces(file, unit, shard_bytes):
            if not groups or size > room:
                groups.append([])
                room = shard_bytes
            groups[-1].append((piece, size))
            room -= size
    return [
        ShardTask(
            f"shard_{number:05}", sum(size for _, size in group), tuple(file for file, _ in group)
        )
        for number, group in enumerate(groups)
    ]


def _pieces(
    file: InputFile, unit: DocumentUnit, shard_bytes: int
) -> Iterator[tuple[InputFile, int]]:
    size = _size(file)
    cuts = [0, size]
    if size > shard_bytes and _can_be_cut(file, unit):
        parts = -(-size // shard_bytes)
        blank = file.kind == "text" and unit is DocumentUnit.PARAGRAPH
        wanted = [size * part // parts for part in range(1, parts)]
        cuts = [0, *_cuts(file, wanted, blank), size]
    for start, stop in itertools.pairwise(cuts):
        if len(cuts) == 2:
            yield file, size
        elif start < stop:
            # A report then names a line as "a.jsonl@64000123:7": the seventh from that byte on.
            name = f"{file.name}@{start}" if start else file.name
            yield replace(file, name=name, start=start, stop=stop), stop - start


def _size(file: InputFile) -> int:
    if file.kind == "inline":
        return len(file.text.encode())
    try:
        return int(file.filesystem.size(file.path))
    except OSError as error:
        raise unreadable(file.name, error) from error


def _can_be_cut(file: InputFile, unit: DocumentUnit) -> bool:
    if file.path.endswith(COMPRESSED_SUFFIXES):
        return False
    return file.kind == "jsonl" or (file.kind == "text" and unit is not DocumentUnit.FILE)


def _cuts(file: InputFile, wanted: Sequence[int], blank: bool) -> list[int]:
    """For each wanted position, the first after it at which a document may begin, ascending."""
    found: list[int] = []
    try:
        with file.open(decompress=False) as stream:
            for position in wanted:
                if not found or position > found[-1]:
                    found.append(_document_start(stream, position, blank))
                else:  # one document reaches over several of them
                    found.append(found[-1])
    except OSError as error:
        raise unreadable(file.name, error) from error
    return found


def _document_start(stream: BinaryIO, position: int, blank: bool) -> int:
    """After the end of a line (with `blank`: of an empty one) that begins at `position` or later.

    Never before a byte-order mark: at the start of a file it is left out, elsewhere it is text.
    """
    stream.seek(position)
    line = stream.readline()  # the rest of one
    position += len(line)
    while line:
        line = stream.readline()
        if not blank and not line.startswith(_BOM):
            return position
        position += len(line)
        if blank and not line.strip():
            # the bytes that follow may still be a mark, which then lies inside the next piece
            following = stream.readline()
            if not following.startswith(_BOM):
                return position
            position += len(following)
    return position
