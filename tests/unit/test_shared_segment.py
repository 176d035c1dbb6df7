"""A rank that dies while another waits for it, without a word."""

from __future__ import annotations

import fcntl
import os
import re
import resource
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from megascale.parallel import shared_segment
from megascale.parallel.shared_memory import SharedMemoryGroup
from megascale.parallel.shared_segment import Segment, open_segment

HIGH = 1024


def test_a_killed_rank_is_noticed() -> None:
    """Also by a process with more than 1024 open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2 * HIGH:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 2 * HIGH), hard))
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        made = shared_segment._make(2)
        assert made is not None
        watched = os.pidfd_open(other.pid)
        high = fcntl.fcntl(watched, fcntl.F_DUPFD, HIGH)
        segment = Segment(made[1], {1: high}, 0, timedelta(seconds=60))
        start = time.monotonic()
        other.kill()
        with pytest.raises(RuntimeError, match="connection closed by peer 1"):
            segment.meet()
        assert time.monotonic() - start < 30
        segment.close()
        os.close(watched)
        os.close(made[0])


def test_ranks_on_other_machines_share_nothing() -> None:
    store = dist.HashStore()
    store.set("place 1", "elsewhere 1 -1")
    store.set("open 1", "no")
    assert open_segment(store, 0, 2, timedelta(seconds=5)) is None


def test_a_rank_that_may_not_open_the_memory_keeps_all_from_it() -> None:
    store = dist.HashStore()
    store.set("place 1", f"{shared_segment._machine()} {os.getpid()} -1")
    store.set("open 1", "no")
    assert open_segment(store, 0, 2, timedelta(seconds=5)) is None


def test_a_system_without_such_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    assert shared_segment._make(2) is None
    assert shared_segment._open([["here", "1", "-1"], ["here", "2", "-1"]], 2) is None


def test_a_container_that_forbids_to_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(pid: int) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "pidfd_open", forbidden)
    store = dist.HashStore()
    store.set("place 1", f"{shared_segment._machine()} {os.getpid()} -1")
    store.set("open 1", "yes")
    assert open_segment(store, 0, 2, timedelta(seconds=5)) is None


def test_a_process_that_has_ended_cannot_be_opened() -> None:
    assert shared_segment._open([["here", "4194304", "5"], ["here", "2", "-1"]], 2) is None


def test_nothing_reaches_gloo_through_the_base_class() -> None:
    """It calls gloo with Python's lock held, for which a thread of gloo's may wait with its own."""
    moves = re.compile("reduce|gather|scatter|broadcast|all_?to_?all|send|recv|barrier")
    names = {name for name in dir(dist.ProcessGroup) if moves.search(name) and name[:2] != "__"}
    assert len(names) > 15
    assert names - set(vars(SharedMemoryGroup)) == set()
