"""What is found wrong with machines, and which of them are left out."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megascale.errors import UserError
from megascale.launcher import attempt, preflight
from megascale.launcher.attempt import write_json
from megascale.launcher.bad_nodes import (
    add_bad_nodes,
    choose_nodes,
    nodes_to_exclude,
    read_bad_nodes,
)
from megascale.launcher.ends import KINDS
from megascale.launcher.preflight import (
    Facts,
    check_tensor_groups,
    compare,
    crossing_groups,
    gather_facts,
    stale_locks,
)

WELL = Facts(0, "a1", {"torch": "2.13"}, ("H100",), {"/tmp": 1 << 40}, 1 << 36, 100.0, "10.0.0.1")


def _machines(*changes: dict[str, object]) -> list[Facts]:
    """Four machines as they should be, the last ones with changes."""
    well = [replace(WELL, rank=i, host=f"a{i + 1}", address=f"10.0.0.{i}") for i in range(4)]
    first = len(well) - len(changes)
    return well[:first] + [replace(f, **c) for f, c in zip(well[first:], changes, strict=True)]


def test_machines_that_are_alike() -> None:
    assert compare(_machines()) == []


@pytest.mark.parametrize(
    ("change", "told", "is_error", "is_bad_node"),
    [
        ({"versions": {"torch": "2.12"}}, "rank 3 has torch 2.12, the others 2.13", True, True),
        ({"versions": {}}, "rank 3 has torch none", True, True),
        ({"devices": ()}, "rank 3 sees no device, the others 1 x H100", False, True),
        ({"devices": ("H100", "H100")}, "sees 2 x H100", False, False),
        ({"clock_s": 160.0}, "clock is +60 s", False, False),
        ({"free": {"/tmp": 1 << 20}}, "1 MiB free in /tmp", False, False),
        ({"memory": 1 << 20}, "1 MiB of memory", False, False),
        ({"address": "127.0.1.1"}, "address 127.0.1.1", False, False),
        ({"address": ""}, "address none", False, False),
        ({"compiler": False}, "no C++ compiler", False, False),
        ({"stale_locks": ("/x/lock",)}, "left /x/lock", False, False),
    ],
)
def test_one_that_is_not(
    change: dict[str, object], told: str, is_error: bool, is_bad_node: bool
) -> None:
    (finding,) = compare(_machines(change))
    assert told in finding.text
    assert finding.host == "a4"
    assert finding.remedy
    assert (finding.is_error, finding.is_bad_node) == (is_error, is_bad_node)


def test_a_slow_machine_is_an_outlier_and_of_two_nobody_knows() -> None:
    machines = [replace(facts, product_s=1.0) for facts in _machines()]
    machines[2] = replace(machines[2], product_s=2.0)
    (finding,) = compare(machines)
    assert "2.0 times the median" in finding.text
    assert finding.is_bad_node
    assert compare(machines[1:3]) == []


def test_of_two_versions_nobody_knows_whose_is_wrong() -> None:
    found = compare([WELL, replace(WELL, rank=1, host="a2", versions={"torch": "2.12"})])
    assert [(finding.is_error, finding.is_bad_node) for finding in found] == [(True, False)]


def test_ranks_of_one_machine_count_once() -> None:
    two = [replace(WELL, memory=1), replace(WELL, rank=1, memory=1)]
    assert len(compare(two)) == 1


def test_groups_that_cross_machines() -> None:
    hosts = ["a", "a", "a", "b", "b", "b"]
    assert crossing_groups(hosts, 2) == [(2, 3)]
    assert crossing_groups(hosts, 3) == []
    assert crossing_groups(["a", "b", "a", "b"], 2) == [(0, 1), (2, 3)]


def test_groups_that_cross_machines_are_refused_unless_allowed() -> None:
    hosts = ["a"] * 6 + ["b"] * 6
    assert not check_tensor_groups(hosts, 2, may_cross=False)
    warning = check_tensor_groups(hosts, 4, may_cross=True)
    assert warning.startswith("1 of 3 tensor-parallel groups of 4 cross machines (ranks 4 on a, ")
    with pytest.raises(UserError) as refusal:
        check_tensor_groups(hosts, 4, may_cross=False)
    for words in ("6 on b", "parallel.tensor_parallel_size=2, a multiple of 4", "_machines=true"):
        assert words in str(refusal.value)


def test_this_machine(tmp_path: Path) -> None:
    facts = gather_facts(3, tmp_path / "run" / "later")
    assert facts.rank == 3
    assert facts.versions["torch"]
    assert facts.free[str(tmp_path)] > 0
    assert facts.memory > 0


def test_stale_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert stale_locks() == []
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    written = lock.stat().st_mtime
    assert stale_locks(lambda: written + 1) == []  # a build that goes on
    assert stale_locks(lambda: written + preflight.STALE_LOCK_S + 1) == [lock]
    (tmp_path / "lock_of_a_folder_that_was_named").mkdir()
    (tmp_path / "lock_of_a_folder_that_was_named" / "lock").touch()
    assert len(stale_locks(lambda: written + 2 * preflight.STALE_LOCK_S)) == 2


def test_the_worst_machines_are_left_out_in_the_allocation_s_order() -> None:
    names = ["a1", "a2", "a3", "a4"]
    assert choose_nodes(names, [], {}, 3) == ["a1", "a2", "a3"]
    assert choose_nodes(names, ["a1"], {}, 3) == ["a2", "a3", "a4"]
    slow = {"a1": 1.0, "a2": 3.0, "a3": 1.1, "a4": 1.2}
    assert choose_nodes(names, [], slow, 3) == ["a1", "a3", "a4"]
    silent = {"a1": 1.0, "a2": 3.0, "a4": 1.2}
    assert choose_nodes(names, [], silent, 3) == ["a1", "a2", "a4"]
    assert choose_nodes(names, ["a1", "a2"], slow, 3) == ["a1", "a3", "a4"]


def test_bad_machines_are_remembered_once(tmp_path: Path) -> None:
    add_bad_nodes(tmp_path / "run", ["a2"])
    add_bad_nodes(tmp_path / "run", ["a2", "a3"])
    assert read_bad_nodes(tmp_path / "run") == ["a2", "a3"]
    assert read_bad_nodes(tmp_path) == []
    add_bad_nodes(tmp_path / "run", ["a3.cluster.lab"])  # Slurm knows it without its domain
    assert read_bad_nodes(tmp_path / "run") == ["a2", "a3"]


def test_slurm_is_not_asked_for_what_it_can_never_give(tmp_path: Path) -> None:
    """It would hold the job for ever."""
    add_bad_nodes(tmp_path, ["a2", "elsewhere"])
    partition = ["a1", "a2", "a3"]
    assert nodes_to_exclude(tmp_path, partition, 2, 2) == ["a2"]
    assert nodes_to_exclude(tmp_path, partition, 3, 2) == []  # the spare one is used instead
    with pytest.raises(UserError, match="3 machines without a2 are too few for a run on 3"):
        nodes_to_exclude(tmp_path, partition, 3, 3)


def test_the_choose_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four machines for two: one does not answer, one is slow. They know their domain."""
    folder = tmp_path / "attempts" / "0001"
    folder.mkdir(parents=True)
    write_json(folder / "begin.json", asdict(attempt.Begin("s", "7", 0, "a1,a2,a3,a4", -1, "", 0)))
    (folder / "machines").mkdir()
    for name, seconds in (("a1", 1.0), ("a2", 4.0), ("a4", 1.0), ("a5", 1.0)):
        facts = replace(WELL, host=f"{name}.lab", product_s=seconds)
        write_json(folder / "machines" / f"{name}.lab.json", asdict(facts))
    assert attempt.main(["choose", str(folder), "--nodes", "2"]) == 0
    out, error = capsys.readouterr()
    assert "use_nodes=a1,a4" in out
    assert "export MASTER_ADDR=a1" in out
    assert "a3: did not answer" in error
    assert read_bad_nodes(tmp_path) == ["a3", "a2"]


def test_the_exclude_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it prints is left out; where too few machines remain, the run ends and says why."""
    names = [{"name": name} for name in ("a1", "a2", "a3")]
    monkeypatch.setattr(attempt.Slurm, "nodes", lambda self, partition: names)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    command = ["exclude", str(tmp_path), "--nodes", "2"]
    assert attempt.main(command) == 0
    assert capsys.readouterr().out == ""
    add_bad_nodes(tmp_path, ["a2"])
    assert attempt.main(command) == 0
    assert capsys.readouterr().out == "a2\n"
    attempt.begin(tmp_path, attempt.Begin("s", "7", 0, "a1,a2", -1, "", 0), 5)
    add_bad_nodes(tmp_path, ["a3"])
    assert attempt.main(command) == KINDS["bad node"].code
    (last,) = attempt.attempts(tmp_path)
    assert last.end is not None
    assert last.end.text.startswith("3 machines without a2, a3 are too few")
