"""Readers of text and jsonl files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson

from data_prep.read.options import DocumentUnit, FormatOptions, Item
from data_prep.skips import SkipReport
from data_prep.sources import COMPRESSED_SUFFIXES, InputFile
from megascale.errors import UserError

_BOM = b"\xef\xbb\xbf"
_DISCARD_BYTES = 1 << 20


def open_unpacked(file: InputFile) -> BinaryIO:
    """Open a file, unpacking it on the way.

    Raises:
        UserError: what unpacks it is not installed.
    """
    # fsspec reads a compression that it does not know as plain bytes, without a word.
    if file.path.endswith(COMPRESSED_SUFFIXES) and not _can_unpack(file.path):
        raise UserError(
            f"{file.name} cannot be unpacked: its compression is not installed",
            rule="compressed input is read through fsspec",
            remedy="`pip install zstandard` for .zst, or unpack the file",
        )
    return file.open()


def _can_unpack(path: str) -> bool:
    from fsspec.utils import infer_compression

    return infer_compression(path) is not None


def read_text(file: InputFile, options: FormatOptions, skips: SkipReport) -> Iterator[Item]:
    """A text file: as a whole, by paragraph or by line."""
    if options.unit is DocumentUnit.FILE:
        return _whole_file(file, options, skips)
    if options.unit is DocumentUnit.LINE:
        return _line_documents(file, options, skips)
    return _paragraph_documents(file, options, skips)


def read_jsonl(file: InputFile, options: FormatOptions, skips: SkipReport) -> Iterator[Item]:
    """A file of JSON lines."""
    for number, line in numbered_lines(file, options, skips):
        if not line or line.isspace():
            continue
        try:
            record: Any = orjson.loads(line)
        except orjson.JSONDecodeError:
            skips.add("malformed json line", f"{file.name}:{number}")
            continue
        problem = _problem_of(record, options.text_key)
        if problem:
            skips.add(problem, f"{file.name}:{number}")
        else:
            yield item_of(record[options.text_key], record, number, options)


def _problem_of(record: Any, text_key: str) -> str:
    if not isinstance(record, dict):
        return "json line that is no object"
    if text_key not in record:
        return f"json line without the key {text_key!r}"
    text = record[text_key]
    if not isinstance(text, str):
        return "json line whose text is no string"
    # isspace looks no further than the first letter
    return "empty document" if not text or text.isspace() else ""


def item_of(text: str, record: dict[str, Any], position: int, options: FormatOptions) -> Item:
    """A text as an item, with its name and meta from the record it stood in."""
    own = record.get(options.id_key) if options.id_key else None
    if own is None and not options.meta_keys:
        return Item(text, position)
    meta = {key: record[key] for key in options.meta_keys if record.get(key) is not None}
    return Item(text, position, str(own) if isinstance(own, str | int) else "", meta)


def decode_file(file: InputFile, options: FormatOptions, skips: SkipReport) -> str | None:
    """The text of a whole file, or None for one that is too long, not UTF-8, or empty."""
    with open_unpacked(file) as stream:
        content = stream.read(options.max_document_bytes + 1)
    if len(content) > options.max_document_bytes:
        skips.add(too_long(options), file.name)
        return None
    text = _decode(content.removeprefix(_BOM), file.name, "file that is not UTF-8", skips)
    if text is not None and not text.strip():
        skips.add("empty file", file.name)
        return None
    return text


def too_long(options: FormatOptions) -> str:
    """The kind of skip that a document over the limit is."""
    return f"document over {options.max_document_bytes} bytes"


def _whole_file(file: InputFile, options: FormatOptions, skips: SkipReport) -> Iterator[Item]:
    text = decode_file(file, options, skips)
    if text is not None:
        yield Item(text)


def numbered_lines(
    file: InputFile, options: FormatOptions, skips: SkipReport
) -> Iterator[tuple[int, bytes]]:
    """The lines from 1 on, in the memory of one; those over the limit are skipped."""
    limit, number = options.max_document_bytes, 0
    with open_unpacked(file) as stream:
        while line := stream.readline(limit + 1):
            number += 1
            if len(line) > limit:
                skips.add(too_long(options), f"{file.name}:{number}")
                while line and not line.endswith(b"\n"):
                    line = stream.readline(_DISCARD_BYTES)
                continue
            yield number, line.removeprefix(_BOM) if number == 1 else line
    if number == 0:
        skips.add("empty file", file.name)


def _decoded_lines(
    file: InputFile, options: FormatOptions, skips: SkipReport
) -> Iterator[tuple[int, str]]:
    for number, line in numbered_lines(file, options, skips):
        text = _decode(line, f"{file.name}:{number}", "line that is not UTF-8", skips)
        if text is not None:
            yield number, text


def _line_documents(file: InputFile, options: FormatOptions, skips: SkipReport) -> Iterator[Item]:
    for number, line in _decoded_lines(file, options, skips):
        if line.strip():
            yield Item(line.rstrip("\r\n"), number)


def _paragraph_documents(
    file: InputFile, options: FormatOptions, skips: SkipReport
) -> Iterator[Item]:
    """Lines up to a blank one; the position is the number of its first line."""
    paragraph: list[str] = []
    size = first = 0

    def finished() -> Iterator[Item]:
        if size > options.max_document_bytes:
            skips.add(too_long(options), f"{file.name}:{first}")
        elif paragraph:
            yield Item("".join(paragraph).rstrip("\r\n"), first)

    for number, line in _decoded_lines(file, options, skips):
        if line.strip():
            first = first if size else number
            size += len(line)
            if size <= options.max_document_bytes:
                paragraph.append(line)
            continue
        yield from finished()
        paragraph, size = [], 0
    yield from finished()


def _decode(content: bytes, where: str, kind: str, skips: SkipReport) -> str | None:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        skips.add(kind, f"{where} (byte {error.start})")
        return None
