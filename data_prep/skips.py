"""What was left out of a dataset, and why: counted by kind, the first few of each by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

_NAMED_PER_KIND = 3


@dataclass
class SkipReport:
    """Counts of what could not be used; nothing is ever dropped without an entry here."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, where: str) -> None:
        """Record one skipped thing: what was wrong, and the file (and line) it was in."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        named = self.examples.setdefault(kind, [])
        if len(named) < _NAMED_PER_KIND:
            named.append(where)

    @classmethod
    def merged(cls, reports: Iterable[SkipReport]) -> SkipReport:
        """Several reports as one: counts added up, the first examples of each kind kept."""
        whole = cls()
        for report in reports:
            for kind, count in report.counts.items():
                whole.counts[kind] = whole.counts.get(kind, 0) + count
                named = whole.examples.setdefault(kind, [])
                named.extend(report.examples.get(kind, [])[: _NAMED_PER_KIND - len(named)])
        return whole

    @property
    def total(self) -> int:
        """How many things were skipped."""
        return sum(self.counts.values())

    def lines(self) -> list[str]:
        """One line a kind, for people: `2 malformed json line: a.jsonl:7, a.jsonl:9`."""
        result = []
        for kind, count in sorted(self.counts.items()):
            named = self.examples.get(kind, [])
            more = ", ..." if count > len(named) else ""
            result.append(f"{count} {kind}: {', '.join(named)}{more}")
        return result
