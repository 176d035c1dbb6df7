"""The texts of input files, one after the other; what cannot be used is counted and named."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from data_prep.read.formats import read_items
from data_prep.read.options import DocumentUnit as DocumentUnit
from data_prep.read.options import FormatOptions
from data_prep.skips import SkipReport
from data_prep.sources import InputFile
from megascale.errors import UserError


def iterate_documents(
    files: Iterable[InputFile], unit: DocumentUnit, text_key: str, skips: SkipReport
) -> Iterator[str]:
    """The usable documents of all files, in order, in the memory of one document.

    Args:
        files: from `find_inputs`.
        unit: what one document is in a text file; in jsonl it is a line.
        text_key: the key of a jsonl object, or the column of a table, that holds the text.
        skips: gets every file, line or document that was left out.

    Raises:
        UserError: a file cannot be opened, or what unpacks it is not installed.
    """
    options = FormatOptions(unit, text_key, id_key="")
    return (item.text for _, item in read_items(files, options, skips))


def first_document_or_refuse(documents: Iterator[str], skips: SkipReport) -> str:
    """The first usable document.

    Raises:
        UserError: there is none; lists what was skipped.
    """
    document = next(documents, None)
    if document is None:
        raise no_documents(skips)
    return document


def no_documents(skips: SkipReport) -> UserError:
    """The error for input without a usable document; lists what was skipped."""
    found = "; ".join(skips.lines()) or "no file"
    return UserError(
        f"the input holds no usable document ({found})",
        rule="at least one non-empty UTF-8 text is needed",
        remedy="check --input, and --text-key for jsonl",
    )
