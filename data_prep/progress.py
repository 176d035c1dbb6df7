"""Progress on stderr: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_SECONDS_BETWEEN_LINES = 5.0


class Advance(Protocol):
    """Called with the bytes done since the last call."""

    def __call__(self, done_bytes: int) -> None: ...


@contextmanager
def progress_of_bytes(title: str, total_bytes: int) -> Iterator[Advance]:
    """Show how much of `total_bytes` is done."""
    if sys.stderr.isatty():
        with _bar(title, total_bytes) as advance:
            yield advance
    else:
        yield _plain_lines(title, total_bytes)


@contextmanager
def _bar(title: str, total_bytes: int) -> Iterator[Advance]:
    # Imported for a person who looks on: it would be a tenth of the start-up of every batch job.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task(title, total=total_bytes)
        yield lambda done_bytes: bar.advance(task, done_bytes)


def _plain_lines(title: str, total_bytes: int) -> Advance:
    done, last = 0, time.monotonic()

    def advance(done_bytes: int) -> None:
        nonlocal done, last
        done += done_bytes
        if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"{title}: {done / 1e6:.1f} of {total_bytes / 1e6:.1f} MB", file=sys.stderr)

    return advance
