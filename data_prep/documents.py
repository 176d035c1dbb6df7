"""Documents out of input files, one at a time; what cannot be used is counted and named."""

from __future__ import annotations

import lzma
import sys
import zlib
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any, BinaryIO

import orjson
from fsspec.utils import infer_compression

from data_prep.skips import SkipReport
from data_prep.sources import COMPRESSED_SUFFIXES, InputFile, unreadable
from megascale.errors import UserError

_BOM = b"\xef\xbb\xbf"


class DocumentUnit(str, Enum):
    """What one document is in a text file."""

    FILE = "file"
    PARAGRAPH = "paragraph"
    LINE = "line"


def iterate_documents(
    files: Iterable[InputFile], unit: DocumentUnit, text_key: str, skips: SkipReport
) -> Iterator[str]:
    """The usable documents of all files, in order, in the memory of one document.

    Args:
        files: from `find_inputs`.
        unit: what one document is in a text file; in jsonl it is a line.
        text_key: the key of a jsonl object that holds the text.
        skips: gets every file, line or document that was left out.

    Raises:
        UserError: a file cannot be opened, or what unpacks it is not installed.
    """
    for file in files:
        if file.kind == "inline":
            yield file.text
            continue
        try:
            yield from _file_documents(file, unit, text_key, skips)
        except _damage_errors() as error:
            skips.add("truncated or damaged archive", f"{file.name} ({error})")
        except OSError as error:
            if error.errno is None:  # gzip reports a damaged file so, without an error number
                skips.add("truncated or damaged archive", f"{file.name} ({error})")
            else:
                raise unreadable(file.name, error) from error


def first_document_or_refuse(documents: Iterator[str], skips: SkipReport) -> str:
    """The first usable document.

    Raises:
        UserError: there is none; lists what was skipped.
    """
    document = next(documents, None)
    if document is None:
        found = "; ".join(skips.lines()) or "no file"
        raise UserError(
            f"the input holds no usable document ({found})",
            rule="at least one non-empty UTF-8 text is needed",
            remedy="check --input, and --text-key for jsonl",
        )
    return document


def _file_documents(
    file: InputFile, unit: DocumentUnit, text_key: str, skips: SkipReport
) -> Iterator[str]:
    if file.kind == "jsonl":
        return _jsonl_documents(file, text_key, skips)
    if unit is DocumentUnit.FILE:
        return _whole_file(file, skips)
    if unit is DocumentUnit.LINE:
        return _line_documents(file, skips)
    return _paragraph_documents(file, skips)


def _open(file: InputFile) -> BinaryIO:
    # fsspec reads a compression that it does not know as plain bytes, without a word.
    if file.path.endswith(COMPRESSED_SUFFIXES) and infer_compression(file.path) is None:
        raise UserError(
            f"{file.name} cannot be unpacked: its compression is not installed",
            rule="compressed input is read through fsspec",
            remedy="`pip install zstandard` for .zst, or unpack the file",
        )
    return file.open()


def _damage_errors() -> tuple[type[Exception], ...]:
    """What the decompressors raise on a truncated or damaged file."""
    found: list[type[Exception]] = [EOFError, zlib.error, lzma.LZMAError]
    for name in ("zstandard", "compression.zstd"):  # whichever fsspec has imported
        if name in sys.modules:
            found.append(sys.modules[name].ZstdError)
    return tuple(found)


def _whole_file(file: InputFile, skips: SkipReport) -> Iterator[str]:
    with _open(file) as stream:
        content = stream.read().removeprefix(_BOM)
    text = _decode(content, file.name, "file that is not UTF-8", skips)
    if text is None:
        return
    if text.strip():
        yield text
    else:
        skips.add("empty file", file.name)


def _numbered_lines(file: InputFile, skips: SkipReport) -> Iterator[tuple[int, bytes]]:
    number = 0
    with _open(file) as stream:
        for number, line in enumerate(stream, start=1):
            yield number, line.removeprefix(_BOM) if number == 1 else line
    if number == 0:
        skips.add("empty file", file.name)


def _decoded_lines(file: InputFile, skips: SkipReport) -> Iterator[str]:
    for number, line in _numbered_lines(file, skips):
        text = _decode(line, f"{file.name}:{number}", "line that is not UTF-8", skips)
        if text is not None:
            yield text


def _line_documents(file: InputFile, skips: SkipReport) -> Iterator[str]:
    for line in _decoded_lines(file, skips):
        if line.strip():
            yield line.rstrip("\r\n")


def _paragraph_documents(file: InputFile, skips: SkipReport) -> Iterator[str]:
    paragraph: list[str] = []
    for line in _decoded_lines(file, skips):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph).rstrip("\r\n")
            paragraph = []
    if paragraph:
        yield "".join(paragraph).rstrip("\r\n")


def _jsonl_documents(file: InputFile, text_key: str, skips: SkipReport) -> Iterator[str]:
    for number, line in _numbered_lines(file, skips):
        if not line.strip():
            continue
        where = f"{file.name}:{number}"
        problem, text = _jsonl_text(line, text_key)
        if problem:
            skips.add(problem, where)
        else:
            yield text


def _jsonl_text(line: bytes, text_key: str) -> tuple[str, str]:
    """(what is wrong or "", the text)."""
    try:
        record: Any = orjson.loads(line)
    except orjson.JSONDecodeError:
        return "malformed json line", ""
    if not isinstance(record, dict):
        return "json line that is no object", ""
    if text_key not in record:
        return f"json line without the key {text_key!r}", ""
    text = record[text_key]
    if not isinstance(text, str):
        return "json line whose text is no string", ""
    return ("", text) if text.strip() else ("empty document", "")


def _decode(content: bytes, where: str, kind: str, skips: SkipReport) -> str | None:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        skips.add(kind, f"{where} (byte {error.start})")
        return None
