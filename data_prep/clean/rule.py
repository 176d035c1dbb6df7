"""What a rule of cleaning is, and a text with the views that several rules need."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

_PARAGRAPH = re.compile(r"\n\s*\n")


class TextView:
    """A text and its parts, each found once.

    Attributes:
        text: the whole text.
        id: of the document, for rules that draw random numbers.
    """

    def __init__(self, text: str, id: str = "") -> None:
        self.text, self.id = text, id

    @cached_property
    def words(self) -> list[str]:
        """What white space separates."""
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """Lines with something in them, without white space around."""
        return [line for raw in self.text.split("\n") if (line := raw.strip())]

    @cached_property
    def paragraphs(self) -> list[str]:
        """What blank lines separate."""
        return [part for raw in _PARAGRAPH.split(self.text) if (part := raw.strip())]


@dataclass(frozen=True)
class Outcome:
    """What a rule made of a document.

    Attributes:
        text: the text from here on.
        rejected: why the document goes, "" when it stays.
        counts: what was changed, by kind.
    """

    text: str
    rejected: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)


class Rule(BaseModel, ABC):
    """One rule: its fields are its settings, with the defaults of its source."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    """As recipes and reports call it."""

    @abstractmethod
    def apply(self, view: TextView) -> Outcome:
        """Keep, change or reject a text."""

    def check(self) -> None:
        """Refuse settings that cannot work, before any document is read; raises UserError."""


class Filter(Rule):
    """A rule that keeps a text as it is, or rejects it."""

    def apply(self, view: TextView) -> Outcome:
        """Keep or reject a text."""
        return Outcome(view.text, self.reason(view))

    @abstractmethod
    def reason(self, view: TextView) -> str:
        """Which limit the text breaks, "" for none."""
