"""The rules of C4 (Raffel et al. 2020, arXiv:1910.10683, section 2.2).

Left to other rules: bad words (`word_list`), language (`language`), repeated three-sentence spans
(the step `dedup --lines`).
"""

from __future__ import annotations

import re
from typing import ClassVar

from pydantic import Field

from data_prep.clean.rule import Outcome, Rule, TextView

_TERMINAL = (".", "!", "?", '"', "”")
_POLICY = (
    *("terms of use", "privacy policy", "cookie policy"),
    *("uses cookies", "use of cookies", "use cookies"),
)
_CITATION = re.compile(r"\[(?:\d+|edit|citation needed)\]")
_SENTENCE_END = re.compile(r"[.!?][\"”')\]]*(?=\s|$)")


class C4(Rule):
    """Removes lines that are no prose, and rejects pages that are not made of it."""

    name: ClassVar[str] = "c4"

    terminal_punctuation: bool = True
    """Keep only lines that end in a full stop, exclamation mark, question mark or closing quote."""
    min_line_words: int = Field(default=5, ge=0)
    min_sentences: int = Field(default=3, ge=0)
    javascript: bool = True
    """Remove lines that speak of Javascript."""
    policy: bool = True
    """Remove lines of notices on privacy, cookies and terms of use."""
    citations: bool = True
    """Remove marks such as [1] and [citation needed]."""
    lorem_ipsum: bool = True
    """Reject pages with "lorem ipsum"."""
    curly_bracket: bool = True
    """Reject pages with a curly bracket."""

    def apply(self, view: TextView) -> Outcome:
        """Cut or reject a page."""
        text = view.text
        if self.curly_bracket and "{" in text:
            return Outcome(text, "curly_bracket")
        if self.lorem_ipsum and "lorem ipsum" in text.lower():
            return Outcome(text, "lorem_ipsum")
        counts: dict[str, int] = {}
        if self.citations and "[" in text:
            text, found = _CITATION.subn("", text)
            counts["citations"] = found
        kept = []
        for line in text.split("\n"):
            reason = self._line_reason(line.strip()) if line.strip() else ""
            if reason:
                counts[reason] = counts.get(reason, 0) + 1
            else:
                kept.append(line)
        text = "\n".join(kept).strip("\n")
        if len(_SENTENCE_END.findall(text)) < self.min_sentences:
            return Outcome(text, "sentences", counts)
        return Outcome(text, counts=counts)

    def _line_reason(self, line: str) -> str:
        if self.terminal_punctuation and not line.endswith(_TERMINAL):
            return "lines_without_terminal_punctuation"
        if len(line.split()) < self.min_line_words:
            return "lines_too_short"
        lowered = line.lower()
        if self.javascript and "javascript" in lowered:
            return "lines_with_javascript"
        if self.policy and any(phrase in lowered for phrase in _POLICY):
            return "lines_of_policy"
        return ""
