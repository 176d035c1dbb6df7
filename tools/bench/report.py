"""Write the tables of docs/benchmarks.md from measurements.

    python -m tools.bench.step --title "..." --json docs/benchmarks/step.json
    python -m tools.bench.memory --json docs/benchmarks/memory.json      and so on
    python -m tools.bench.report

Every JSON file of docs/benchmarks becomes a table between the markers of docs/benchmarks.md; the
text around them is written by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- tables -->", "<!-- /tables -->"
_COLUMNS = ("stack", "tokens per CPU-s", "range", "MFU", "peak MB", "ours is", "ours needs")


def section(found: dict[str, Any]) -> str:
    """The tables of one measurement: of training steps, or of another tool."""
    return _steps(found) if "tables" in found else _figures(found)


def _figures(found: dict[str, Any]) -> str:
    machine = found["machine"]
    where = f"{machine['cpu']}; {machine['versions']}; {machine['date']}; load {machine['load']}."
    lines = [f"### {found['title']}", "", f"{found['note']} {where}", ""]
    lines.append("| " + " | ".join(["", *found["columns"]]) + " |")
    lines.append("|---" * (len(found["columns"]) + 1) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in found["rows"]]
    return "\n".join(lines)


def _steps(found: dict[str, Any]) -> str:
    job, machine = found["job"], found["machine"]
    dropout = f", dropout {job['dropout']}" if job["dropout"] else ""
    lines = [
        f"### {found['title']}",
        "",
        f"{job['num_layers']} layers, hidden {job['hidden_size']}, {job['num_heads']} heads, "
        f"vocabulary {job['vocab_size']}, {job['micro_batch_size']} samples of "
        f"{job['seq_length']} tokens a step, {job['dtype']}, {job['threads']} thread(s){dropout}. "
        f"Matrix products reach {found['matmul_peak'] / 1e9:.0f} GFLOP per CPU-second here. "
        f"{machine['cpu']}; {machine['versions']}; {machine['date']}; load {machine['load']}.",
    ]
    for allocator, table in found["tables"].items():
        lines += ["", f"Allocator: {allocator}, on every stack; medians of the rounds.", ""]
        lines += _table(table)
    return "\n".join(lines)


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    for row in rows:
        speed, memory = row["speed_of_ours"], row["memory_of_ours"]
        cells = (
            row["stack"],
            f"{row['tokens_per_cpu_s']:,.0f}",
            f"{row['slowest']:,.0f} to {row['fastest']:,.0f} ({row['rounds']})",
            f"{row['mfu']:.2f}",
            f"{row['peak_mb']:,.0f}",
            f"{speed:.2f}x as fast" if speed else "",
            f"{memory:.2f}x the memory" if memory else "",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def render(page: str, measurements: Sequence[dict[str, Any]]) -> str:
    """The page with its tables replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    tables = "\n\n".join(section(found) for found in measurements)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def main() -> None:
    """Rewrite the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "benchmarks")
    folder = parser.parse_args().folder
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    PAGE.write_text(render(PAGE.read_text(), found))


if __name__ == "__main__":
    main()
