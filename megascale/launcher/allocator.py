"""tcmalloc for the ranks that we start, where it is installed.

glibc's malloc is slow with the large blocks of a training (docs/benchmarks.md has how much), and
keeps what many threads have freed. An allocator can only be chosen when a process starts: by
LD_PRELOAD, which a user's own setting wins over.
"""

from __future__ import annotations

import glob
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
