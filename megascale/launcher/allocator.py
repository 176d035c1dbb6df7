"""tcmalloc for the ranks that we start, where it is installed.

glibc's malloc is slow with the large blocks of a training (docs/benchmarks.md has how much), and
keeps what many threads have freed. An allocator can only be chosen when a program starts: by
LD_PRELOAD, which a user's own setting wins over. Ranks are forked, and have their parent's.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Mapping, Sequence

OPT_OUT = "MEGASCALE_ALLOCATOR"
"""`default` leaves the system's allocator."""

_PLACES = ("/usr/lib/*/libtcmalloc_minimal.so.4", "/usr/lib64/libtcmalloc_minimal.so.4")


def allocator_variables(
    environment: Mapping[str, str], places: Sequence[str] = _PLACES
) -> dict[str, str]:
    """Variables for a rank that starts in this environment; none where nothing is to be set."""
    if "LD_PRELOAD" in environment or environment.get(OPT_OUT) == "default":
        return {}
    found = next((path for place in places for path in sorted(glob.glob(place))), None)
    return {} if found is None else {"LD_PRELOAD": found}


def start_again_with_allocator(places: Sequence[str] = _PLACES) -> None:
    """Replace this program by itself with the installed allocator, and say so; once.

    Returns only where there is nothing to change.
    """
    preloaded = allocator_variables(os.environ, places)
    if not preloaded:
        return
    library = preloaded["LD_PRELOAD"]
    note = f"allocator of the ranks: {library} ({OPT_OUT}=default for the system's)"
    print(note, file=sys.stderr, flush=True)
    os.execve(sys.executable, sys.orig_argv, {**os.environ, **preloaded})
