"""How an attempt at a run is judged, and when there is no other."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import socket
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from megascale.checkpoint.lock import LOCK_NAME, RunLock
from megascale.checkpoint.manager import CheckpointManager
from megascale.errors import (
    DiskFullError,
    NodeError,
    NumericalError,
    PeerError,
    TakenOverError,
    UserError,
)
from megascale.file_lock import FileLock
from megascale.launcher import attempt
from megascale.launcher.attempt import Begin, begin, end, newest_step
from megascale.launcher.ends import KINDS, REQUEUE_CODE, classify
from megascale.launcher.environment import ATTEMPT_DIR
from megascale.launcher.failure import Failure, describe, kind_of, leave_note
from megascale.resilience import signals
from megascale.resilience.signals import SaveSignals
from tests.integration.runs import call

FINISHED = {"kind": "finished", "step": 9, "reason": ""}
LOST = Failure(0, 5.0, "RuntimeError: [gloo] Connection closed by peer", True, "lost peer", "a1")
SILENT = Failure(0, 5.0, "RuntimeError: [gloo] Timed out waiting 3000ms", True, "lost peer", "a1")
BUG = Failure(2, 6.0, "ValueError: planted", False, "error", "a2", "Traceback: line 7")


def _stopped(reason: str) -> dict[str, object]:
    return {"kind": "stopped", "step": 4, "reason": reason}


@pytest.mark.parametrize(
    ("code", "outcome", "asked", "notes", "log", "kind"),
    [
        (0, FINISHED, "", [], "", "finished"),
        (0, FINISHED, "time limit", [], "", "finished"),
        (0, _stopped("file STOP"), "", [], "", "user stop"),
        (0, _stopped("file STOP"), "time limit", [], "", "time limit"),
        (0, _stopped("SIGTERM"), "", [], "", "preempted"),
        (1, None, "", [LOST, BUG], "", "error"),
        (1, None, "", [LOST], "", "node failure"),
        (1, None, "", [SILENT], "", "hang"),
        (137, None, "", [LOST], "slurmstepd: error: Detected 1 oom-kill event(s)", "out of memory"),
        (137, None, "", [LOST], "srun: error: b: task 1: Killed", "killed"),
        (
            1,
            None,
            "",
            [SILENT],
            "srun: error: a: task 0: Exited with exit code 1\nsrun: error: b: task 1: Killed",
            "hang",
        ),  # srun killed the rank that was silent
        (1, None, "", [], "srun: error: Node failure on node2", "node failure"),
        (137, None, "", [], "srun: error: node1: task 1: Killed", "killed"),
        (143, None, "", [], "srun: error: node1: task 0: Terminated", "killed"),  # in its start-up
        (2, None, "", [], "srun: error: b: task 1: Exited with exit code 2", "config error"),
        (1, None, "", [], "srun: error: b: task 1: Exited with exit code 1", "error"),
        (1, None, "", [], "bash: no such file", "error"),
    ],
)
def test_kinds_of_ends(
    code: int,
    outcome: dict[str, object] | None,
    asked: str,
    notes: list[Failure],
    log: str,
    kind: str,
) -> None:
    found = classify(code, outcome, asked, {note.rank: note for note in notes}, log)
    assert found.kind == kind
    assert found.text


def test_sigterm_means_what_slurm_does_with_the_job() -> None:
    assert classify(0, _stopped("SIGTERM"), "", {}, "", "RUNNING").kind == "preempted"
    assert classify(0, _stopped("SIGTERM"), "", {}, "", "COMPLETING").kind == "cancelled"
    assert classify(143, None, "", {0: LOST}, "", "COMPLETING").kind == "cancelled"
    assert classify(0, _stopped("SIGTERM"), "", {}, "", "REQUEUED").kind == "preempted"
    assert classify(143, None, "", {0: LOST}, "", "REQUEUED").kind == "preempted"


def test_a_disk_too_full_for_the_note_is_told_from_the_log() -> None:
    log = "0: error: no space to write m.jsonl: No space left on device\n0:   rule:   r\n"
    log += "srun: error: node2: task 0: Exited with exit code 2\n"
    found = classify(2, None, "", {}, log)
    assert found.kind == "disk full"
    assert "m.jsonl" in found.text


def test_a_request_that_was_refused_before_a_note_is_told_with_its_remedy() -> None:
    log = "0: warning: x\n1: error: there is no y\n1:   rule:   r\n1:   remedy: do z\n"
    log += "srun: error: node2: task 1: Exited with exit code 2\n"
    assert "remedy: do z" in classify(2, None, "", {}, log).text


def test_the_first_cause_is_told_with_its_machine_and_traceback() -> None:
    found = classify(1, None, "", {0: LOST, 2: BUG}, "")
    assert (found.rank, found.host) == (2, "a2")
    assert found.text.startswith("rank 2 on a2 failed: ValueError: planted")
    assert "line 7" in found.text


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NumericalError("the loss is nan"), "numerical"),
        (PeerError("the loss is nan, another rank's"), "lost peer"),
        (UserError("no such file"), "config error"),
        (DiskFullError("no space to write metrics.jsonl"), "disk full"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk full"),
        (OSError(errno.EIO, "Input/output error"), "error"),
        (NodeError("torch 2.12"), "bad node"),
        (TakenOverError("a later attempt"), "node failure"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), "out of memory"),
        (RuntimeError("shapes differ"), "error"),
    ],
)
def test_kinds_of_errors(error: Exception, kind: str) -> None:
    assert kind_of(error) == kind
    assert describe(error, 3).kind == kind


def _begin(run: Path, step: int = 0, submission: str = "s", most: int = 3) -> attempt.Attempt | str:
    """The new attempt, or the kind of end that forbids it."""
    now = Begin(submission, "7", 0, "a[1-2]", step, str(run / "log"), 0)
    folder, over = begin(run, now, most)
    if over is not None:
        return over.kind
    assert folder is not None
    return attempt.Attempt(folder, now, None)


def _end(opened: attempt.Attempt | str, code: int = 1, **outcome: object) -> str:
    assert isinstance(opened, attempt.Attempt)
    if outcome:
        (opened.folder / "outcome.json").write_text(json.dumps(outcome))
    return end(opened.folder, code).kind


def test_a_finished_run_is_not_begun_again_but_a_new_submission_is(tmp_path: Path) -> None:
    assert _end(_begin(tmp_path), 0, **FINISHED) == "finished"
    assert _begin(tmp_path) == "finished"
    assert isinstance(_begin(tmp_path, submission="later"), attempt.Attempt)


def test_a_stop_ends_a_chain(tmp_path: Path) -> None:
    _end(_begin(tmp_path), 0, **_stopped("file STOP"))
    assert _begin(tmp_path) == "user stop"


def test_a_stop_file_made_between_two_attempts(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    assert _begin(tmp_path) == "user stop"
    assert not (tmp_path / "STOP").exists()
    (tmp_path / "STOP").write_text("by the batch script: time limit\n")  # too late for its attempt
    assert isinstance(_begin(tmp_path), attempt.Attempt)
    assert not (tmp_path / "STOP").exists()


def test_no_progress_ends_it_and_progress_does_not(tmp_path: Path) -> None:
    for step in (0, 0, 4, 4):
        _begin(tmp_path, step)  # cut off: no end is written
    assert isinstance(_begin(tmp_path, 4), attempt.Attempt)
    assert _begin(tmp_path, 4) == "no progress"
    told = attempt.attempts(tmp_path)[-1].end
    assert told is not None
    assert "3 attempts began at step 4" in told.text
    assert told.text.count("cut off") == 3
    assert _begin(tmp_path, 4) == "no progress"


def test_a_node_that_dies_while_a_file_is_written(tmp_path: Path) -> None:
    opened = _begin(tmp_path)
    assert isinstance(opened, attempt.Attempt)
    (opened.folder / "end.json").write_text('{"kind": "fin')
    (opened.folder / "begin.json").write_text("")
    assert attempt.attempts(tmp_path) == []
    assert isinstance(_begin(tmp_path), attempt.Attempt)


def test_the_end_command_tells_and_asks_for_a_requeue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = _begin(tmp_path)
    assert isinstance(opened, attempt.Attempt)
    note = json.dumps(asdict(LOST))
    (opened.folder / "rank_00000.failure.json").write_text(note)
    assert attempt.main(["end", str(opened.folder), "1"]) == REQUEUE_CODE
    assert "node failure" in capsys.readouterr().out


def test_a_folder_that_is_gone_or_full_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "attempts" / "0001"
    assert attempt.main(["end", str(gone), "1"]) == 2
    assert f"{gone} is gone" in capsys.readouterr().err

    def full(path: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    opened = _begin(tmp_path)
    assert isinstance(opened, attempt.Attempt)
    (opened.folder / "outcome.json").write_text(json.dumps(_stopped("SIGTERM")))
    monkeypatch.setattr(attempt, "write_json", full)
    assert attempt.main(["end", str(opened.folder), "0"]) == REQUEUE_CODE  # known all the same
    assert "No space left" in capsys.readouterr().err
    options = ["--submission", "s", "--checkpoints", str(tmp_path), "--nodes", "1"]
    assert attempt.main(["begin", str(tmp_path), *options]) == 1
    told = capsys.readouterr().err
    assert "begin.json: No space left" in told
    assert "remedy" in told
    leave_folder = tmp_path / "nowhere"
    monkeypatch.setenv(ATTEMPT_DIR, str(leave_folder))
    leave_note(BUG)  # an error of its own would hide the rank's
    assert "nowhere/rank_00002" in capsys.readouterr().err


def test_a_machine_that_does_not_see_the_run_s_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ATTEMPT_DIR, raising=False)
    attempt.check_folder_is_seen(0)
    monkeypatch.setenv(ATTEMPT_DIR, str(tmp_path))
    attempt.check_folder_is_seen(0)
    monkeypatch.setenv(ATTEMPT_DIR, str(tmp_path / "0001"))
    with pytest.raises(UserError, match=r"does not see .*0001"):
        attempt.check_folder_is_seen(0)


def test_an_attempt_is_new_though_somebody_removed_an_old_one(tmp_path: Path) -> None:
    opened = [_begin(tmp_path), _begin(tmp_path, 4)]
    assert isinstance(opened[0], attempt.Attempt)
    shutil.rmtree(opened[0].folder)
    third = _begin(tmp_path, 8)
    assert isinstance(third, attempt.Attempt)
    assert third.folder.name == "0003"


def test_only_the_log_of_this_attempt_counts(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("oom-kill of the attempt before\nsrun: task 1: Killed\n")
    now = Begin("s", "7", 1, "a1", 0, str(tmp_path / "log"), 31)
    folder, _ = begin(tmp_path, now, 3)
    assert folder is not None
    assert end(folder, 137).kind == "killed"


def test_newest_step(tmp_path: Path) -> None:
    assert newest_step(str(tmp_path)) == -1
    for name in ("step_00000010", "step_00000020"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000010" / "manifest.json").touch()  # the other is not complete
    assert newest_step(str(tmp_path)) == 10
    assert newest_step(f"file://{tmp_path}") == 10


def test_exit_codes_tell_the_kinds_apart() -> None:
    again = [kind for kind in KINDS.values() if kind.again]
    final = [kind.code for kind in KINDS.values() if not kind.again and kind.code]
    assert len(set(final)) == len(final)
    assert REQUEUE_CODE not in final
    assert len(again) == 6


def test_a_signal_passed_on_twice_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    raised: list[int] = []
    monkeypatch.setattr(signals.signal, "raise_signal", raised.append)
    listening = SaveSignals()
    listening._remember(signal.SIGTERM, None)
    clock[0] += 1
    listening._remember(signal.SIGTERM, None)
    assert listening.seen() == (0, True)
    assert not raised
    before = signal.getsignal(signal.SIGTERM)
    try:
        clock[0] += signals.ECHO_S
        listening._remember(signal.SIGTERM, None)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert raised == [signal.SIGTERM]
    assert time.monotonic() == clock[0]


def _start(submission: str, *, restart: int = 0, nodes: str = "a1,a2") -> Begin:
    return Begin(submission, "7", restart, nodes, 0, "", 0)


def _hold(path: Path, host: str, monkeypatch: pytest.MonkeyPatch) -> FileLock:
    """A lock as a process on another machine holds it."""
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: host)
        return FileLock(path, lambda holder: UserError(holder))


def test_a_lost_machine_does_not_hold_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm started the job elsewhere; the rank behind a cut cable sees that, and ends."""
    begin(tmp_path, _start("s", nodes="a1,a2"), 5)
    held = _hold(tmp_path / LOCK_NAME, "a1.cluster.lab", monkeypatch)
    now = _start("s", restart=1, nodes="a2,a3")
    attempt._wait_for_folder(tmp_path, now, wait_s=0)
    assert "taken over from a1" in capsys.readouterr().err
    assert not held.was_taken_over()  # nobody has come yet: it may go on to hold it
    ours = RunLock(str(tmp_path))
    assert held.was_taken_over()
    held.release()  # not ours
    with pytest.raises(UserError, match="another run is writing"):
        RunLock(str(tmp_path))
    ours.require_held()
    ours.release()


