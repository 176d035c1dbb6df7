"""`report.json`: what a step read, made and left out, how fast, and with which versions."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any

from data_prep.skips import SkipReport
from data_prep.worker_pool import WorkerUse

REPORT_NAME = "report.json"
_LIBRARIES = ("megascale", "numpy", "tokenizers", "tiktoken", "sentencepiece", "nupunkt")


def make_report(
    step: str,
    identity: dict[str, Any],
    counts: dict[str, int],
    new_counts: dict[str, int],
    skips: SkipReport,
    seconds: float,
    uses: Sequence[WorkerUse],
) -> dict[str, Any]:
    """The report as JSON.

    Args:
        step, identity: see `open_run`.
        counts: of all shards.
        new_counts: of the shards that this run made, from which the rates are taken.
        skips: of all shards.
        seconds: wall time of this run.
        uses: of each process that made shards.
    """
    return {
        "format": "megascale-report",
        "version": 1,
        "step": step,
        "identity": identity,
        "counts": counts,
        "per_second": {name: round(n / max(seconds, 1e-9), 3) for name, n in new_counts.items()},
        "skipped": {
            kind: {"count": count, "examples": skips.examples.get(kind, [])}
            for kind, count in sorted(skips.counts.items())
        },
        "seconds": round(seconds, 3),
        "workers": [
            {"cpu_seconds": round(use.cpu_seconds, 3), "peak_rss_bytes": use.peak_rss_bytes}
            for use in uses
        ],
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
