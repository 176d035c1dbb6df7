"""What a rule over several settings is, and the two kinds that many settings share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from megascale.config.problems import Problem
from megascale.config.schema import Config, leaf_fields, read_path

CheckFunction = Callable[[Config, "int | None"], Iterable[Problem]]


@dataclass(frozen=True)
class Check:
    """One rule.

    Args:
        reads: dotted paths of the settings that it looks at.
        run: function of (config, world size or None) that yields what is wrong.
    """

    reads: tuple[str, ...]
    run: CheckFunction

    @property
    def name(self) -> str:
        return getattr(self.run, "__name__", None) or str(self.run)


def neighbours(number: int, divisor: int) -> list[int]:
    """The positive multiples of `divisor` next to `number`."""
    below = number // divisor * divisor
    nearest = [below, below + divisor] if below != number else [number]
    return [n for n in nearest if n > 0]


def divisors_near(number: int, wanted: int) -> list[int]:
    """The largest divisor of `number` that is <= `wanted` and the smallest that is >= it."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    every = {*small, *(number // n for n in small)}
    below, above = {n for n in every if n <= wanted}, {n for n in every if n >= wanted}
    return sorted({*sorted(below)[-1:], *sorted(above)[:1]})


def either(numbers: Iterable[int]) -> str:
    """The numbers as a choice: "2 or 4"."""
    return " or ".join(str(number) for number in numbers)


def ignored(path: str, beside: str, used: Callable[[object], bool], when: str) -> Check:
    """A setting that differs from its default, beside another one under which it does nothing."""
    default = dict(leaf_fields())[path].default

    def run(config: Config, world_size: int | None) -> Iterator[Problem]:
        value, other = read_path(config, path), read_path(config, beside)
        if value != default and not used(other):
            rule = f"has an effect only when {when}; {beside} is {other}"
            yield Problem(path, value, rule, "leave it out, or change the other setting")

    run.__name__ = f"ignored:{path}"
    return Check((path, beside), run)


def among(*values: str) -> Callable[[object], bool]:
    """Whether a setting has one of these values, for `ignored`."""
    return lambda value: value in values
