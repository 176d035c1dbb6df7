"""The frame of shard-parallel steps: same result for any workers, restarts, refusals, deaths."""

from __future__ import annotations

import errno
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data_prep.progress import Advance
from data_prep.shard_runner import (
    RunOutcome,
    ShardResult,
    ShardTask,
    complete_shard,
    finished_report,
    open_run,
)
from data_prep.workplace import ShardStore
from megascale.errors import UserError
from megascale.file_lock import FileLock

TASKS = [ShardTask(f"part_{number}", 10 + number, f"text {number}") for number in range(5)]
MARKER = "report.json"


@dataclass(frozen=True)
class Copy:
    """Writes the task's content; fails in the shard `fails_at`, in the way `how`."""

    fails_at: str = ""
    how: str = ""
    log: Path | None = None

    def __call__(self, task: ShardTask, folder: Path, advance: Advance) -> ShardResult:
        if self.log is not None:
            with open(self.log, "a") as stream:
                stream.write(f"{task.name}\n")
        (folder / f"{task.name}.txt").write_text(task.content)
        if task.name == self.fails_at:
            self._fail()
        advance(task.size // 2)
        result = ShardResult({"characters": len(task.content)}, details={"from": task.name})
        result.skips.add("odd", f"{task.name}:1")
        return result

    def _fail(self) -> None:
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.how == "refuse":
            raise UserError("no", rule="never", remedy="stop")
        raise ValueError("a bug")


def make(
    output: Path, work: Copy, workers: int = 1, overwrite: bool = False, option: int = 1
) -> RunOutcome:
    with open_run(output, "copy", {"options": {"a": option}}, MARKER, overwrite) as run:
        outcome = run.run(TASKS, work, workers)
        run.finish(outcome)
    return outcome


def files(folder: Path) -> dict[str, bytes]:
    names = sorted(path for path in folder.rglob("*") if path.is_file())
    found = {str(path.relative_to(folder)): path.read_bytes() for path in names}
    found.pop("report.json")
    return found


def test_workers_change_nothing_and_the_report_adds_up(tmp_path: Path) -> None:
    make(tmp_path / "one", Copy(), workers=1)
    outcome = make(tmp_path / "two", Copy(), workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert set(files(tmp_path / "one")) == {f"{task.name}.txt" for task in TASKS}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    assert list(outcome.results) == [task.name for task in TASKS]
    record = outcome.results["part_3"].files["part_3.txt"]
    assert (record.bytes, len(record.xxh3)) == (6, 32)
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["counts"] == {"characters": 30}
    expected = ["part_0:1", "part_1:1", "part_2:1"]
    assert report["skipped"] == {"odd": {"count": 5, "examples": expected}}
    assert len(report["workers"]) == 2
    assert all(used["peak_rss_bytes"] > 1e6 for used in report["workers"])
    assert finished_report(tmp_path / "two", "copy", {"options": {"a": 1}}) == report
    assert finished_report(tmp_path / "two", "copy", {"options": {"a": 2}}) is None


@pytest.mark.parametrize(
    ("how", "workers", "kind", "said"),
    [
        ("kill", 2, UserError, "was killed by SIGKILL in shard part_3"),
        ("full", 1, UserError, "no space to write"),
        ("full", 2, UserError, "no space to write"),
        ("refuse", 2, UserError, "rule:   never"),
        ("bug", 2, RuntimeError, "ValueError: a bug"),
    ],
)
def test_a_failed_run_goes_on_where_it_was(
    tmp_path: Path, how: str, workers: int, kind: type[Exception], said: str
) -> None:
    output, log = tmp_path / "out", tmp_path / "log"
    with pytest.raises(kind, match=said):
        make(output, Copy("part_3", how), workers)
    assert not output.exists()
    done = sorted(path.stem for path in (tmp_path / ".out.unfinished/.done").iterdir())
    assert done, "another worker may be slower, but two shards before the failing one are done"
    assert set(done) <= {"part_0", "part_1", "part_2", "part_4"}
    assert not list((tmp_path / ".out.unfinished").glob("*.tmp"))
    outcome = make(output, Copy(log=log))
    assert outcome.made == log.read_text().split()
    assert sorted([*outcome.made, *done]) == [task.name for task in TASKS]
    make(tmp_path / "whole", Copy())
    assert files(output) == files(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*"))


def test_a_shard_that_lost_its_files_is_made_again(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        make(tmp_path / "out", Copy("part_3", "refuse"))
    (tmp_path / ".out.unfinished/part_1.txt").write_text("cut")
    (tmp_path / ".out.unfinished/.done/part_0.json").write_text('{"torn')
    assert make(tmp_path / "out", Copy()).made == ["part_0", "part_1", "part_3", "part_4"]


def test_other_options_do_not_continue(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        make(tmp_path / "out", Copy("part_3", "refuse"))
    with pytest.raises(UserError, match=r"options\.a: 1 before, now 2"):
        make(tmp_path / "out", Copy(), option=2)
    assert len(make(tmp_path / "out", Copy(), option=2, overwrite=True).made) == len(TASKS)
    with pytest.raises(UserError, match="--overwrite"):
        make(tmp_path / "out", Copy(), option=1)


def test_a_run_without_a_finished_shard_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        make(tmp_path / "out", Copy("part_0", "refuse"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="--workers 0"):
        make(tmp_path / "out", Copy(), workers=0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("report.json", {"mine": 1}),
        ("report.json", {"format": "megascale-report", "version": 1, "step": "other"}),
        ("manifest.json", {"format": "megascale-checkpoint"}),
    ],
)
def test_overwrite_replaces_outputs_of_the_step_only(
    tmp_path: Path, name: str, content: dict[str, Any]
) -> None:
    theirs = tmp_path / "out"
    theirs.mkdir()
    (theirs / name).write_text(json.dumps(content, indent=2))
    (theirs / "thesis.txt").write_text("years of work")
    run = open_run(theirs, "copy", {}, name, overwrite=True)
    with pytest.raises(UserError, match="not an output of this command"), run:
        pass
    assert (theirs / "thesis.txt").read_text() == "years of work"
    (theirs / name).unlink()
    make(tmp_path / "ours", Copy())
    assert make(tmp_path / "ours", Copy(), overwrite=True, option=2).made


def test_a_packed_shard_does_not_count_more_than_its_size(tmp_path: Path) -> None:
    def work(task: ShardTask, folder: Path, advance: Advance) -> ShardResult:
        for _ in range(3):
            advance(task.size - 4)  # bytes of text, of which packed input has more
        return ShardResult()

    (tmp_path / ".done").mkdir()
    steps: list[int] = []
    complete_shard(ShardStore(str(tmp_path), tmp_path), work, TASKS[0], steps.append)
    assert steps == [6, 4, 0, 0]


def test_two_processes_on_one_output(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / ".out.lock", lambda holder: UserError(holder))
    with pytest.raises(UserError, match=rf"another process is writing .*{os.getpid()}"):
        make(tmp_path / "out", Copy())
    lock.release()
    make(tmp_path / "out", Copy())
