"""The statistics of a dataset as one HTML file that opens without a network."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

_STYLE = (
    "body{font:15px sans-serif;max-width:60em;margin:2em auto}"
    "table{border-collapse:collapse;margin:1em 0}"
    "td,th{border:1px solid #bbb;padding:.2em .6em;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
)


def stats_page(stats: dict[str, Any]) -> str:
    """A page with tables and plots from `dataset_stats`; refers to nothing outside of itself."""
    lengths, vocabulary = stats["document_tokens"], stats["vocabulary"]
    overview = [
        ("documents", f"{stats['documents']:,}"),
        ("tokens", f"{stats['tokens']:,}"),
        ("bytes of text", "unknown" if stats["utf8_bytes"] is None else f"{stats['utf8_bytes']:,}"),
        ("tokens a document, mean", f"{lengths['mean']:,}"),
        ("vocabulary", f"{vocabulary['size']:,}, of which {vocabulary['unused']:,} never occur"),
        ("entropy of single tokens", f"{vocabulary['entropy_bits']} bits"),
        ("fingerprint", stats["fingerprint"]),
    ]
    parts = [
        f"<h1>{html.escape(stats['path'])}</h1>",
        _table(("", ""), overview),
        "<h2>Tokens a document</h2>",
        _table(("percentile", "tokens"), lengths["quantiles"].items()),
        _bars(lengths["histogram"]),
        "<h2>Tokens by frequency</h2>",
        _ranks(vocabulary["by_rank"]),
        _table(
            ("text", "id", "count"),
            ((repr(t["text"]), t["id"], f"{t['count']:,}") for t in vocabulary["most_frequent"]),
        ),
        "<h2>Shards</h2>",
        _table(
            ("shard", "documents", "tokens"),
            ((s["name"], f"{s['documents']:,}", f"{s['tokens']:,}") for s in stats["shards"]),
        ),
        "<h2>Skipped</h2>",
        _table(("what", "count"), stats["skipped"].items()),
    ]
    title = f"<title>{html.escape(stats['path'])}</title>"
    head = f'<!doctype html><meta charset="utf-8">{title}<style>{_STYLE}</style>'
    return "\n".join([head, *parts]) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    return f"<table><tr>{titles}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _bars(histogram: Sequence[Sequence[int]]) -> str:
    labels, counts = [str(low) for low, _ in histogram], [count for _, count in histogram]
    figure = _figure()
    axes = figure.subplots()
    axes.bar(range(len(labels)), counts)
    axes.set_xticks(range(len(labels)), labels, rotation=60)
    axes.set_xlabel("tokens, from")
    axes.set_ylabel("documents")
    described = ", ".join(f"from {low} tokens {count:,}" for low, count in histogram if count)
    return _image(figure, f"Number of documents by length: {described}.")


def _ranks(points: Sequence[Sequence[int]]) -> str:
    figure = _figure()
    axes = figure.subplots()
    axes.loglog([rank for rank, _ in points], [count for _, count in points], marker="o")
    axes.set_xlabel("rank")
    axes.set_ylabel("count")
    described = ", ".join(f"rank {rank:,} {count:,}" for rank, count in points)
    return _image(figure, f"How often a token occurs, by its rank: {described}.")


def _figure() -> Any:
    # Not pyplot: it looks for a display and keeps every figure.
    from matplotlib.figure import Figure

    return Figure(figsize=(8, 3.2), layout="constrained")


def _image(figure: Any, described: str) -> str:
    """The plot, with what it shows in words for those who cannot see it."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=90)
    content = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="{html.escape(described)}" src="data:image/png;base64,{content}">'
