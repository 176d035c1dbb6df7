"""Verdicts as a table for people and as JSON for programs."""

from __future__ import annotations

import math
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
        exact: the same layout once more in fp64, where a small difference was to be settled.
    """

    layout: Layout
    verdicts: Mapping[str, Verdict]
    failure: str = ""
    sent: Mapping[str, int] = field(default_factory=dict)
    held: Mapping[str, int] = field(default_factory=dict)
    exact: Row | None = None

    @property
    def agrees(self) -> bool:
        """Whether everything is the same training, to the last bit but rounding."""
        finished = not self.failure and bool(self.verdicts)
        same = all(verdict.first is None for verdict in self.verdicts.values())
        return finished and (same or self.is_rounding)

    @property
    def is_rounding(self) -> bool:
        """Whether what is off a little in fp32 is the same in fp64."""
        return self.may_be_rounding and self.exact is not None and self.exact.agrees

    @property
    def may_be_rounding(self) -> bool:
        """Whether something differs, and only by so little that fp64 should decide."""
        verdicts = self.verdicts.values()
        return (
            not self.failure
            and any(verdict.first is not None for verdict in verdicts)
            and all(verdict.may_be_rounding for verdict in verdicts)
        )


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
            differs = "rounding" if row.is_rounding else "DIFFERS"
            agreed = "same" if verdict.first is None else differs
            out.add_row(str(row.layout), variant, *shown, agreed)
    return out


def progress(row: Row, *, is_settled_later: bool = False) -> str:
    """One line as soon as a layout is judged: the largest differences of all variants.

    Args:
        is_settled_later: whether fp64 is still to say if a difference is rounding.
    """
    verdicts = list(row.verdicts.values())
    if row.failure or not verdicts:
        return f"{row.layout}: FAILED {row.failure.partition(chr(10))[0]}"
    largest = {
        name: max((getattr(verdict, name) for verdict in verdicts), key=_nan_is_largest)
        for name in ("loss", "norm", "gradient", "weight")
    }
    shown = ", ".join(f"{name} {size:.1e}" for name, size in largest.items())
    doubtful = "off a little" if is_settled_later else "DIFFERS"
    return f"{row.layout}: {'same' if row.agrees else doubtful}, {shown}"


def _nan_is_largest(size: float) -> float:
    return math.inf if math.isnan(size) else size


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
    if row.exact is not None:
        lines += [f"    {line}" for line in _explain_exact(row.exact)]
    return lines


def _explain_exact(exact: Row) -> list[str]:
    if not exact.agrees:
        return ["in fp64, where rounding is 1e-16, it differs, too:", *explain(exact)]
    verdicts = exact.verdicts.values()
    sizes = (max(v.loss, v.norm, v.gradient, v.weight) for v in verdicts)
    return [f"in fp64 nothing is more than {max(sizes):.1e} off: the above is rounding"]


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One object a layout."""
    return [
        {
            "layout": str(row.layout),
            "agrees": row.agrees,
            "failure": row.failure,
            "fp64": None if row.exact is None else as_json([row.exact])[0],
            "sent_bytes": dict(row.sent),
            "held_bytes": dict(row.held),
            "variants": {name: asdict(verdict) for name, verdict in row.verdicts.items()},
        }
        for row in rows
    ]
