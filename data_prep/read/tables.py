"""Readers of parquet and arrow files (Hugging Face datasets on disk are the latter)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
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
        columns = _columns(table.schema_arrow.names, options)
        if columns is None:
            _no_column(file, options, skips, table.metadata.num_rows)
            return
        batches = table.iter_batches(batch_size=_ROWS, columns=columns)
        yield from _rows(file, batches, options, skips)


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
        columns = _columns(opened.schema.names, options)
        if columns is None:
            _no_column(file, options, skips, sum(batch.num_rows for batch in batches))
            return
        slices = (
            batch.select(columns).slice(start, _ROWS)
            for batch in batches
            for start in range(0, batch.num_rows, _ROWS)
        )
        yield from _rows(file, slices, options, skips)


def _columns(names: list[str], options: FormatOptions) -> list[str] | None:
    """The columns to read, None without the one of the text."""
    if options.text_key not in names:
        return None
    wanted = {options.text_key, options.id_key, *options.meta_keys}
    return [name for name in names if name in wanted]


def _no_column(file: InputFile, options: FormatOptions, skips: SkipReport, rows: int) -> None:
    kind = f"row of a table without the column {options.text_key!r}"
    skips.add(kind, file.name)
    skips.counts[kind] += rows - 1


def _rows(
    file: InputFile, batches: Iterator[Any], options: FormatOptions, skips: SkipReport
) -> Iterator[Item]:
    number = 0
    for batch in batches:
        texts = _values(batch.column(options.text_key))
        others = [
            name for name in batch.schema.names if name in (options.id_key, *options.meta_keys)
        ]
        records = batch.select(others).to_pylist() if others else itertools.repeat({}, len(texts))
        for text, record in zip(texts, records, strict=True):
            number += 1
            problem = _problem_of(text, options)
            if problem:
                skips.add(problem, f"{file.name}:{number}")
            else:
                yield item_of(text, record, number, options)


def _values(column: Any) -> list[Any]:
    """The values of a column; of strings without an object of arrow for each."""
    from pyarrow import types

    if types.is_string(column.type) or types.is_large_string(column.type):
        strings: list[Any] = column.to_numpy(zero_copy_only=False).tolist()
        return strings
    values: list[Any] = column.to_pylist()
    return values


def _problem_of(text: Any, options: FormatOptions) -> str:
    if not isinstance(text, str):
        return "row whose text is no string"
    if not text or text.isspace():
        return "empty document"
    return too_long(options) if len(text) > options.max_document_bytes else ""
