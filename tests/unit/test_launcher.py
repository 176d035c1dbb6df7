"""Who a process is, and starting ranks on this machine: with small scripts in place of ranks."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from megascale.cli import verify_runs
from megascale.cli.process import collector_paused
from megascale.errors import PeerError, UserError
from megascale.launcher import failure, forked, local
from megascale.launcher.environment import ProcessInfo, process_info, world_size_of
from megascale.launcher.forked import preload
from megascale.launcher.local import launch_local
from megascale.launcher.rendezvous import choose_device
from megascale.verification.layout import SINGLE

# Who a process is -----------------------------------------------------------------------------


def test_without_a_launcher_a_process_is_alone() -> None:
    assert process_info({}) == ProcessInfo(0, 1, 0, launched=False)
    # a stray LOCAL_RANK (deepspeed's import sets it) does not make a launcher
    assert process_info({"LOCAL_RANK": "3"}) == ProcessInfo(0, 1, 0, launched=False)


def test_a_launcher_says_the_place() -> None:
    found = process_info({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert found == ProcessInfo(rank=5, world_size=8, local_rank=1, launched=True)
    assert process_info({"RANK": "0", "WORLD_SIZE": "1"}) == ProcessInfo(0, 1, 0, launched=True)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "'one'"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "''"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 with WORLD_SIZE=2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(
    environment: dict[str, str], found: str
) -> None:
    with pytest.raises(UserError, match=found) as caught:
        process_info(environment)
    assert caught.value.remedy


def test_one_launcher_decides_the_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert world_size_of(None) == 1
    assert world_size_of(4) == 4
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert world_size_of(None) == world_size_of(4) == 4
    with pytest.raises(UserError, match=r"--nproc 2 .*WORLD_SIZE=4"):
        world_size_of(2)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    info = ProcessInfo(1, 2, 1, launched=True)
    assert choose_device("auto", info) == choose_device("cpu", info) == torch.device("cpu")
    with pytest.raises(UserError, match="local rank 1 has no GPU"):
        choose_device("cuda", info)
    with pytest.raises(UserError, match="'gpu'"):
        choose_device("gpu", info)


# Ranks on this machine ------------------------------------------------------------------------


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """`launch_local([script], ...)` runs a line of shell on each rank; returns the log folder."""
    interpreter = tmp_path / "interpreter"
    # called as: interpreter -m megascale SCRIPT
    interpreter.write_text('#!/bin/bash\n[ "$1 $2" = "-m megascale" ] || exit 99\neval "$3"\n')
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path / "logs"


def test_ranks_know_their_place_and_write_apart(
    scripts: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $OMP_NUM_THREADS"; echo oops >&2'
    monkeypatch.setattr(local.os, "cpu_count", lambda: 7)
    assert launch_local([script], 3, scripts) == 0
    captured = capfd.readouterr()
    assert captured.out == "0 0 3 127.0.0.1 2\n"
    assert captured.err == "oops\n"
    for rank in (1, 2):
        text = (scripts / f"rank_{rank:05d}.log").read_text()
        assert text == f"{rank} {rank} 3 127.0.0.1 2\noops\n"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    launch_local([script], 1, scripts)
    assert capfd.readouterr().out == "0 0 1 127.0.0.1 5\n"  # the user's own setting wins


def test_rank_0_alone_inherits_the_listening_socket(
    scripts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = (
        'readlink "/proc/self/fd/$MEGASCALE_LISTEN_FD" | grep -c socket; '
        '(exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") && echo connected'
    )
    assert launch_local([script], 1, scripts) == 0
    assert capfd.readouterr().out == "1\nconnected\n"
    # rank 0 stays until rank 1 has looked, as a store does
    script = f'if [ "$RANK" = 0 ]; then sleep 1; else {script}; exit 0; fi'
    assert launch_local([script], 2, scripts) == 0
    assert (scripts / "rank_00001.log").read_text() == "0\nconnected\n"


def test_a_rank_that_fails_ends_the_others_and_shows_its_log(
    scripts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = 'if [ "$RANK" = 1 ]; then echo "the reason"; exit 3; else exec sleep 60; fi'
    started = time.monotonic()
    assert launch_local([script], 3, scripts) == 3
    assert time.monotonic() - started < 5
    error = capfd.readouterr().err
    assert "rank 1 failed" in error
    assert "the reason" in error


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_is_named(scripts: Path, capfd: pytest.CaptureFixture[str], rank: int) -> None:
    script = f'if [ "$RANK" = {rank} ]; then kill -9 $$; else exec sleep 60; fi'
    assert launch_local([script], 2, scripts) == 128 + 9
    assert f"rank {rank} was ended by signal 9: SIGKILL" in capfd.readouterr().err


def test_a_rank_that_does_not_listen_is_killed(
    scripts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_GRACE_S", 0.3)
    script = (
        'if [ "$RANK" = 1 ]; then sleep 0.3; exit 2; fi; trap "" TERM; while :; do sleep 0.1; done'
    )
    started = time.monotonic()
    assert launch_local([script], 2, scripts) == 2
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("codes", "blamed"),
    [
        ((0, 2, None), 1),
        ((1, 2), 0),
        ((1, -signal.SIGKILL, 1), 1),  # the others fail because this one is gone
        ((0, None, None), 0),  # gone while the others wait for it
    ],
)
def test_who_is_to_blame(codes: tuple[int | None, ...], blamed: int) -> None:
    assert failure.blamed(codes, {}) == blamed


def test_notes_decide_who_is_to_blame() -> None:
    cause = failure.Failure(2, 10.0, "ValueError: planted", lost_peer=False)
    later = failure.Failure(1, 11.0, "ValueError: later", lost_peer=False)
    lost = failure.Failure(0, 9.0, "RuntimeError: gloo: closed", lost_peer=True)
    assert failure.blamed((1, 1, 1), {0: lost, 1: later, 2: cause}) == 2
    assert failure.blamed((1, None, -9), {0: lost}) == 2
    assert failure.blamed((1, None, None), {0: lost}) == 0
    assert failure.blamed((1, None, 0), {0: lost}) == 2


def test_which_errors_are_anothers() -> None:
    closed = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]")
    assert failure.lost_peer(closed)
    assert failure.lost_peer(torch.distributed.DistBackendError("NCCL error"))
    assert failure.lost_peer(PeerError("the loss is nan"))
    assert not failure.lost_peer(RuntimeError("shape mismatch"))
    assert not failure.lost_peer(ValueError("gloo"))
    assert not failure.lost_peer(UserError("the loss is nan"))


def test_ranks_that_tidy_up_slowly_have_not_failed(
    scripts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All were at the end of the run together; on a busy machine the last leaves much later."""
    monkeypatch.setattr(local, "_EARLY_END_S", 0.3)
    mark = 'touch "$MEGASCALE_FAILURE_DIR/rank_0000$RANK.ended"'
    assert launch_local([f'{mark}; [ "$RANK" = 0 ] || sleep 1'], 2, scripts) == 0
    assert launch_local(['[ "$RANK" = 0 ] || sleep 5'], 2, scripts) == 1  # the marks are gone


