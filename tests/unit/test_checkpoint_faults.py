"""A save that ends at any point: before each write, sync, rename and removal, on one rank or all.

Ranks are threads that exchange through memory, and a rank "ends" by an exception after which the
disk does nothing more for it: every point is reached one after the other, which no random kill
does. After each: the newest intact checkpoint is found, and nothing intact is gone.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale.checkpoint.background import NICENESS, Snapshot
from megascale.checkpoint.lock import LOCK_NAME, RunLock
from megascale.checkpoint.manager import CheckpointFolder, CheckpointManager, Retention
from megascale.checkpoint.ranks import OneRank
from megascale.checkpoint.reader import CheckpointReader
from megascale.checkpoint.sharing import Shares
from megascale.checkpoint.storage import Storage
from megascale.config.load import load_config
from megascale.config.schema import Config
from megascale.errors import DiskFullError, UserError
from megascale.parallel.fragment import Fragment, whole_box
from megascale.training.output import open_output
from tests.integration.runs import files

SHAPE = (4, 3)
ATTACHMENTS = {"config.yaml": b"a: 1\n", "tokenizer/vocab.json": b"{}"}


class Ended(BaseException):
    """The process is no more."""


class Lost(RuntimeError):
    """What a collective raises when another rank is gone."""


class ThreadRanks:
    """Ranks of one process, each a thread."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: list[Any] = [None] * size
        self._barrier = threading.Barrier(size)
        self._local = threading.local()

    @property
    def rank(self) -> int:
        return self._local.rank

    def exchange(self, value: Any) -> list[Any]:
        try:
            self._values[self.rank] = value
            self._barrier.wait(20)
            everyone = list(self._values)
            self._barrier.wait(20)
        except threading.BrokenBarrierError as error:
            raise Lost("connection closed by peer") from error
        return everyone

    def share(self, tensor: torch.Tensor | None, source: int, holders: Sequence[int]) -> None:
        raise AssertionError("saves share nothing")

    def run(self, work: Callable[[int], None]) -> list[BaseException | None]:
        """`work(rank)` on every rank; what each raised."""
        outcomes: list[BaseException | None] = [None] * self.size

        def one(rank: int) -> None:
            self._local.rank = rank
            try:
                work(rank)
            except BaseException as error:
                outcomes[rank] = error
                if not isinstance(error, UserError):  # told to all ranks, none is gone
                    self._barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes


@dataclass
class Disk:
    """Counts the changes of some ranks and does something before the one numbered `at`."""

    ranks: ThreadRanks
    at: int = -1
    only: int | None = None
    full: bool = False
    seen: list[str] = field(default_factory=list)
    gone: set[int] = field(default_factory=set)
    unsynced: dict[str, int] = field(default_factory=dict)
    mutex: Any = field(default_factory=threading.Lock)

    def __call__(self, change: str, path: str) -> None:
        with self.mutex:
            rank = self.ranks.rank
            if rank in self.gone:
                raise Ended
            if self.only in (None, rank):
                self.seen.append(f"{change} {os.path.basename(path)}")
                if len(self.seen) - 1 == self.at or (self.full and len(self.seen) > self.at >= 0):
                    if self.full:
                        if change == "remove":
                            return
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    self.gone |= {rank} if self.only is not None else set(range(self.ranks.size))
                    raise Ended
            if change == "write":
                self.unsynced[path] = rank
            elif change == "sync":
                self.unsynced.pop(path, None)

    def lose_power(self) -> None:
        """What was not synced when its rank ended is not there after the start."""
        for path, rank in self.unsynced.items():
            if rank in self.gone and os.path.exists(path):
                os.truncate(path, os.path.getsize(path) // 2)


def _fragments(rank: int, size: int, value: float) -> list[Fragment]:
    rows = SHAPE[0] // size
    numel = rows * SHAPE[1]
    tensor = _values(value)[rank * numel : (rank + 1) * numel].clone()
    return [Fragment("w", "master", SHAPE, whole_box(SHAPE), rank * numel, tensor)]


def _values(step: float) -> torch.Tensor:
    return 100 * step + torch.arange(12.0)


def _save(
    root: Path, size: int, step: int, disk: Disk | None = None, reuse: bool = False
) -> list[BaseException | None]:
    ranks = disk.ranks if disk is not None else ThreadRanks(size)

    def work(rank: int) -> None:
        storage = Storage(str(root), disk) if disk is not None else Storage(str(root))
        manager = CheckpointManager(
            str(root), keep_last=2, reuse=reuse, storage=storage, ranks=ranks
        )
        manager.save(step, _fragments(rank, size, float(step)), {"step": step}, ATTACHMENTS)

    return ranks.run(work)


def _newest(root: Path) -> tuple[int, list[str]]:
    reader, notes = CheckpointManager(str(root)).open_newest_intact()
    assert reader is not None
    tensor = torch.zeros(12)
    reader.fill(Fragment("w", "master", SHAPE, whole_box(SHAPE), 0, tensor))
    assert torch.equal(tensor, _values(reader.manifest.step))
    reader.close()
    return reader.manifest.step, notes


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in (2, 4):
        assert _save(root, 2, step) == [None, None]
    return root


def _copy(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


@pytest.mark.parametrize("step", [6, 4], ids=["new", "replaces"])
@pytest.mark.parametrize("only", [None, 0, 1], ids=["all", "rank0", "rank1"])
def test_a_save_that_ends_at_any_point(
    two_steps: Path, tmp_path: Path, step: int, only: int | None
) -> None:
    root = tmp_path / "checkpoints"
    whole = Disk(ThreadRanks(2), only=only)
    assert _save(_copy(two_steps, root), 2, step, whole) == [None, None]
    points = len(whole.seen)
    assert points >= (25 if only is None else 5), whole.seen
    for at in range(points):
        disk = Disk(ThreadRanks(2), at, only)
        outcomes = _save(_copy(two_steps, root), 2, step, disk)
        assert any(isinstance(outcome, Ended) for outcome in outcomes)
        disk.lose_power()
        found, notes = _newest(root)
        assert found in (4, step), (at, whole.seen[at])
        assert notes == []
        intact = CheckpointFolder(str(root)).steps()
        assert 4 in intact
        assert 2 in intact or found == 6  # pruned, or about to be, only after 6 was complete
        assert _save(root, 2, 8) == [None, None]  # the next save tidies up by itself
        assert _newest(root)[0] == 8
        assert [name for name in os.listdir(root) if name.startswith(".writing")] == []


# Over the files of a pruned one ---------------------------------------------------------------


@pytest.fixture(scope="module")
def with_spare(two_steps: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 4 and 6, and the space of step 2, in which two files are that no save writes."""
    root = _copy(two_steps, tmp_path_factory.mktemp("spare") / "checkpoints")
    assert _save(root, 2, 6, reuse=True) == [None, None]
    (root / ".spare" / "rank_00002.safetensors").write_bytes(b"of a larger run")
    (root / ".spare" / "tokenizer" / "old.json").write_bytes(b"{}")
    return root


def test_a_save_writes_over_a_pruned_one(with_spare: Path, tmp_path: Path) -> None:
    root = _copy(with_spare, tmp_path / "checkpoints")
    assert CheckpointFolder(str(root)).steps() == [4, 6]
    for rank in range(2):  # what was there is longer than what comes
        with open(root / ".spare" / f"rank_{rank:05d}.safetensors", "ab") as stream:
            stream.write(bytes(1000))
    spaces = [os.stat(path).st_ino for path in sorted((root / ".spare").glob("rank_0000[01]*"))]
    assert _save(root, 2, 8, reuse=True) == [None, None]
    assert set(os.listdir(root)) == {"step_00000006", "step_00000008", ".spare"}
    written = root / "step_00000008"
    assert [os.stat(path).st_ino for path in sorted(written.glob("rank_*"))] == spaces
    assert set(files(written)) == set(files(root / "step_00000006"))
    assert _newest(root) == (8, [])
    assert not (root / ".spare").exists()  # a resume lets it go


@pytest.mark.parametrize("only", [None, 1], ids=["all", "rank1"])
def test_a_save_over_a_pruned_one_that_ends_at_any_point(
    with_spare: Path, tmp_path: Path, only: int | None
) -> None:
    root = tmp_path / "checkpoints"
    whole = Disk(ThreadRanks(2), only=only)
    assert _save(_copy(with_spare, root), 2, 8, whole, reuse=True) == [None, None]
    for at in range(len(whole.seen)):
        disk = Disk(ThreadRanks(2), at, only)
        outcomes = _save(_copy(with_spare, root), 2, 8, disk, reuse=True)
        assert any(isinstance(outcome, Ended) for outcome in outcomes)
        disk.lose_power()
        found, notes = _newest(root)
        assert (found, notes) in ((6, []), (8, [])), (at, whole.seen[at])
        intact = CheckpointFolder(str(root)).steps()
        assert 6 in intact
        assert 4 in intact or found == 8


def test_what_is_read_or_has_another_name_is_not_written_over(
    with_spare: Path, tmp_path: Path
) -> None:
    root, other_name = _copy(with_spare, tmp_path / "checkpoints"), tmp_path / "linked"
    os.link(root / ".spare" / "rank_00001.safetensors", other_name)
    kept = other_name.read_bytes()
    readers = {step: CheckpointReader(str(root / f"step_{step:08d}")) for step in (4, 6)}
    part = Fragment("w", "master", SHAPE, whole_box(SHAPE), 0, torch.zeros(12))
    readers[4].fill(part)  # from now on its files are open
    held = {os.stat(path).st_ino for path in (root / "step_00000004").glob("rank_*")}
    for step in (8, 10):  # over those of step 2, then over those of step 4
        assert _save(root, 2, step, reuse=True) == [None, None]
    assert other_name.read_bytes() == kept
    assert held.isdisjoint(os.stat(path).st_ino for path in (root / "step_00000010").iterdir())
    part.tensor.zero_()
    readers[4].fill(part)
    assert torch.equal(part.tensor, _values(4))
    assert _newest(root) == (10, [])
    with pytest.raises(UserError, match="is missing"):  # it went before anything of it was read
        readers[6].fill(part)
    for reader in readers.values():
        reader.close()


def _maps(path: Path) -> Callable[[], bytes]:
    with open(path, "rb") as stream:
        mapping = mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)
    return lambda: bytes(mapping)


def _opens(path: Path) -> Callable[[], bytes]:
    stream = open(path, "rb")  # noqa: SIM115
    return stream.read


def _another_process(path: Path) -> Callable[[], bytes]:
    """A program that has the file as its input, and reads it when it is told to."""
    told, tell = os.pipe()
    program = "import os, sys; os.read(int(sys.argv[1]), 1); os.write(1, os.read(0, 1 << 20))"
    with open(path, "rb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", program, str(told)],
            stdin=stream,
            stdout=subprocess.PIPE,
            pass_fds=[told],
        )
    os.close(told)

    def read() -> bytes:
        os.write(tell, b"go\n")
        os.close(tell)
        return process.communicate()[0]

    return read


@pytest.mark.parametrize("holds", [_opens, _maps, _another_process])
def test_what_another_program_reads_is_not_written_over(
    two_steps: Path, tmp_path: Path, holds: Callable[[Path], Callable[[], bytes]]
) -> None:
    root = _copy(two_steps, tmp_path / "checkpoints")
    kept = (root / "step_00000002" / "rank_00000.safetensors").read_bytes()
    read = holds(root / "step_00000002" / "rank_00000.safetensors")
    other = os.stat(root / "step_00000002" / "rank_00001.safetensors").st_ino
    for step in (6, 8):
        assert _save(root, 2, step, reuse=True) == [None, None]
    assert read() == kept
    written = root / "step_00000008"
    assert os.stat(written / "rank_00001.safetensors").st_ino == other  # this one nobody reads
    assert CheckpointReader(str(written)).damage() is None


def test_a_copy_in_the_middle_of_a_removed_checkpoint_finds_no_other_bytes(
    two_steps: Path, tmp_path: Path
) -> None:
    root = _copy(two_steps, tmp_path / "checkpoints")
    folder = os.open(root / "step_00000002", os.O_RDONLY)  # as cp -r and rsync hold it
    assert _save(root, 2, 6, reuse=True) == [None, None]
    found = os.stat("rank_00001.safetensors", dir_fd=folder)
    assert _save(root, 2, 8, reuse=True) == [None, None]
    assert os.stat(root / "step_00000008" / "rank_00001.safetensors").st_ino == found.st_ino
    with pytest.raises(FileNotFoundError):
        os.open("rank_00001.safetensors", os.O_RDONLY, dir_fd=folder)
    os.close(folder)


def test_on_a_file_system_of_several_machines_nothing_is_written_over(
    two_steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _copy(two_steps, tmp_path / "checkpoints")
    assert Storage(str(root)).is_of_one_machine()
    assert Storage("/proc").is_of_one_machine() is False
    monkeypatch.setattr("megascale.checkpoint.storage._file_system", lambda path: "nfs4")
    assert _save(root, 2, 6, reuse=True) == [None, None]
    assert sorted(os.listdir(root)) == ["step_00000004", "step_00000006"]


@pytest.mark.parametrize("only", [0, 1], ids=["rank0", "rank1"])
def test_a_disk_that_is_full_from_any_point_on(two_steps: Path, tmp_path: Path, only: int) -> None:
    root = tmp_path / "checkpoints"
    whole = Disk(ThreadRanks(2), only=only)
    assert _save(_copy(two_steps, root), 2, 6, whole) == [None, None]
    for at, point in enumerate(whole.seen):
        kept = files(_copy(two_steps, root))
        disk = Disk(ThreadRanks(2), at, only, full=True)
        outcomes = _save(root, 2, 6, disk)
        if point.startswith("remove"):
            continue  # a full disk lets go
        assert all(isinstance(outcome, DiskFullError) for outcome in outcomes), (point, outcomes)
        assert f"rank {only}: cannot write" in str(outcomes[1 - only])
        assert "No space left on device" in str(outcomes[0])
        assert "free space" in str(outcomes[0])
        found, _ = _newest(root)
        assert found in (4, 6)
        if found == 4:
            assert files(root) == kept


# Damage ---------------------------------------------------------------------------------------

FILES = ("manifest.json", "rank_00000.safetensors", "rank_00001.safetensors", "config.yaml")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _link(path: Path) -> None:
    moved = path.parent.parent.parent / path.name
    path.rename(moved)
    path.symlink_to(moved)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "flipped bit": _flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "link": _link,
    "of another step": lambda path: shutil.copy(
        path.parent.parent / "step_00000002" / path.name, path
    ),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", [*FILES, "tokenizer/vocab.json"])
def test_a_damaged_file_is_named_and_the_one_before_taken(
    two_steps: Path, tmp_path: Path, file: str, damage: str
) -> None:
    root = _copy(two_steps, tmp_path / "checkpoints")
    path = root / "step_00000004" / file
    if damage == "of another step" and file in ("tokenizer/vocab.json", "config.yaml"):
        path.write_bytes(b"other")
    else:
        DAMAGE[damage](path)
    before = files(root)
    found, notes = _newest(root)
    assert found == 2
    assert len(notes) == 1
    assert "step_00000004 passed over: " in notes[0]
    named = "rank_0000" if file == "manifest.json" and damage == "of another step" else file
    assert named in notes[0]
    assert files(root) == before


def test_swapped_files_are_noticed(two_steps: Path, tmp_path: Path) -> None:
    root = _copy(two_steps, tmp_path / "checkpoints")
    one, other = (root / "step_00000004" / name for name in FILES[1:3])
    contents = one.read_bytes(), other.read_bytes()
    assert len(contents[0]) == len(contents[1])
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    found, notes = _newest(root)
    assert found == 2
    assert "checksum" in notes[0]


def test_nothing_is_pruned_while_the_newest_is_not_whole(two_steps: Path, tmp_path: Path) -> None:
    root = _copy(two_steps, tmp_path / "checkpoints")
    (root / "step_00000004" / "config.yaml").unlink()
    assert CheckpointFolder(str(root)).prune(Retention(1)) == []
    _flip(root / "step_00000004" / "rank_00000.safetensors")
    assert CheckpointFolder(str(root)).prune(Retention(1), thorough=True) == []
    assert CheckpointFolder(str(root)).steps() == [2, 4]


# Who may write --------------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_refused_and_a_dead_one_is_not_in_the_way(
    tmp_path: Path,
) -> None:
    lock = RunLock(str(tmp_path))
    with pytest.raises(UserError, match=r"another run is writing to .*process") as caught:
        RunLock(str(tmp_path))
    assert str(os.getpid()) in str(caught.value)
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    child = os.fork()
    if child == 0:  # takes the lock and dies without a word
        RunLock(str(tmp_path))
        os._exit(9)
    os.waitpid(child, 0)
    assert (tmp_path / LOCK_NAME).exists()
    RunLock(str(tmp_path)).release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shared", ["folder", "staging_dir"])
def test_two_runs_with_one_folder_for_checkpoints(tmp_path: Path, shared: str) -> None:
    """Their own folders differ; a second name for the same folder does not help."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "kept")

    def config(run: str, folder: str) -> Config:
        output = {"output_dir": str(tmp_path / run)}
        saving = {shared: str(tmp_path / folder)}
        return load_config({"run": output, "checkpoint": saving, "data": {"path": "x"}})

    locks = open_output(config("one", "kept"), OneRank())
    assert len(locks) == 2
    with pytest.raises(UserError, match="another run is writing to") as caught:
        open_output(config("two", "alias"), OneRank())
    assert f"checkpoint.{shared}" in caught.value.remedy
    for lock in locks:
        lock.release()
    again = open_output(config("two", "alias"), OneRank())  # the refused run holds nothing
    assert [lock.folder for lock in again] == [str(tmp_path / "two"), str(tmp_path / "kept")]
    for lock in again:
        lock.release()
    same = open_output(config("kept", "kept"), OneRank())
    assert len(same) == 1
    same[0].release()


def test_a_folder_that_cannot_be_written(
    two_steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(change: str, path: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    root = _copy(two_steps, tmp_path / "checkpoints")
    before = files(root)
    manager = CheckpointManager(str(root), storage=Storage(str(root), read_only))
    with pytest.raises(UserError, match="Read-only file system") as caught:
        manager.save(6, _fragments(0, 1, 6.0), {}, {})
    assert "writable" in str(caught.value)
    assert files(root) == before
    assert CheckpointReader(str(root / "step_00000004")).damage() is None


def _shifted(fragment: Fragment, rank: int) -> Fragment:
    """One element of the other rank, and without the own last one."""
    return replace(fragment, start=fragment.start - rank)


def _shorter(fragment: Fragment, rank: int) -> Fragment:
    return replace(fragment, tensor=fragment.tensor[rank:], start=fragment.start + rank)


@pytest.mark.parametrize(
    ("kind", "wrong", "says"),
    [
        ("master", _shifted, "pieces of master of 'w' overlap"),
        ("master", _shorter, "the pieces of master of 'w' hold 11 of its 12 elements"),
        ("exp_avg", _shifted, "pieces of exp_avg of 'w' overlap"),
        ("exp_avg", _shorter, "the pieces of exp_avg of 'w' hold 11 of its 12 elements"),
    ],
)
def test_what_no_reader_would_take_is_not_committed(
    two_steps: Path, tmp_path: Path, kind: str, wrong: Any, says: str
) -> None:
    root = _copy(two_steps, tmp_path / "checkpoints")
    before, ranks = files(root), ThreadRanks(2)

    def work(rank: int) -> None:
        manager = CheckpointManager(str(root), ranks=ranks)
        right = _fragments(rank, 2, 6.0)
        both = [*right, *(replace(f, kind="exp_avg") for f in right)]
        manager.save(6, [wrong(f, rank) if f.kind == kind else f for f in both], {}, {})

    for outcome in ranks.run(work):
        assert isinstance(outcome, UserError)
        assert f"was not committed: {says}" in outcome.what
    assert files(root) == before


def test_who_writes_what_is_worked_out_again_only_where_something_changed() -> None:
    class Counted(ThreadRanks):
        lists = 0

        def exchange(self, value: Any) -> list[Any]:
            self.lists += isinstance(value, list) and self.rank == 0
            return super().exchange(value)

    ranks, shares = Counted(2), [Shares(), Shares()]

    def written(kinds: Sequence[Sequence[str]]) -> list[list[str]]:
        """By rank the kinds that it writes; rank 1 holds copies of what rank 0 owns."""
        found: list[list[str]] = [[], []]

        def work(rank: int) -> None:
            held = [replace(_fragments(0, 1, 1.0)[0], kind=kind) for kind in kinds[rank]]
            owned = held if rank == 0 else []
            found[rank] = [f.kind for f in shares[rank].own(owned, held, ranks)]

        assert ranks.run(work) == [None, None]
        return found

    both = ("master", "exp_avg")
    first = written([both, both])
    assert sorted(map(len, first)) == [1, 1]
    assert ranks.lists == 1
    assert written([both, both]) == first
    assert ranks.lists == 1
    assert written([both, ()]) == [["master", "exp_avg"], []]  # only rank 1 has changed
    assert ranks.lists == 2
    assert written([both, both]) == first
    assert ranks.lists == 3


# In the background ----------------------------------------------------------------------------


def test_a_background_failure_is_told_by_the_next_call_and_harms_nothing(
    two_steps: Path, tmp_path: Path
) -> None:
    def full(change: str, path: str) -> None:
        if change == "sync" and "step_00000006" in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    root = _copy(two_steps, tmp_path / "checkpoints")
    before = files(root)
    storage = Storage(str(root), full)
    manager = CheckpointManager(str(root), asynchronous=True, storage=storage)
    manager.save(6, _fragments(0, 1, 6.0), {}, {})
    deadline = threading.Event()
    while not manager.has_failed() and not deadline.wait(0.01):
        pass
    with pytest.raises(DiskFullError, match="No space left on device"):
        manager.finish()
    manager.finish()  # told once
    assert files(root) == before
    manager.save(8, _fragments(0, 1, 8.0), {}, {})
    manager.finish()
    assert _newest(root)[0] == 8


def test_what_changes_after_the_snapshot_is_not_saved(tmp_path: Path) -> None:
    gate = threading.Event()

    def slow(change: str, path: str) -> None:
        gate.wait(20)

    manager = CheckpointManager(
        str(tmp_path), asynchronous=True, storage=Storage(str(tmp_path), slow)
    )
    fragments = _fragments(0, 1, 2.0)
    state: dict[str, Any] = {"callbacks": {"x": {"y": 1}}}
    manager.save(2, fragments, state, {})
    manager.wait_until_copied()
    assert manager.is_busy()
    fragments[0].tensor.fill_(-1.0)
    state["callbacks"]["x"]["y"] = 2
    gate.set()
    manager.finish()
    assert _newest(tmp_path)[0] == 2
    assert CheckpointReader(str(tmp_path / "step_00000002")).manifest.state == {
        "callbacks": {"x": {"y": 1}}
    }


def test_a_save_returns_before_anything_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, take = threading.Event(), Snapshot.take

    def late(self: Snapshot, *what: Any) -> Any:
        gate.wait(20)
        return take(self, *what)

    monkeypatch.setattr(Snapshot, "take", late)
    manager = CheckpointManager(str(tmp_path), asynchronous=True)
    manager.save(2, _fragments(0, 1, 2.0), {}, {})
    assert manager.is_busy()
    waiting = threading.Thread(target=manager.wait_until_copied)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()  # the update has to wait
    gate.set()
    waiting.join(20)
    assert not waiting.is_alive()
    manager.finish()
    assert _newest(tmp_path)[0] == 2


def test_the_copy_has_the_priority_of_training_and_the_writing_a_lower_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    seen: dict[str, int] = {}
    take = Snapshot.take

    def noted(self: Snapshot, *what: Any) -> Any:
        seen["copy"] = niceness()
        return take(self, *what)

    def written(change: str, path: str) -> None:
        seen["write"] = niceness()

    monkeypatch.setattr(Snapshot, "take", noted)
    storage = Storage(str(tmp_path), written)
    manager = CheckpointManager(str(tmp_path), asynchronous=True, storage=storage)
    manager.save(2, _fragments(0, 1, 2.0), {}, {})
    manager.finish()
    assert seen["copy"] == niceness()
    assert seen["write"] == min(niceness() + NICENESS, 19)


def test_a_copy_that_fails_does_not_hold_the_update_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Snapshot, *what: Any) -> Any:
        raise MemoryError("no memory for the copy")

    monkeypatch.setattr(Snapshot, "take", full)
    manager = CheckpointManager(str(tmp_path), asynchronous=True)
    manager.save(2, _fragments(0, 1, 2.0), {}, {})
    manager.wait_until_copied()
    with pytest.raises(UserError, match="MemoryError: no memory for the copy"):
        manager.finish()
    assert manager.steps() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_snapshot_is_a_copy_of_any_type_in_memory_that_is_kept(dtype: torch.dtype) -> None:
    values = torch.arange(37, dtype=dtype)
    parts = (values[:0], values[:5], values[5:], values[::2])
    fragments = [
        Fragment(f"w{i}", "master", tuple(part.shape), whole_box(tuple(part.shape)), 0, part)
        for i, part in enumerate(parts)
    ]
    snapshot = Snapshot()
    copies = snapshot.take(fragments)
    expected = [part.clone() for part in parts]
    where = [copy.tensor.data_ptr() for copy in copies[1:]]
    values.zero_()
    for copy, part in zip(copies, expected, strict=True):
        assert copy.tensor.dtype == dtype
        assert torch.equal(copy.tensor, part)
    again = snapshot.take(fragments)
    assert [copy.tensor.data_ptr() for copy in again[1:]] == where
    assert all(not copy.tensor.any() for copy in again)
