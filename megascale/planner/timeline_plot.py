"""A timeline as a picture: PNG, SVG, PDF, or an HTML page that needs nothing else."""

from __future__ import annotations

import html
import io
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megascale.data.atomic_files import write_file
from megascale.errors import UserError
from megascale.planner.timeline import Placed, Timeline

FORMATS = ("png", "svg", "pdf", "html")
COLORS = {"F": "#4c78a8", "B": "#59a14f", "I": "#8cd17d", "W": "#b6992d"}
NAMES = {
    "F": "forward",
    "B": "backward",
    "I": "backward for inputs",
    "W": "backward for weights",
}
_MOST_LABELS = 2000
"""Numbers inside more boxes than this could not be read."""


def require_format(path: Path) -> None:
    """Raise a UserError unless the file's ending names a format."""
    if path.suffix.lstrip(".") not in FORMATS:
        raise UserError(
            f"{path}: a picture of the format {path.suffix or '(none)'}",
            rule=f"the ending of the file is one of {', '.join('.' + name for name in FORMATS)}",
            remedy=f"for example {path.with_suffix('.html')}",
        )


def save_timeline(timeline: Timeline, title: str, path: Path) -> None:
    """Draw a timeline: a row for each rank, a box for each action, gaps where it waits.

    Args:
        path: .png, .svg, .pdf or .html.
    """
    require_format(path)
    figure = _draw(timeline, title)
    stream = io.BytesIO()
    wanted = path.suffix.lstrip(".")
    figure.savefig(stream, format="svg" if wanted == "html" else wanted, dpi=150)
    content = stream.getvalue()
    if wanted == "html":
        picture = content.decode()
        picture = picture[picture.index("<svg") :]
        page = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>{picture}"
        content = page.encode()
    write_file(path, content)


def _draw(timeline: Timeline, title: str) -> Figure:
    columns = max(8.0, min(40.0, len(timeline.placed) / timeline.size * 0.35))
    figure = Figure(figsize=(columns, 1.6 + 0.55 * timeline.size), layout="constrained")
    axes = figure.subplots()
    for one in timeline.placed:
        _box(axes, one, label=len(timeline.placed) <= _MOST_LABELS)
    axes.set_xlim(0, timeline.duration)
    axes.set_ylim(timeline.size - 0.5, -0.5)
    axes.set_yticks(range(timeline.size))
    axes.set_yticklabels(
        [
            f"rank {rank}\nidle {timeline.idle(rank) / timeline.duration:.0%}"
            for rank in range(timeline.size)
        ]
    )
    axes.set_xlabel("time (forward of an average stage = 1)")
    axes.set_title(title)
    kinds = [kind for kind in COLORS if any(one.action.kind == kind for one in timeline.placed)]
    handles = [Patch(color=COLORS[kind], label=NAMES[kind]) for kind in kinds]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=4)
    return figure


def _box(axes: Any, one: Placed, *, label: bool) -> None:
    """One action; darker edges tell the stages of a rank apart."""
    width = one.end - one.start
    axes.barh(
        one.rank,
        width,
        left=one.start,
        height=0.8,
        color=COLORS[one.action.kind],
        edgecolor="white",
        linewidth=0.6,
    )
    if label:
        text = f"{one.action.micro_batch}\ns{one.action.stage}"
        axes.text(one.start + width / 2, one.rank, text, ha="center", va="center", fontsize=6)
