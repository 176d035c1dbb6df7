"""Every kind of input file and its reader; damage is counted and named, never passed over."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterable, Iterator

import zstandard

from data_prep.read.html import main_text, read_html
from data_prep.read.lines import read_jsonl, read_text
from data_prep.read.options import FormatOptions, Item, Reader
from data_prep.read.tables import read_arrow, read_parquet
from data_prep.read.tokens import read_tokens
from data_prep.skips import SkipReport
from data_prep.sources import InputFile, unreadable

_READERS: dict[str, Reader] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "html": read_html,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "tokens": read_tokens,
}
_TABLES = ("parquet", "arrow")
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


def read_items(
    files: Iterable[InputFile], options: FormatOptions, skips: SkipReport
) -> Iterator[tuple[InputFile, Item]]:
    """The usable documents of all files, in order, in the memory of one document or row group.

    A file that turns out to be damaged gives what could be read of it before; the damage is told.

    Raises:
        UserError: a file cannot be opened, or what unpacks or reads it is not installed.
    """
    for file in files:
        items = iter([Item(file.text)]) if file.kind == "inline" else _items(file, options, skips)
        if options.extract_html and file.kind != "html":
            items = _extracted(file, items, skips)
        for item in items:
            yield file, item


def _items(file: InputFile, options: FormatOptions, skips: SkipReport) -> Iterator[Item]:
    damage: tuple[type[Exception], ...] = _DAMAGE
    kind = "truncated or damaged archive"
    if file.kind in _TABLES:
        import pyarrow

        # names and meta are strings, too: such that are not UTF-8 end a table
        damage = (pyarrow.ArrowException, UnicodeDecodeError, *damage)
        kind = "truncated or damaged table"
    try:
        yield from _READERS[file.kind](file, options, skips)
    except damage as error:
        skips.add(kind, f"{file.name} ({_first_line(error)})")
    except OSError as error:
        if error.errno is not None:
            raise unreadable(file.name, error) from error
        # gzip and arrow report a damaged file so, without an error number
        skips.add(kind, f"{file.name} ({_first_line(error)})")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _extracted(file: InputFile, items: Iterator[Item], skips: SkipReport) -> Iterator[Item]:
    for item in items:
        text = main_text(item.text)
        if text:
            yield Item(text, item.position, item.id, item.meta)
        else:
            skips.add("HTML without a main text", f"{file.name}:{item.position}")
