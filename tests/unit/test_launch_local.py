"""`launch_local` with ranks that are small scripts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megascale.launcher.local import launch_local

# Rank 1 has noted its failure and takes its time to leave; rank 0, which lost it, has left.
LINGERING = """#!/bin/sh
if [ "$RANK" = 1 ]; then
    echo '{"rank": 1, "time_s": 1, "text": "planted", "lost_peer": false, "exit_code": 2}' \
        > "$MEGASCALE_FAILURE_DIR/rank_00001.failure.json"
    exec sleep 60
fi
while [ ! -e "$MEGASCALE_FAILURE_DIR/rank_00001.failure.json" ]; do sleep 0.05; done
exit 1
"""


def test_the_exit_code_is_that_of_the_first_failure_even_before_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "rank.sh"
    program.write_text(LINGERING)
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert launch_local(["train"], 2, tmp_path / "logs") == 2