@pytest.mark.parametrize(
    ("submission", "nodes"), [("s", "a1,a3"), ("other", "a2,a3")], ids=["same", "foreign"]
)
def test_a_machine_that_is_not_lost_is_waited_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    submission: str,
    nodes: str,
) -> None:
    """It is this attempt's too, where Slurm ends the old ranks, or none of this submission's."""
    begin(tmp_path, _start("s", nodes="a1,a2"), 5)
    held = _hold(tmp_path / LOCK_NAME, "a1", monkeypatch)
    attempt._wait_for_folder(tmp_path, _start(submission, restart=1, nodes=nodes), wait_s=0)
    told = capsys.readouterr().err
    assert "waiting" in told
    assert "held by" in told
    assert "rule" in told
    with pytest.raises(UserError, match="another run is writing"):
        RunLock(str(tmp_path))
    held.release()


def test_a_run_whose_folder_was_taken_over_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = RunLock(str(tmp_path))
    manager = CheckpointManager(str(tmp_path / "checkpoints"), locks=[lock])
    assert not manager.has_failed()
    manager.finish()
    (tmp_path / LOCK_NAME).unlink()
    later = RunLock(str(tmp_path))
    assert manager.has_failed()  # told after every step
    with pytest.raises(UserError, match="has taken"):
        manager.finish()
    manager.close()
    later.require_held()
    later.release()


