"""Verdicts as a table for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from megascale.verification.compare import Verdict
from megascale.verification.layout import Layout


@dataclass(frozen=True)
class Row:
    """One layout's verdicts by variant ("config", "sgd"), or why it did not finish.

    Attributes:
        failure: the first failing rank's error when the layout's processes ended with one.
        sent, held: bytes of a step's collectives and of the state, see `RunRecord`.
    """

    layout: Layout
    verdicts: Mapping[str, Verdict]
    failure: str = ""
    sent: Mapping[str, int] = field(default_factory=dict)
    held: Mapping[str, int] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Whether everything is the same training."""
        finished = not self.failure and bool(self.verdicts)
        return finished and all(verdict.first is None for verdict in self.verdicts.values())


def table(rows: Sequence[Row]) -> Table:
    """Largest differences of each layout and variant."""
    out = Table(title="difference from the single process")
    for column in ("layout", "optimizer", "loss", "grad norm", "gradients", "weights", "verdict"):
        out.add_column(column, overflow="fold")
    for row in rows:
        if row.failure:
            out.add_row(str(row.layout), "", "", "", "", "", "FAILED")
        for variant, verdict in row.verdicts.items():
            numbers = (verdict.loss, verdict.norm, verdict.gradient, verdict.weight)
            shown = [f"{number:.1e}" for number in numbers]
            agreed = "same" if verdict.first is None else "DIFFERS"
            out.add_row(str(row.layout), variant, *shown, agreed)
    return out


def explain(row: Row) -> list[str]:
    """Lines that say where a layout first differs and why."""
    if row.failure:
        return [f"{row.layout}: {row.failure}"]
    lines = []
    for variant, verdict in row.verdicts.items():
        first = verdict.first
        if first is None:
            continue
        place = f" of {first.tensor}" if first.tensor else ""
        lines.append(
            f"{row.layout} ({variant}): step {first.step}, {first.what}{place} "
            f"differs by {first.size:.2e}: {first.cause}"
        )
        if first.line:
            lines.append(f"    plan line: {first.line}")
    return lines


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One object a layout."""
    return [
        {
            "layout": str(row.layout),
            "agrees": row.agrees,
            "failure": row.failure,
            "sent_bytes": dict(row.sent),
            "held_bytes": dict(row.held),
            "variants": {name: asdict(verdict) for name, verdict in row.verdicts.items()},
        }
        for row in rows
    ]
