"""Who and where a task of a Slurm step is, and how such tasks meet; without a cluster."""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from megascale.errors import PeerError, UserError
from megascale.launcher import meeting
from megascale.launcher.environment import ProcessInfo, process_info, tasks_of_nodes
from megascale.launcher.meeting import (
    PORT_WINDOWS,
    MeetingPoint,
    candidate_ports,
    check_address,
    check_names,
    head_node,
    listen,
    meeting_point,
)
from megascale.launcher.rendezvous import choose_device, store_of_step

TIMEOUT = timedelta(seconds=5)
TASK = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "a1,a2",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
}


def test_a_task_is_a_rank() -> None:
    assert process_info(TASK) == ProcessInfo(3, 4, 1, True, 2, False, 2)


def test_another_launcher_inside_a_task_decides() -> None:
    inside = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert process_info({**TASK, **inside}).world_size == 2


def test_a_batch_script_and_a_single_task_are_alone() -> None:
    batch = {k: v for k, v in TASK.items() if not k.startswith("SLURM_STEP")}
    assert not process_info(batch).launched
    assert not process_info({**TASK, "SLURM_STEP_NUM_TASKS": "1"}).launched


@pytest.mark.parametrize("name", ["SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE"])
def test_half_an_environment_is_refused(name: str) -> None:
    env = {k: v for k, v in TASK.items() if k != name}
    with pytest.raises(UserError, match=name):
        process_info(env)


def test_torchrun_in_every_task_is_refused() -> None:
    agent = {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}
    with pytest.raises(UserError, match="4 tasks on 2 machines") as caught:
        process_info({**TASK, **agent})
    assert "--ntasks-per-node=1" in caught.value.remedy
    one_each = {**TASK, **agent, "SLURM_STEP_NUM_TASKS": "2"}
    assert process_info(one_each).world_size == 8


@pytest.mark.parametrize(
    ("text", "counts"), [("2(x2)", [2, 2]), ("3,1", [3, 1]), ("2(x3),1", [2, 2, 2, 1]), ("4", [4])]
)
def test_tasks_of_nodes(text: str, counts: list[int]) -> None:
    assert tasks_of_nodes(text) == counts


def test_a_task_that_sees_its_own_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = process_info({**TASK, "SLURM_GPUS_PER_TASK": "1"})
    assert bound.own_gpu
    assert not process_info({**TASK, "SLURM_GPU_BIND": "none"}).own_gpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert choose_device("auto", bound) == torch.device("cuda", 0)
    with pytest.raises(UserError, match="shows 1 and runs 2 processes") as caught:
        choose_device("auto", process_info(TASK))
    assert "--ntasks-per-node" in caught.value.remedy


# Where they meet --------------------------------------------------------------------------------


def _resolve(address: str) -> meeting.Resolve:
    return lambda name: [address]


