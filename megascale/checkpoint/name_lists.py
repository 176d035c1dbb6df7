"""Long lists of parameter names for messages, with the layers folded together."""

from __future__ import annotations

import re
from collections.abc import Iterable

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def folded(lines: Iterable[str]) -> list[str]:
    """Lines that differ only in their first layer number become one line, "layers.{0-31}.x".

    The order is that of each group's first line; nothing is left out.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for line in lines:
        match = _LAYER.search(line)
        key = (line[: match.start()], line[match.end() :]) if match else (line, "")
        numbers = groups.setdefault(key, [])
        if match:
            numbers.append(int(match.group()))
    return [f"{start}{_ranges(numbers)}{end}" for (start, end), numbers in groups.items()]


def _ranges(numbers: list[int]) -> str:
    """ "7" for one number, "{0-3,5}" for several."""
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = (str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return "{" + ",".join(shown) + "}"
