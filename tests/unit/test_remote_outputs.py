"""Outputs in an object store (memory://): restarts, whole objects, the marker last, refusals."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data_prep.records import shard_paths
from data_prep.shard_runner import ShardResult, ShardTask, finished_report, open_run
from data_prep.sources import find_inputs
from data_prep.step import Step, run_step
from data_prep.workplace import own_temporary_folder
from megascale.data.places import (
    absolute,
    as_path,
    below,
    claim,
    is_remote,
    location,
    relative_to,
)
from megascale.errors import UserError
from tests.unit.test_shard_runner import MARKER, TASKS, Copy, make

OUT = "memory://bucket/out"


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The objects by path; scratch files lie in `tmp_path`."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system.store
    system.store.clear()


def objects(store: dict[str, Any]) -> list[str]:
    return sorted(name.removeprefix("/bucket/out/") for name in store)


def test_a_place_is_the_same_in_every_form(tmp_path: Path) -> None:
    local, remote = as_path(str(tmp_path)), as_path("s3://b/a/x")
    assert local == tmp_path == as_path(f"file://{tmp_path}")
    assert not is_remote(local)
    assert is_remote(remote)
    assert location(remote) == "s3://b/a/x"
    assert location(Path("x")) == str(Path.cwd() / "x")
    assert str(absolute("s3://b/a/x")) == "s3://b/a/x"
    with pytest.raises(TypeError):
        os.fspath(remote)  # never a local file called "s3:/b/a/x"
    for place, folder, seen in (
        ("s3://b/a/x", "s3://b/out", "../a/x"),
        ("s3://c/a", "s3://b/out/deep", "../../../c/a"),
        (tmp_path / "a", tmp_path / "b", "../a"),
    ):
        assert relative_to(as_path(place), as_path(folder)) == seen
        assert Path(location(below(as_path(folder), seen))).resolve() == Path(str(place)).resolve()
    with pytest.raises(UserError, match="cannot open nowhere://x"):
        as_path("nowhere://x")


def test_the_first_who_claims_has_it() -> None:
    assert claim(b"one", as_path(f"{OUT}/claim"))
    assert not claim(b"two", as_path(f"{OUT}/claim"))
    assert as_path(f"{OUT}/claim").read_bytes() == b"one"


def test_the_same_files_as_on_a_disk(store: dict[str, Any], tmp_path: Path) -> None:
    make(as_path(OUT), Copy())
    make(tmp_path / "disk", Copy())
    assert objects(store) == sorted(path.name for path in (tmp_path / "disk").iterdir())
    for task in TASKS:
        assert as_path(f"{OUT}/{task.name}.txt").read_bytes() == task.content.encode()
    assert finished_report(as_path(OUT), "copy", {"options": {"a": 1}}) is not None
    assert not [path for path in own_temporary_folder().rglob("*") if path.is_file()]


def test_a_failed_run_is_not_an_output_and_goes_on(store: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="never"):
        make(as_path(OUT), Copy("part_3", "refuse"))
    assert MARKER not in objects(store)
    assert [name for name in objects(store) if name.startswith(".done")] == [
        f".done/part_{number}.json" for number in range(3)
    ]
    del store["/bucket/out/part_1.txt"]
    with pytest.raises(UserError, match=r"options\.a: 1 before, now 2"):
        make(as_path(OUT), Copy(), option=2)
    assert make(as_path(OUT), Copy()).made == ["part_1", "part_3", "part_4"]
    assert objects(store) == ["part_0.txt", *(f"part_{n}.txt" for n in range(1, 5)), MARKER]


def test_nothing_finished_leaves_nothing(store: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="never"):
        make(as_path(OUT), Copy("part_0", "refuse"))
    assert objects(store) == []


def test_replacing_takes_the_marker_away_first(
    store: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(as_path(OUT), Copy())
    with pytest.raises(UserError, match="--overwrite"):
        make(as_path(OUT), Copy(), option=2)
    removed: list[str] = []
    system = type(fsspec.filesystem("memory"))
    remove = system.rm_file
    monkeypatch.setattr(
        system, "rm_file", lambda self, path: (removed.append(path), remove(self, path))[1]
    )
    make(as_path(OUT), Copy(), option=2, overwrite=True)
    assert removed[0] == f"/bucket/out/{MARKER}"
    assert len(objects(store)) == len(TASKS) + 1
    store.clear()
    as_path(f"{OUT}/thesis.txt").write_bytes(b"years of work")
    with pytest.raises(UserError, match="not an output of this command"):
        make(as_path(OUT), Copy(), overwrite=True)


def test_the_marker_comes_last_and_an_upload_that_fails_leaves_none(
    store: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    system = type(fsspec.filesystem("memory"))
    put = system.put_file
    puts: list[str] = []

    def announced(self: Any, local: str, remote: str, **more: Any) -> Any:
        puts.append(remote.rpartition("/")[2])
        if puts.count("part_3.txt") == 1 and puts[-1] == "part_3.txt":
            raise ConnectionError("the line is dead")
        return put(self, local, remote, **more)

    monkeypatch.setattr(system, "put_file", announced)
    with pytest.raises(UserError, match="cannot reach memory://bucket/out/part_3"):
        make(as_path(OUT), Copy())
    assert MARKER not in objects(store)
    assert make(as_path(OUT), Copy()).made == ["part_3", "part_4"]
    assert puts[-1] == MARKER


def test_another_run_that_began_anew_meanwhile_is_noticed(store: dict[str, Any]) -> None:
    with open_run(as_path(OUT), "copy", {"options": {"a": 1}}, MARKER) as run:
        outcome = run.run(TASKS, Copy(), 1)
        other = json.loads(as_path(f"{OUT}/.run.json").read_bytes())
        other["options"]["a"] = 2
        as_path(f"{OUT}/.run.json").write_bytes(json.dumps(other).encode())
        with pytest.raises(UserError, match=r"options\.a: 2 before, now 1"):
            run.finish(outcome)
    assert MARKER not in objects(store)


def test_unfinished_documents_are_not_read(store: dict[str, Any]) -> None:
    def work(task: ShardTask, folder: Path, advance: Any) -> ShardResult:
        (folder / f"{task.name}.jsonl.zst").write_bytes(b"x")
        (folder / f"removed_{task.name}.jsonl.zst").write_bytes(b"y")
        if task.name == "part_4":
            raise UserError("no", rule="never", remedy="stop")
        return ShardResult()

    step = Step("read", as_path(OUT), {}, TASKS, work, lambda outcome: {}, "removed")
    with pytest.raises(UserError, match="never"):
        run_step(step, 1)
    for look in (lambda: shard_paths(as_path(OUT)), lambda: find_inputs([OUT])):
        with pytest.raises(UserError, match=r"holds shards and no report\.json"):
            look()
    assert "removed/part_0.jsonl.zst" in objects(store)