def test_why_where_the_disk_was_too_full_for_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verdict stands in the log only."""
    monkeypatch.setenv("PATH", "")
    (tmp_path / "log").write_text(
        "0: step 1\nwarning: end.json: No space left on device\n"
        "megascale: disk full. A disk is full.\nrank 0 failed: No space left\n"
    )
    _begin(tmp_path)
    told = call("jobs", "why", tmp_path).stdout
    assert "disk full. A disk is full.\nrank 0 failed: No space left" in told
    assert "without a word" not in told


def test_a_run_whose_folder_is_gone_ends_after_its_step(tmp_path: Path) -> None:
    """Before it makes a new folder with a part of the run in it."""
    lock = RunLock(str(tmp_path / "run"))
    manager = CheckpointManager(str(tmp_path / "run" / "checkpoints"), locks=[lock])
    assert not manager.has_failed()
    (tmp_path / "run").rename(tmp_path / "moved")
    assert manager.has_failed()
    with pytest.raises(UserError, match="run is gone"):
        manager.finish()
    manager.close()
    assert not (tmp_path / "run").exists()


def test_why_of_an_attempt_that_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Slurm, from the folder: a batch script that was killed writes no end."""
    monkeypatch.setenv("PATH", "")
    opened = _begin(tmp_path)
    assert isinstance(opened, attempt.Attempt)
    assert "The machine that ran the batch script ended" in call("jobs", "why", tmp_path).stdout
    (opened.folder / "outcome.json").write_text(json.dumps(_stopped("SIGTERM")))
    assert "It ended after it had saved at step 4." in call("jobs", "why", tmp_path).stdout
