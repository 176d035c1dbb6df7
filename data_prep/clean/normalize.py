"""Repair of broken Unicode, and one form for what can be written in several."""

from __future__ import annotations

import re
import unicodedata
from typing import ClassVar

from pydantic import Field

from data_prep.clean.rule import Outcome, Rule, TextView
from megascale.errors import UserError

# C0 and C1 controls but tab and newline, zero-width space, byte order mark, and what is no
# character at all. Joiners stay: Indic scripts and emoji need them.
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\ufeff\ufffe\uffff]+")
_LINE_ENDS = re.compile("\r\n?|\u2028|\u2029")
_WIDE_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_TRAILING = re.compile(r"[ \t]+(?=\n|$)")
_INNER = re.compile(r"(?<=\S)[ \t]{2,}")
_C1 = re.compile("[\x80-\x9f\ufffd]")


class Repair(Rule):
    """Lines that were decoded with the wrong encoding are decoded again, by ftfy (Speer 2019,
    https://doi.org/10.5281/zenodo.2591652).

    ftfy is as slow as a tokenizer, so only lines that its own measure calls bad are given to it;
    nothing but their encoding is changed.
    """

    name: ClassVar[str] = "repair"

    def check(self) -> None:
        """Refuse to run without ftfy."""
        try:
            import ftfy  # noqa: F401
        except ImportError as error:
            raise UserError(
                "the rule repair needs ftfy, which is not installed",
                rule="broken encodings are found and undone by ftfy",
                remedy="pip install 'megascale[data]', or leave the rule out",
            ) from error

    def apply(self, view: TextView) -> Outcome:
        """Mend the broken lines."""
        if view.text.isascii():
            return Outcome(view.text)
        import ftfy
        from ftfy.badness import is_bad

        lines, characters = view.text.split("\n"), 0
        for index, line in enumerate(lines):
            if line.isascii() or not (is_bad(line) or _C1.search(line)):
                continue
            mended = ftfy.fix_encoding(line)
            if mended != line:
                characters += len(line)
                lines[index] = mended
        if not characters:
            return Outcome(view.text)
        return Outcome("\n".join(lines), counts={"characters_in_mended_lines": characters})


class Normalize(Rule):
    """NFC (Unicode annex 15), newlines for line ends, no control characters, spaces for the other
    space characters, no white space at ends of lines, and not too many blank lines."""

    name: ClassVar[str] = "normalize"

    max_blank_lines: int = Field(default=2, ge=0)
    """More blank lines in a row become this many."""
    collapse_spaces: bool = False
    """Make one space of several inside a line; wrong for code and tables."""

    def apply(self, view: TextView) -> Outcome:
        """Bring a text into the one form."""
        text, counts = view.text, {}
        if not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
            counts["documents_not_nfc"] = 1
        blank = re.compile(rf"\n{{{self.max_blank_lines + 2},}}")
        edits = [
            ("line_ends", _LINE_ENDS, "\n"),
            ("control_characters", _CONTROLS, ""),
            ("wide_spaces", _WIDE_SPACES, " "),
            ("trailing_spaces", _TRAILING, ""),
            ("blank_lines", blank, "\n" * (self.max_blank_lines + 1)),
        ]
        if self.collapse_spaces:
            edits.append(("inner_spaces", _INNER, " "))
        for kind, pattern, replacement in edits:
            text, found = pattern.subn(replacement, text)
            if found:
                counts[kind] = found
        stripped = text.strip("\n")
        if len(stripped) < len(text):
            counts["blank_lines"] = counts.get("blank_lines", 0) + 1
        return Outcome(stripped, counts=counts)