def test_all_tasks_agree_on_the_meeting_point() -> None:
    points = {
        meeting_point(process_info(env), env, _resolve("10.0.0.7"))
        for env in (TASK, {**TASK, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
    }
    (point,) = points
    assert point.address == "a1"
    again = {**TASK, "SLURM_RESTART_COUNT": "1"}
    assert meeting_point(process_info(again), again, _resolve("10.0.0.7")).ports != point.ports


def test_what_the_user_sets_is_taken() -> None:
    env = {**TASK, "MASTER_ADDR": "a2", "MASTER_PORT": "1234"}
    point = meeting_point(process_info(env), env, _resolve("10.0.0.7"))
    assert (point.address, point.ports) == ("a2", (1234,))
    bad = {**env, "MASTER_PORT": "x"}
    with pytest.raises(UserError, match="MASTER_PORT='x'"):
        meeting_point(process_info(bad), bad, _resolve("10.0.0.7"))


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.1.1", "::1"])
def test_loopback_is_refused_for_several_machines(address: str) -> None:
    with pytest.raises(UserError, match=address):
        meeting_point(process_info(TASK), TASK, _resolve(address))
    alone = {**TASK, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "4,4"}
    meeting_point(process_info(alone), alone, _resolve(address))


def test_the_name_of_debian_s_head_node_is_loopback_on_itself_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its ranks need the interface then; the others know the head by its address."""
    addresses = {"a1": "127.0.1.1", "a2": "10.0.0.8"}

    def resolve(name: str) -> list[str]:
        return [addresses[name.split(".")[0]]]

    monkeypatch.setattr(meeting.socket, "gethostname", lambda: "a1.lab")
    with pytest.raises(UserError, match=r"own name, a1\.lab, is 127\.0\.1\.1") as caught:
        check_names("a1", {}, resolve)
    assert "GLOO_SOCKET_IFNAME" in caught.value.remedy
    check_names("a1", {"GLOO_SOCKET_IFNAME": "eth0"}, resolve)
    monkeypatch.setattr(meeting.socket, "gethostname", lambda: "a2")
    with pytest.raises(UserError, match=r"the head node, a1, is 127\.0\.1\.1"):
        check_names("a1", {"GLOO_SOCKET_IFNAME": "eth0"}, resolve)


def test_a_name_without_an_address_is_refused() -> None:
    def fail(name: str) -> list[str]:
        raise socket.gaierror(-2, "Name or service not known")

    with pytest.raises(UserError, match="a1, has no address") as caught:
        check_address("a1", "the head node", fail)
    assert "hosts" in caught.value.remedy


def test_without_nodes_or_scontrol_nothing_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting.shutil, "which", lambda name: None)
    assert head_node("a7,a9") == "a7"
    for nodes in ("", "a[1-2]"):
        with pytest.raises(UserError) as caught:
            head_node(nodes)
        assert "MASTER_ADDR" in caught.value.remedy


def test_ports_lie_in_their_windows_and_differ_between_jobs() -> None:
    seen = [candidate_ports(f"{job}.{restart}.0") for job in range(40) for restart in range(3)]
    assert all(any(port in window for window in PORT_WINDOWS) for ports in seen for port in ports)
    assert len({ports[0] for ports in seen}) > 110
    assert candidate_ports("1.0.0") == candidate_ports("1.0.0")


def test_a_taken_port_and_a_connection_s_port_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges = tmp_path / "range"
    ranges.write_text("20000\t29000\n")
    monkeypatch.setattr(meeting, "_EPHEMERAL", ranges)
    free = _free_ports(2)
    with socket.socket() as other:
        other.bind(("", free[0]))
        other.listen()
        with listen([20500, free[0], free[1]]) as listener:
            assert listener.getsockname()[1] == free[1]
        with pytest.raises(UserError, match=str(free[0])):
            listen([free[0]])


def test_ranks_meet_behind_a_silent_service_and_another_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first port belongs to a program that says nothing, the second to another run."""
    monkeypatch.setattr(meeting, "_ANSWER_S", 0.2)
    silent, others, ours = _free_ports(3)
    with socket.create_server(("127.0.0.1", silent)):
        other = MeetingPoint("127.0.0.1", (others,), "another run")
        others_store = store_of_step(ProcessInfo(0, 2, 0, True), other, TIMEOUT)
        store = store_of_step(ProcessInfo(0, 3, 0, True), _point(ours), TIMEOUT)
        store.set("word", "given")
        point = _point(silent, others, ours)
        for rank in (1, 2):
            found = store_of_step(ProcessInfo(rank, 3, rank, True), point, TIMEOUT, wait_s=30)
            assert found.get("word") == b"given"
        # nobody of its own has come to the other run, which still answers; ours is complete
        assert meeting.find(other, 1) == others_store.port
        _wait_until_closed(ours)


def test_a_rank_that_does_not_find_rank_0_says_where_it_looked() -> None:
    (port,) = _free_ports(1)
    # its machine may be lost, which is no mistake of the user
    with pytest.raises(PeerError, match="did not find rank 0 at") as caught:
        store_of_step(ProcessInfo(1, 2, 1, True), _point(port), TIMEOUT, wait_s=0.2)
    assert str(port) in caught.value.rule


def _point(*ports: int) -> MeetingPoint:
    return MeetingPoint("127.0.0.1", ports, "this run")


def _wait_until_closed(port: int) -> None:
    """The meeting point of a complete run does not stay open."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.05)
    raise AssertionError(f"port {port} is still open")


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for opened in sockets:
        opened.bind(("", 0))
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports
