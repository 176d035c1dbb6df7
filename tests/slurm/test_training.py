"""Trainings over several machines, and what signals and faults do to them."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from megascale.launcher.attempt import read_json
from tests.integration.runs import call, metrics
from tests.slurm.conftest import TestBed

Numbers = list[tuple[float, ...]]
TwoMachines = tuple[TestBed, str, str]
"""A cluster, the job whose time ends, and the one of which a rank hangs."""

SLURM_SAVES_WITHIN_S = 6.0
"""slurmctld writes what has changed to its state files within 5 s (its SAVE_MAX_WAIT)."""


def _start_step(folder: Path) -> int:
    started = read_json(folder / "started.json")
    assert started is not None
    return int(started["step"])


def _saved_step(folder: Path) -> int:
    outcome = read_json(folder / "outcome.json")
    assert outcome is not None
    return int(outcome["step"])


def test_matrices_over_machines_are_the_same_training(bed: TestBed, undisturbed: Numbers) -> None:
    """Two ranks on two nodes, tp=2, against one process here."""
    alone = bed.config("alone", parallel__tensor_parallel_size=1)
    done = call("train", alone)
    assert done.code == 0, done.output
    for here, there in zip(bed.numbers("alone"), undisturbed, strict=True):
        assert there == pytest.approx(here, rel=1e-5)


def test_a_pipeline_over_machines_whose_ranks_share_matrices(
    bed: TestBed, undisturbed: Numbers, record_property: Callable[[str, object], None]
) -> None:
    """pp=2 over 2 nodes, tp=2 inside; the start-up is recorded."""
    config = bed.config("pipeline", parallel__pipeline_parallel_size=2)
    (job,) = bed.submit(config, "--nodes", 2, "--ntasks-per-node", 2)
    bed.finish("pipeline", job)
    for there, here in zip(bed.numbers("pipeline"), undisturbed, strict=True):
        assert there == pytest.approx(here, rel=1e-5)
    assert bed.kinds("pipeline") == ["finished"]
    (attempt,) = bed.attempts("pipeline")
    started = read_json(attempt.folder / "started.json")
    assert started is not None
    # recorded, not asserted: it depends on what else the machine does
    record_property("start_of_4_ranks_s", started["time_s"] - attempt.begin.time_s)


def test_torchrun_gives_the_same_curve(bed: TestBed, undisturbed: Numbers) -> None:
    """Also where the head's own name is a loopback address, as on a fresh Debian."""
    options = ("--nodes", 2, "--launcher", "torchrun")
    with bed.debian_hosts("node1"):
        jobs = bed.submit(bed.config("torchrun"), *options, GLOO_SOCKET_IFNAME="eth0")
        bed.finish("torchrun", *jobs)
    assert bed.numbers("torchrun") == undisturbed


def test_preemption(bed: TestBed, undisturbed: Numbers) -> None:
    """A job of a higher partition takes the nodes; the run saves in its grace and comes back.

    Then an administrator requeues it, which is no cancellation.
    """
    options = ("--nodes", 2, "--partition", "spare", "--time", 30)
    gates = {3: "SIGTERM", 6: "SIGTERM"}
    (job,) = bed.submit(bed.config("preempted"), *options, gates=gates)
    bed.at_step("preempted", 3)
    wrap = ("--wrap", "sleep 1", "-o", "/dev/null")
    bed.cluster.run("sbatch", "-p", "main", "-N", "4", "--exclusive", *wrap)
    bed.at_step("preempted", 6)
    bed.cluster.run("scontrol", "requeue", job)
    bed.finish("preempted", job)
    # a busy machine may not write the second end within KillWait
    assert bed.kinds("preempted") in (
        [*["preempted"] * 2, "finished"],
        ["preempted", "", "finished"],
    )
    first, second, _ = bed.attempts("preempted")
    assert _start_step(second.folder) == _saved_step(first.folder) == 4  # nothing was done twice
    assert bed.numbers("preempted") == undisturbed


def test_lost_machines(
    bed: TestBed,
    two_machines: TwoMachines,
    undisturbed: Numbers,
    record_property: Callable[[str, object], None],
) -> None:
    """A cut cable on one cluster and a lost power on the other, at once: Slurm waits long."""
    with ThreadPoolExecutor() as pool:
        faults = [
            pool.submit(_a_cut_cable, bed, undisturbed, record_property),
            pool.submit(_a_lost_power, *two_machines, undisturbed, record_property),
        ]
    for fault in faults:
        fault.result()


