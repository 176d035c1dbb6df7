"""One thing that is wrong in a configuration, the error that tells them all, and suggestions."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megascale.errors import UserError


class _Absent:
    def __repr__(self) -> str:
        return "(not given)"


ABSENT = _Absent()
"""Value of a problem about something that was not given at all."""

LONGEST_VALUE = 100
"""Characters of a value that a message repeats."""


@dataclass(frozen=True)
class Problem:
    """What is wrong at one place of a configuration.

    Args:
        path: dotted path, an override as typed, or the file's name.
        value: the value given there, or ABSENT.
        rule: the rule that it breaks.
        hint: what to do about it; may be empty.
    """

    path: str
    value: object
    rule: str
    hint: str = ""

    def __str__(self) -> str:
        lines = [f"{self.path}: {show_value(self.value)}", f"    rule: {self.rule}"]
        if self.hint:
            lines.append(f"    hint: {self.hint}")
        return "\n".join(lines)


class ConfigError(UserError):
    """Everything that is wrong with one configuration.

    Args:
        problems: at least one problem.
        source: name of the file, or words for what was read.
    """

    def __init__(self, problems: Sequence[Problem], source: str = "configuration") -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"{source}: {count}", *(f"  {problem}" for problem in problems)]
        super().__init__("\n".join(line.replace("\n", "\n  ") for line in lines))
        self.problems, self.source = tuple(problems), source

    def __reduce__(self) -> tuple[object, ...]:
        return ConfigError, (self.problems, self.source)


def show_value(value: object) -> str:
    """The value as a person would type it, on one line and cut when long."""
    if value is ABSENT:
        return repr(value)
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        text = object.__repr__(value) if isinstance(value, (list, dict)) else repr(value)
    # Control characters and lone surrogates of a bad file must not reach the terminal.
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "?", text)
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "..."


def _plain(name: str) -> str:
    """`numLayers`, `num-layers` and `NUM_LAYERS` are all num_layers."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").lower()


def closest(given: object, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The candidate that looks most like what was given, if one does."""
    by_plain = {_plain(candidate): candidate for candidate in candidates}
    found = difflib.get_close_matches(_plain(str(given)), by_plain, n=1, cutoff=cutoff)
    return by_plain[found[0]] if found else None


def did_you_mean(suggestions: Sequence[str]) -> str:
    """The suggestions as a question; empty without any."""
    return f"did you mean {' or '.join(suggestions)}?" if suggestions else ""
