"""Staging folders of several machines, each a folder here; ranks are threads.

Every machine has the files of its own ranks only. A resume takes the newest checkpoint that the
run's folder and all staging folders hold together.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale.checkpoint.manager import CheckpointFolder, CheckpointManager
from megascale.checkpoint.reader import CheckpointReader
from megascale.checkpoint.staging import disk_leaders
from megascale.checkpoint.storage import Storage
from megascale.parallel.fragment import Fragment, whole_box
from tests.unit.test_checkpoint_faults import ATTACHMENTS, SHAPE, ThreadRanks, _fragments, _values


class Rank:
    """One of `ThreadRanks`, from whatever thread it is used: uploads have their own."""

    def __init__(self, ranks: ThreadRanks, rank: int) -> None:
        self.rank, self.size, self._ranks = rank, ranks.size, ranks

    def exchange(self, value: Any) -> list[Any]:
        self._ranks._local.rank = self.rank
        return self._ranks.exchange(value)

    def share(self, tensor: torch.Tensor | None, source: int, holders: Sequence[int]) -> None:
        raise AssertionError("saves share nothing")


def _manager(root: Path, ranks: Rank, machine: int, per_machine: int = 1) -> CheckpointManager:
    stage = root / f"machine{machine // per_machine}" / "stage"
    return CheckpointManager(str(root / "kept"), keep_last=9, staging=str(stage), ranks=ranks)


def _run(size: int, work: Any) -> list[Any]:
    """`work(ranks, rank)` on every rank; its results, or what a rank raised is raised."""
    ranks, results = ThreadRanks(size), [None] * size

    def one(rank: int) -> None:
        results[rank] = work(Rank(ranks, rank), rank)

    for error in ranks.run(one):
        if error is not None:
            raise error
    return results


def _save(root: Path, size: int, step: int, per_machine: int = 1) -> None:
    def work(ranks: Rank, rank: int) -> None:
        manager = _manager(root, ranks, rank, per_machine)
        manager.save(step, _fragments(rank, size, float(step)), {"step": step}, ATTACHMENTS)
        manager.finish()

    _run(size, work)


def _newest(root: Path, size: int, order: tuple[int, ...] = ()) -> tuple[int, str, list[str]]:
    """What all ranks agree on; `order` says which machine each rank is on this time."""

    def work(ranks: Rank, rank: int) -> tuple[int, str, list[str]]:
        manager = _manager(root, ranks, order[rank] if order else rank)
        reader, notes = manager.open_newest_intact()
        assert reader is not None
        tensor = torch.zeros(12)
        reader.fill(Fragment("w", "master", SHAPE, whole_box(SHAPE), 0, tensor))
        assert torch.equal(tensor, _values(reader.manifest.step))
        reader.close()
        return reader.manifest.step, reader.storage.url, notes

    results = _run(size, work)
    assert all(result[:2] == results[0][:2] for result in results)
    return results[0]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Steps 2 and 4 of two ranks on two machines, staged and kept."""
    for step in (2, 4):
        _save(tmp_path, 2, step)
    return tmp_path


def test_every_machine_has_its_own_ranks_files(saved: Path) -> None:
    first, second = (saved / f"machine{n}" / "stage" / "step_00000004" for n in range(2))
    assert (first / "rank_00000.safetensors").exists()
    assert not (first / "rank_00001.safetensors").exists()
    assert not (second / "rank_00000.safetensors").exists()
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()
    assert CheckpointReader(str(saved / "kept" / "step_00000004")).damage() is None
    assert _newest(saved, 2) == (4, str(saved / "kept" / "step_00000004"), [])


@pytest.mark.parametrize("order", [(), (1, 0)], ids=["same", "ranks elsewhere"])
def test_what_was_not_copied_yet_is_brought_together(saved: Path, order: tuple[int, ...]) -> None:
    shutil.rmtree(saved / "kept" / "step_00000004")
    assert _newest(saved, 2, order) == (4, str(saved / "kept" / "step_00000004"), [])
    assert CheckpointReader(str(saved / "kept" / "step_00000004")).damage() is None


@pytest.mark.parametrize("damage", ["gone", "truncated", "flipped"])
def test_what_cannot_be_brought_together_is_passed_over(saved: Path, damage: str) -> None:
    shutil.rmtree(saved / "kept" / "step_00000004")
    file = saved / "machine1" / "stage" / "step_00000004" / "rank_00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if damage == "gone":
        shutil.rmtree(saved / "machine1")
    else:
        file.write_bytes(content if damage == "flipped" else content[:-1])
    step, where, notes = _newest(saved, 2)
    assert (step, where) == (2, str(saved / "kept" / "step_00000002"))
    assert "stage/step_00000004 passed over" in notes[0]
    assert sorted(CheckpointFolder(str(saved / "kept")).storage.folders()) == ["step_00000002"]


def test_old_staged_checkpoints_go_on_every_machine(saved: Path) -> None:
    _save(saved, 2, 6)
    for machine in range(2):
        assert CheckpointFolder(str(saved / f"machine{machine}" / "stage")).steps() == [4, 6]
    assert CheckpointFolder(str(saved / "kept")).steps() == [2, 4, 6]


def test_ranks_of_one_machine_share_its_folder(tmp_path: Path) -> None:
    _save(tmp_path, 4, 2, per_machine=2)

    def leaders(ranks: Rank, rank: int) -> list[int]:
        return disk_leaders(Storage(str(tmp_path / f"machine{rank // 2}" / "stage")), ranks)

    assert _run(4, leaders) == [[0, 0, 2, 2]] * 4
    for machine in range(2):
        stage = tmp_path / f"machine{machine}" / "stage"
        names = sorted(path.name for path in (stage / "step_00000002").glob("rank*"))
        assert names == [f"rank_0000{2 * machine + n}.safetensors" for n in range(2)]
        assert sorted(path.name for path in stage.iterdir()) == ["step_00000002"]