def _a_cut_cable(
    bed: TestBed, undisturbed: Numbers, record_property: Callable[[str, object], None]
) -> None:
    """The controller is restarted under a run, then the head machine's network ends.

    The run goes on elsewhere, though rank 0 and the batch script live on and hold the folder. What
    is lost is what came after the newest checkpoint, one interval at most.
    """
    cluster = bed.cluster
    gates = {2: bed.folder / "restarted", 5: bed.folder / "cut"}
    (job,) = bed.submit(bed.config("cable"), "--nodes", 2, "--time", 30, gates=gates)
    bed.at_step("cable", 2)
    time.sleep(SLURM_SAVES_WITHIN_S)  # a killed controller forgets what it had not saved
    cluster.stop_controller()
    cluster.start_controller()
    gates[2].touch()
    bed.at_step("cable", 5)
    cluster.unplug("node1")
    gone = cluster.lost(job, record_property)
    gates[5].touch()
    bed.finish("cable", job)
    assert "is taken over from node1" in bed.log("cable")
    before, after = bed.machines("cable")
    assert "node1" in before
    assert "node1" not in after
    _check_continued(bed, "cable", gone, record_property)
    assert bed.numbers("cable") == undisturbed


def _a_lost_power(
    bed: TestBed,
    limit: str,
    ends: str,
    undisturbed: Numbers,
    record_property: Callable[[str, object], None],
) -> None:
    """Of one of two machines. None is left to go on with: the job waits until it is back."""
    for other in (limit, ends):  # they may be on that machine still
        bed.cluster.wait(other)
    gates = {5: bed.folder / "off"}
    (job,) = bed.submit(bed.config("power"), "--nodes", 2, gates=gates)
    bed.at_step("power", 5)
    bed.cluster.power_off("node2")
    gone = bed.cluster.lost(job, record_property)
    gates[5].touch()
    bed.cluster.wait_for(job, lambda seen: seen.get("JobState") == "PENDING")
    bed.cluster.power_on("node2")
    bed.finish("power", job)
    _check_continued(bed, "power", gone, record_property)
    assert bed.numbers("power") == undisturbed


def _check_continued(
    bed: TestBed, name: str, gone: float, record_property: Callable[[str, object], None]
) -> None:
    """The second attempt went on from the newest checkpoint; how long that took is recorded."""
    first, second = bed.attempts(name)
    assert first.end is None or first.end.kind == "node failure"
    assert second.end is not None
    assert second.end.kind == "finished"
    assert _start_step(second.folder) == 4
    started = read_json(second.folder / "started.json")
    assert started is not None
    # recorded, not asserted: it depends on what else the machine does
    record_property(f"{name}_training_again_s", started["time_s"] - gone)


def test_a_chain(bed: TestBed) -> None:
    """The second job goes on where the first one's time ended, the third finds nothing to do."""
    changes = {"parallel__tensor_parallel_size": 1, "checkpoint__save_interval": 0}
    config = bed.config("chain", **changes)
    gates = {2: bed.output("chain") / "STOP"}
    jobs = bed.submit(config, "--nodes", 1, "--chain", 3, gates=gates)
    assert len(jobs) == 3
    bed.at_step("chain", 2)
    bed.cluster.run("scancel", "--signal=USR1", "--batch", jobs[0])
    bed.finish("chain", *jobs)
    assert [bed.cluster.job(job)["Restarts"] for job in jobs] == ["0"] * 3
    assert bed.kinds("chain") == ["time limit", "finished"]
    assert [line["step"] for line in metrics(bed.output("chain"))] == list(range(1, 13))


def test_no_progress(bed: TestBed) -> None:
    """A rank that is killed at every start: after two attempts the run is given up."""
    options = ("--nodes", 2, "--attempts", 2)
    (job,) = bed.submit(bed.config("stuck"), *options, TEST_KILL="1")
    state = bed.cluster.wait(job)
    assert state["JobState"] == "FAILED"
    assert state["ExitCode"] == "70:0", bed.log("stuck")
    assert bed.kinds("stuck") == ["killed", "killed", "no progress"]
    told = bed.megascale("jobs", "why", "stuck")
    assert "2 attempts began at step -1 and left no newer checkpoint" in told
    assert "Killed" in told


