"""Run a recipe on this machine, and put one report together."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from data_prep.recipe.load import Recipe
from data_prep.recipe.phases import NamedPhase, RunAs
from data_prep.report import REPORT_NAME
from data_prep.step import StepResult
from megascale.data.atomic_files import disk_errors, write_file
from megascale.data.places import is_remote

TABLE_NAME = "report.txt"
_COLUMNS = ("documents", "kept", "tokens", "text_bytes")

Announce = Callable[[str], None]


def run_recipe(recipe: Recipe, run_as: RunAs, announce: Announce = print) -> dict[str, Any]:
    """Run every phase that is not done, and write `report.json` and `report.txt`.

    Raises:
        UserError: a phase cannot be done; what was done before stays, and the same command goes
            on from there.
    """
    results = {}
    for phase in recipe.phases():
        result = phase.run(run_as)
        announce(f"{phase.name}: {'was done already' if result.already_done else 'done'}")
        if phase.report:
            results[phase.report] = result
    return write_report(recipe, results)


def finish_report(recipe: Recipe, run_as: RunAs) -> dict[str, Any]:
    """The report of a recipe whose phases are all done elsewhere."""
    results = {p.report: p.run(run_as) for p in recipe.phases() if p.report}
    return write_report(recipe, results)


def write_report(recipe: Recipe, results: dict[str, StepResult]) -> dict[str, Any]:
    """One report out of those of the steps."""
    report = {
        "format": "megascale-recipe-report",
        "version": 1,
        "steps": {
            name: {key: value for key, value in result.report.items() if key != "files"}
            for name, result in results.items()
        },
    }
    with disk_errors(recipe.output):
        if not is_remote(recipe.output):
            recipe.output.mkdir(parents=True, exist_ok=True)
        content = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        write_file(recipe.output / REPORT_NAME, content.encode())
        write_file(recipe.output / TABLE_NAME, "\n".join([*summary_lines(report), ""]).encode())
    return report


def summary_lines(report: dict[str, Any]) -> list[str]:
    """A table for people: what went into and came out of each step, then what was rejected."""
    rows = [("step", *_COLUMNS)]
    for name, step in report["steps"].items():
        counts = step.get("counts", {})
        rows.append((name, *(str(counts.get(column, "")) for column in _COLUMNS)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    for name, step in report["steps"].items():
        lines += [f"{name}: {line}" for line in step_lines(step)]
    return lines


def step_lines(step: dict[str, Any]) -> list[str]:
    """What a step left out or changed, one line a source and kind."""
    lines = [f"skipped {row['count']} {kind}" for kind, row in step.get("skipped", {}).items()]
    for source, counts in step.get("sources", {}).items():
        for reason, count in counts.get("rejected", {}).items():
            lines.append(f"{source}: {count} rejected by {reason}")
        for rule, changed in counts.get("changed", {}).items():
            kinds = ", ".join(f"{kind} {count}" for kind, count in changed.items())
            lines.append(f"{source}: {rule} changed {kinds}")
        if counts.get("removed_lines"):
            lines.append(f"{source}: {counts['removed_lines']} repeated lines removed")
    for name, found in step.get("against", {}).items():
        lines.append(
            f"{name}: {found['examples_found']} of {found['examples']} examples found, in "
            f"{found['documents']} documents; {found['examples_too_short']} too short to search for"
        )
    if test := step.get("search", {}).get("self_test"):
        lines.append(
            f"planted duplicates: precision {test['precision']}, recall {test['recall']} "
            f"({test['planted_duplicates']} among {test['documents']} documents)"
        )
    return lines


def phase_by_name(recipe: Recipe, name: str) -> NamedPhase:
    """A phase of a recipe."""
    return next(phase for phase in recipe.phases() if phase.name == name)
