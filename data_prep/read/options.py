"""How documents lie in the input, and one document as a reader gives it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from data_prep.skips import SkipReport
from data_prep.sources import InputFile


class DocumentUnit(str, Enum):
    """What one document is in a text file."""

    FILE = "file"
    PARAGRAPH = "paragraph"
    LINE = "line"


@dataclass(frozen=True)
class FormatOptions:
    """What a reader needs to know beside the file.

    Attributes:
        unit: what one document is in a text file.
        text_key: key or column of the text in jsonl, parquet and arrow.
        id_key: key or column of a document's own name, where there is one; "": it is not wanted.
        meta_keys: keys or columns that are kept as `meta`.
        max_document_bytes: longer documents are skipped and counted; bounds the memory.
        extract_html: take the main text out of HTML in jsonl, parquet and arrow too.
        tokenizer: for token files; None: the one that lies in the dataset's folder.
    """

    unit: DocumentUnit = DocumentUnit.FILE
    text_key: str = "text"
    id_key: str = "id"
    meta_keys: tuple[str, ...] = ()
    max_document_bytes: int = 128 << 20
    extract_html: bool = False
    tokenizer: Path | None = None


class Item(NamedTuple):
    """One document of a file.

    Attributes:
        position: its place in the file: line, row or document from 1, 0 for a whole file.
        id: the name that it has by itself, "" without one.
    """

    text: str
    position: int = 0
    id: str = ""
    meta: Mapping[str, Any] = MappingProxyType({})


class Reader(Protocol):
    """The usable documents of one file, in order; what is left out is added to `skips`."""

    def __call__(
        self, file: InputFile, options: FormatOptions, skips: SkipReport
    ) -> Iterator[Item]: ...