def test_a_failing_rank_is_named_and_the_job_is_not_requeued(bed: TestBed) -> None:
    (job,) = bed.submit(bed.config("failing"), "--nodes", 2, TEST_RAISE="1")
    state = bed.cluster.wait(job)
    assert state["JobState"] == "FAILED"
    assert state["Restarts"] == "0"
    assert bed.kinds("failing") == ["error"], bed.log("failing")
    told = bed.megascale("jobs", "why", "failing")
    assert "rank 1 on node2 failed: ValueError: planted in this rank" in told
    assert "in train_step" in told  # the traceback, though rank 1 ran on another machine


def test_a_rank_that_hangs_and_one_that_runs_out_of_memory(two_machines: TwoMachines) -> None:
    """The first is worth another attempt, the second is not."""
    bed, _, job = two_machines
    state = bed.cluster.wait(job)
    assert bed.kinds("ends") == ["hang", "out of memory"], bed.log("ends")
    assert state["ExitCode"] == "71:0"
    hang, memory = bed.attempts("ends")
    assert hang.end is not None
    assert "rank 0 on node1 lost another rank" in hang.end.text
    assert memory.end is not None
    told = bed.megascale("jobs", "why", "ends")
    assert "rank 1 on node2 failed" in told
    assert "can't allocate memory" in told
    assert "train.micro_batch_size" in told  # what helps


def test_a_dataset_that_one_node_lacks(bed: TestBed) -> None:
    bed.cluster.run("mount", "-t", "tmpfs", "tmpfs", bed.prefix.parent, node="node2")
    try:
        (job,) = bed.submit(bed.config("lacking"), "--nodes", 2)
        assert bed.cluster.wait(job)["JobState"] == "FAILED"
    finally:
        bed.cluster.run("umount", bed.prefix.parent, node="node2")
    assert bed.kinds("lacking") == ["config error"], bed.log("lacking")
    told = bed.megascale("jobs", "why", "lacking")
    assert "rank 1 on node2" in told
    assert str(bed.prefix) in told


def test_status_logs_and_stop_by_name(bed: TestBed, undisturbed: Numbers) -> None:
    """Of a run with a strange name, which is suspended for a moment."""
    name = "it's 50 % done"
    gates = {2: bed.folder / "resumed"}
    (job,) = bed.submit(bed.config(name), "--nodes", 2, gates=gates)
    bed.at_step(name, 2)
    bed.cluster.run("scontrol", "suspend", job)
    again = ["submit", bed.config(name), "--nodes", 2]
    words = (["status"], ["logs", "--rank", "0"], ["why"], ["stop"])
    looks = [["jobs", *each, name] for each in words]
    (code, refused), (_, status), (_, log), (_, why), (_, stop) = bed.many([again, *looks])
    assert code == 2
    assert "already suspended" in refused
    assert "suspended" in status
    assert "from step 0" in status
    assert "step      2/12" in log
    assert "failure" not in why
    assert "saves and ends after its next step" in stop
    bed.cluster.run("scontrol", "resume", job)
    gates[2].touch()
    looks = [["jobs", *each, name] for each in (["logs", "-f"], ["why"])]  # until it is over
    (_, followed), (_, why) = bed.many(looks)
    assert "user stop" in followed
    assert bed.kinds(name) == ["user stop"]
    assert bed.numbers(name) == undisturbed[:3]
    assert "asked it to stop" in why


def test_the_end_of_the_time(two_machines: TwoMachines, undisturbed: Numbers) -> None:
    """Slurm's own limit: saved, requeued, continued where it was, until it is done."""
    bed, job, _ = two_machines
    state = bed.finish("limit", job)
    *before, last = bed.kinds("limit")
    assert last == "finished"
    assert before
    assert set(before) == {"time limit"}
    assert state["Restarts"] == str(len(before))
    tries = bed.attempts("limit")
    for first, second in pairwise(tries):
        assert _start_step(second.folder) == _saved_step(first.folder)  # nothing was done twice
    assert bed.numbers("limit") == undisturbed
    assert "finished" in bed.megascale("jobs", "why", "limit")