def test_a_rank_that_ends_early_ends_the_others(
    scripts: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_EARLY_END_S", 0.3)
    script = 'if [ "$RANK" = 0 ]; then exit 0; else exec sleep 60; fi'
    started = time.monotonic()
    assert launch_local([script], 2, scripts) == 1
    assert time.monotonic() - started < 5
    error = capfd.readouterr().err
    assert "rank 0 ended while other ranks waited" in error
    assert "rank 1 did not answer" in error


def test_the_cause_is_on_top_of_its_consequences(
    scripts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 ends first, but only lost its peer; rank 1 has left its note and hangs."""
    script = """
        note() {
            now=$(date +%s.%N)
            json='{"rank": %s, "time_s": %s, "text": "%s", "lost_peer": %s}'
            path="$MEGASCALE_FAILURE_DIR/rank_0000$RANK.failure.json"
            printf "$json" "$RANK" "$now" "$1" "$2" > "$path.new" && mv "$path.new" "$path"
        }
        if [ "$RANK" = 1 ]; then note "ValueError: planted" false; exec sleep 60
        else sleep 0.5; note "gloo: closed" true; exit 1; fi
    """
    assert launch_local([script], 2, scripts) == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "rank 1 failed: ValueError: planted"
    assert lines[-1] == "rank 0 ended after that: gloo: closed"


def test_a_log_folder_that_cannot_be_made_is_refused(scripts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the folder"):
        launch_local(["exit 0"], 2, tmp_path / "file" / "logs")


def test_the_collector_rests_while_modules_are_imported() -> None:
    with collector_paused() as all_is_imported:
        assert not gc.isenabled()
        all_is_imported()
        assert gc.isenabled()
    with pytest.raises(ValueError, match="in between"), collector_paused():
        raise ValueError("in between")
    assert gc.isenabled()


# Ranks that are forked -------------------------------------------------------------------------

FORKING = """
import os, signal, sys
from pathlib import Path

from megascale.launcher.forked import preload
from megascale.launcher.local import launch_local

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "DS_ACCELERATOR")


def entry(arguments):
    rank = int(os.environ["RANK"])
    import torch  # was imported before

    held = os.path.exists("/proc/self/fd/" + os.environ["MEGASCALE_LISTEN_FD"])
    print(*(os.environ.get(name) for name in NAMES), sys.argv[1:] == list(arguments), held,
          sys.modules["torch"].get_num_threads(), os.getppid() == starter, flush=True)
    if rank == 1 and arguments[0] == "exit":
        raise SystemExit(3)
    if rank == 1 and arguments[0] == "raise":
        raise ValueError("planted")
    if rank == 1 and arguments[0] == "signal":
        os.kill(os.getpid(), signal.SIGKILL)


starter = os.getpid()
before = os.environ.get("OMP_NUM_THREADS")
assert preload(["torch", "no.such.module"], on_gpu=False)
assert os.environ.get("OMP_NUM_THREADS") == before
assert "torch" in sys.modules
sys.exit(launch_local([sys.argv[1], "more"], 2, Path(sys.argv[2]), entry))
"""


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("well", 0, ""),
        ("exit", 3, "rank 1 failed with exit code 3"),
        ("raise", 1, "ValueError: planted"),
        ("signal", 128 + 9, "rank 1 was ended by signal 9: SIGKILL"),
    ],
)
def test_forked_ranks_are_like_started_ones(tmp_path: Path, how: str, code: int, said: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(FORKING)
    done = subprocess.run(
        [sys.executable, str(program), how, str(tmp_path / "logs")],
        env={**os.environ, "OMP_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert done.stdout == "0 0 2 3 None True True 3 True\n"
    log = (tmp_path / "logs" / "rank_00001.log").read_text()
    assert log.startswith("1 1 2 3 None True False 3 True\n")


def test_a_process_with_threads_forks_no_ranks() -> None:
    ended = threading.Event()
    other = threading.Thread(target=ended.wait)
    other.start()
    try:
        assert not preload(["no.such.module"], on_gpu=False)
    finally:
        ended.set()
        other.join()


def test_beside_a_thread_ranks_of_verify_are_programs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A fork would not have the thread; what it holds would be held for ever."""
    entries, ended = [], threading.Event()
    monkeypatch.setattr(verify_runs, "launch_local", lambda *given: entries.append(given[3]) or 0)
    other = threading.Thread(target=ended.wait)
    # other tests may have left threads in this process: only this one counts
    monkeypatch.setattr(forked, "_is_single", lambda: not other.is_alive())
    runs = verify_runs.Verification(tmp_path, (), 1, "cpu", tmp_path, pytest.fail, pytest.fail)
    other.start()
    try:
        assert runs._start([SINGLE]) == 0
    finally:
        ended.set()
        other.join()
    assert runs._start([SINGLE]) == 0
    assert entries == [None, pytest.fail]


def test_who_waits_for_the_start_is_told(scripts: Path) -> None:
    seen: list[bool] = []
    assert launch_local(["exit 0"], 2, scripts, started=lambda: seen.append(True)) == 0
    assert seen == [True]


def test_ranks_end_when_their_start_is_not_followed_by_what_it_should(scripts: Path) -> None:
    def fail() -> None:
        raise RuntimeError("can't start new thread")

    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="new thread"):
        launch_local(["sleep 60"], 2, scripts, started=fail)
    assert time.monotonic() - begun < 30


def test_no_rank_is_forked_where_a_driver_may_be_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked, "can_fork", lambda: True)
    monkeypatch.setattr(forked, "_GPU", Path("/dev/null"))
    assert not preload(["no.such.module"], on_gpu=True)
    assert preload(["no.such.module"], on_gpu=False)
