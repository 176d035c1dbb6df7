"""Readers of parquet and arrow files (Hugging Face datasets on disk are the latter)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from data_prep.read.lines import item_of, too_long
from data_prep.read.options import FormatOptions, Item
from data_prep.skips import SkipReport
from data_prep.sources import InputFile

_ROWS = 1024


def read_parquet(file: InputFile, options: FormatOptions, skips: SkipReport) -> Iterator[Item]:
    """The rows of a parquet file, in the memory of one row group."""
    from pyarrow import parquet

    with file.open(decompress=False) as stream:
        table = parquet.ParquetFile(stream)
        names = table.schema_arrow.names
        if names.count(options.text_key) != 1:
            _no_column(file, names, options, skips, table.metadata.num_rows)
            return
        wanted = [names[number] for number in _columns(names, options)]
        yield from _rows(file, table.iter_batches(_ROWS, columns=wanted), options, skips)


def read_arrow(file: InputFile, options: FormatOptions, skips: SkipReport) -> Iterator[Item]:
    """The rows of an arrow file or stream, in the memory of one record batch."""
    import pyarrow

    with file.open(decompress=False) as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        opened: Any
        if is_file:
            opened = pyarrow.ipc.open_file(stream)
            batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
        else:
            opened = pyarrow.ipc.open_stream(stream)
            batches = iter(opened)
        names = opened.schema.names
        if names.count(options.text_key) != 1:
            rows = sum(batch.num_rows for batch in batches)
            _no_column(file, names, options, skips, rows)
            return
        slices = (
            batch.select(_columns(names, options)).slice(start, _ROWS)
            for batch in batches
            for start in range(0, batch.num_rows, _ROWS)
        )
        yield from _rows(file, slices, options, skips)


def _columns(names: list[str], options: FormatOptions) -> list[int]:
    """The numbers of the columns to read: a name may stand for several."""
    wanted = {options.text_key, options.id_key, *options.meta_keys}
    return [number for number, name in enumerate(names) if name in wanted]


def _no_column(
    file: InputFile, names: list[str], options: FormatOptions, skips: SkipReport, rows: int
) -> None:
    what = "with several columns" if options.text_key in names else "without the column"
    kind = f"row of a table {what} {options.text_key!r}"
    skips.add(kind, file.name)
    skips.counts[kind] += rows - 1


def _rows(
    file: InputFile, batches: Iterator[Any], options: FormatOptions, skips: SkipReport
) -> Iterator[Item]:
    number = 0
    kept = (options.id_key, *options.meta_keys)
    for batch in batches:
        texts = _texts(batch.column(options.text_key))
        others = [at for at, name in enumerate(batch.schema.names) if name in kept]
        records = batch.select(others).to_pylist() if others else itertools.repeat({}, len(texts))
        for text, record in zip(texts, records, strict=True):
            number += 1
            problem = _problem_of(text, options)
            if problem:
                skips.add(problem, f"{file.name}:{number}")
            else:
                yield item_of(text, record, number, options)


def _texts(column: Any) -> list[Any]:
    """The values of a column, strings as such where they are UTF-8, else as bytes."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _holds_strings(column.type):
        with suppress(pyarrow.ArrowException):  # one of them is not UTF-8
            strings: list[Any] = column.to_numpy(zero_copy_only=False).tolist()
            return strings
        column = column.cast(pyarrow.large_binary())
    return [_decoded(value) for value in column.to_pylist()]


def _holds_strings(kind: Any) -> bool:
    from pyarrow import types

    tests = (types.is_string, types.is_large_string, types.is_string_view)
    return any(test(kind) for test in tests)


def _decoded(value: Any) -> Any:
    if isinstance(value, bytes):
        with suppress(UnicodeDecodeError):
            return value.decode()
    return value


def _problem_of(text: Any, options: FormatOptions) -> str:
    if isinstance(text, bytes):
        return "row that is not UTF-8"
    if not isinstance(text, str):
        return "row whose text is no string"
    if not text or text.isspace():
        return "empty document"
    return too_long(options) if len(text) > options.max_document_bytes else ""
