"""Plain filters: length, symbols, and words that must not occur."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from data_prep.clean.rule import Filter, TextView
from megascale.errors import UserError

_WORD = re.compile(r"\w+(?:['’-]\w+)*")


class Length(Filter):
    """Number of characters."""

    name: ClassVar[str] = "length"

    min_characters: int = Field(default=1, ge=0)
    max_characters: int | None = Field(default=None, ge=1)

    def reason(self, view: TextView) -> str:
        """`short` or `long`."""
        if len(view.text) < self.min_characters:
            return "short"
        limit = self.max_characters
        return "long" if limit is not None and len(view.text) > limit else ""


class Symbols(Filter):
    """Fraction of characters that are neither letters, digits nor white space.

    The default is our own: English prose has 0.03 to 0.06, Python source about 0.15, tables and
    ASCII drawings over 0.3.
    """

    name: ClassVar[str] = "symbols"

    max_fraction: float = Field(default=0.3, ge=0, le=1)

    def reason(self, view: TextView) -> str:
        """`fraction`, or nothing."""
        letters = sum(map(len, _ALPHANUMERIC.findall(view.text)))
        spaces = len(view.text) - sum(map(len, view.words))
        symbols = len(view.text) - letters - spaces
        return "fraction" if symbols > self.max_fraction * len(view.text) else ""


_ALPHANUMERIC = re.compile(r"[^\W_]+")


class WordList(Filter):
    """Rejects texts with words of a list: one word or phrase a line, `#` begins a comment.

    C4 rejects a page with a single word of its list (arXiv:1910.10683, section 2.2).
    """

    name: ClassVar[str] = "word_list"

    file: str = Field(examples=["words.txt"])
    max_count: int = Field(default=0, ge=0)
    """How many of them a text may hold, each occurrence counted."""

    def check(self) -> None:
        """Refuse a file that cannot be read or is empty."""
        _read_words(self.file)

    def reason(self, view: TextView) -> str:
        """`words`, or nothing."""
        words, phrases = _read_words(self.file)
        lowered = view.text.lower()
        found = sum(word in words for word in _WORD.findall(lowered))
        for phrase in phrases:
            if found > self.max_count:
                break
            if phrase in lowered:
                found += len(re.findall(rf"(?<!\w){re.escape(phrase)}(?!\w)", lowered))
        return "words" if found > self.max_count else ""


@functools.cache
def _read_words(file: str) -> tuple[frozenset[str], tuple[str, ...]]:
    """Single words and phrases of a list, in lower case."""
    try:
        lines = Path(file).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the word list {file} cannot be read: {error}",
            rule="word_list.file is a UTF-8 text with one word or phrase a line",
            remedy="check the path",
        ) from error
    entries = {line.partition("#")[0].strip().lower() for line in lines} - {""}
    if not entries:
        raise UserError(
            f"the word list {file} is empty",
            rule="word_list.file holds at least one word",
            remedy="check the path, or leave the rule out",
        )
    words = frozenset(entry for entry in entries if _WORD.fullmatch(entry))
    return words, tuple(sorted(entries - words))
