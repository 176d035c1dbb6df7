"""The main text of HTML pages, by trafilatura (https://aclanthology.org/2021.acl-demo.15)."""

from __future__ import annotations

from collections.abc import Iterator

from data_prep.read.lines import decode_file
from data_prep.read.options import FormatOptions, Item
from data_prep.skips import SkipReport
from data_prep.sources import InputFile
from megascale.errors import UserError


def read_html(file: InputFile, options: FormatOptions, skips: SkipReport) -> Iterator[Item]:
    """A page as one document."""
    page = decode_file(file, options, skips)
    if page is None:
        return
    text = main_text(page)
    if text:
        yield Item(text)
    else:
        skips.add("HTML without a main text", file.name)


def main_text(page: str) -> str:
    """What a reader came for: no menus, adverts, scripts or markup; "" where nothing is left.

    Raises:
        UserError: trafilatura is not installed.
    """
    try:
        import trafilatura
    except ImportError as error:
        raise UserError(
            f"reading HTML needs trafilatura, which cannot be loaded: {error}",
            rule="the main text of a page is found by trafilatura",
            remedy="pip install 'megascale[data]'",
        ) from error
    return trafilatura.extract(page, include_comments=False) or ""
