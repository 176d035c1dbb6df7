"""Where the ranks of a Slurm step meet: the head node, and ports that all of them agree on.

Readable before torch is imported. Nothing is guessed: an address that other machines cannot reach
is an error here, not a hang in the rendezvous.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megascale.errors import PeerError, UserError
from megascale.launcher.environment import ProcessInfo

PORT_WINDOWS = (range(20_000, 30_000), range(61_000, 65_000))
"""Ports to meet at: outside of what Linux gives to connections by default (32768 to 60999), and of
Slurm's own (6817 to 6819)."""
NUM_CANDIDATES = 24
MEET_S = 180.0
"""Longest wait for the other ranks: importing torch may take half a minute on a busy machine."""
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_RESOLVE_TIMEOUT_S = 10
_ANSWER_S = 3.0
"""Longest wait for the answer of one port."""

Resolve = Callable[[str], list[str]]


@dataclass(frozen=True)
class MeetingPoint:
    """Where rank 0 listens.

    Attributes:
        address: host name of the head node.
        ports: in the order in which rank 0 tries them and the others look for it.
        identity: what rank 0 answers with, so that nobody joins another run.
    """

    address: str
    ports: tuple[int, ...]
    identity: str


def meeting_point(
    info: ProcessInfo,
    environment: Mapping[str, str] | None = None,
    resolve: Resolve | None = None,
) -> MeetingPoint:
    """The meeting point of a Slurm step; the same on all its tasks.

    MASTER_ADDR and MASTER_PORT are taken where they are set. Otherwise the address is the step's
    first node, where rank 0 runs, and the ports follow from job, restart and step.

    Raises:
        UserError: the head node is not known, cannot be resolved, or is a loopback address while
            the step has several nodes.
    """
    env = os.environ if environment is None else environment
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    address = env.get("MASTER_ADDR") or head_node(nodes)
    if (info.num_nodes or 1) > 1:
        check_names(address, env, resolve)
    names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
    identity = ".".join(env.get(name, "0") for name in names)
    port = env.get("MASTER_PORT", "")
    if port and not port.isdecimal():
        raise UserError(
            f"MASTER_PORT={port!r}",
            rule="a port is a whole number from 1 to 65535",
            remedy="unset MASTER_PORT: ports are derived from the job",
        )
    ports = (int(port),) if port else candidate_ports(identity)
    return MeetingPoint(address, ports, f"megascale {identity}")


def head_node(nodes: str) -> str:
    """The first host of a Slurm node list such as "gpu[003-004,017]", see `host_names`."""
    return host_names(nodes)[0]


def host_names(nodes: str) -> list[str]:
    """The hosts of a Slurm node list.

    Raises:
        UserError: the list is empty, or scontrol cannot be asked.
    """
    if nodes and "[" not in nodes:
        return nodes.split(",")
    problem = "neither MASTER_ADDR nor a node list is set"
    if nodes and shutil.which("scontrol") is None:
        problem = f"the hosts of {nodes} are not known: no scontrol here (in a container?)"
    elif nodes:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes],
            capture_output=True,
            text=True,
            check=False,
            timeout=_RESOLVE_TIMEOUT_S,
        )
        if not done.returncode and done.stdout.split():
            return done.stdout.split()
        problem = f"scontrol show hostnames {nodes}: {done.stderr.strip() or 'no answer'}"
    raise UserError(
        problem,
        rule="several tasks need the address of the first one",
        remedy="export MASTER_ADDR in the batch script: $(scontrol show hostnames | head -n 1)",
    )


def check_names(
    head: str, environment: Mapping[str, str] | None = None, resolve: Resolve | None = None
) -> None:
    """Refuse a head node, or a name of this machine, that other machines cannot use.

    Rank 0 listens on every interface, so what the head calls itself counts only for gloo, which
    binds to the address of the machine's own name, or to GLOO_SOCKET_IFNAME.

    Raises:
        UserError: it has no address, or a loopback one.
    """
    own = socket.gethostname()
    if head.split(".")[0] != own.split(".")[0]:
        check_address(head, "the head node", resolve)
    if "GLOO_SOCKET_IFNAME" not in (os.environ if environment is None else environment):
        check_address(own, "this machine's own name", resolve)


def check_address(name: str, what: str, resolve: Resolve | None = None) -> None:
    """Refuse a name that other machines cannot use.

    Raises:
        UserError: it has no address, or a loopback one.
    """
    try:
        found = (resolve or _addresses)(name)
    except OSError as error:
        raise UserError(
            f"{what}, {name}, has no address here ({socket.gethostname()}): {error}",
            rule="every machine of a run resolves the names of the others and its own",
            remedy="repair DNS or /etc/hosts on this machine, or exclude it (sbatch --exclude); "
            "MASTER_ADDR may be an IP address",
        ) from error
    if any(_is_loopback(address) for address in found):
        raise UserError(
            f"{what}, {name}, is {', '.join(found)} on {socket.gethostname()}",
            rule="with several machines no rank may listen on a loopback address",
            remedy=f"give {name} its network address in /etc/hosts, where Debian has 127.0.1.1, "
            "or export GLOO_SOCKET_IFNAME, the interface to the other machines (ip addr)",
        )


def candidate_ports(identity: str) -> tuple[int, ...]:
    """Ports in the order of trying, the same wherever they are computed.

    They do not depend on the machine: rank 0 alone looks at what is free (`listen`).
    """
    digest = hashlib.shake_128(identity.encode()).digest(8 * NUM_CANDIDATES)
    numbers = [int.from_bytes(digest[8 * i : 8 * i + 8], "big") for i in range(NUM_CANDIDATES)]
    windows = [PORT_WINDOWS[0] if i % 3 else PORT_WINDOWS[1] for i in range(1, NUM_CANDIDATES + 1)]
    windows[0] = PORT_WINDOWS[0]
    return tuple(window[n % len(window)] for window, n in zip(windows, numbers, strict=True))


def listen(ports: Sequence[int]) -> socket.socket:
    """A listening socket on the first port that is free and not one of a connection's.

    Raises:
        UserError: none of them can be bound.
    """
    low, high = ephemeral_range()
    fixed = [port for port in ports if not low <= port <= high]
    for port in fixed or ports:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        # a port of an earlier attempt that is in TIME_WAIT is free; one that is listened on is not
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
            listener.listen(1024)
        except OSError:
            listener.close()
            continue
        return listener
    raise UserError(
        f"none of the ports {', '.join(map(str, fixed or ports))} is free on "
        f"{socket.gethostname()}",
        rule="rank 0 must be able to listen on a port",
        remedy="set MASTER_PORT to a free one, or exclude this machine",
    )


def announce(listener: socket.socket, point: MeetingPoint, port: int, others: int) -> None:
    """Rank 0: tell the other ranks the port of the store, in a thread, until all have asked.

    The store itself does not serve at the meeting point: who connects to another program there in
    the belief that it is a store waits for ever.
    """

    def serve() -> None:
        deadline, answered = time.monotonic() + MEET_S, 0
        with listener:
            while answered < others and time.monotonic() < deadline:
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connection, _ = listener.accept()
                    with connection:
                        connection.settimeout(_ANSWER_S)
                        answered += _line(connection) == point.identity
                        connection.sendall(f"{point.identity} {port}\n".encode())
                except OSError:
                    continue

    threading.Thread(target=serve, name="meeting point", daemon=True).start()


def find(point: MeetingPoint, wait_s: float) -> int:
    """Another rank: the port of rank 0's store.

    Raises:
        PeerError: rank 0 was not found within `wait_s` seconds: its machine may be lost.
    """
    deadline = time.monotonic() + wait_s
    reason = "nobody listens there"
    while True:
        for port in point.ports:
            try:
                return _ask(point, port)
            except ConnectionRefusedError:
                continue
            except (OSError, ValueError) as error:
                reason = f"port {port}: {error}"
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    raise PeerError(
        f"{socket.gethostname()} did not find rank 0 at {point.address} within {wait_s:.0f} s: "
        f"{reason}",
        rule=f"rank 0 listens on one of {', '.join(map(str, point.ports))}",
        remedy="check that all tasks were started, and that no firewall stands between the "
        "machines",
    )


def _ask(point: MeetingPoint, port: int) -> int:
    with socket.create_connection((point.address, port), timeout=_ANSWER_S) as connection:
        connection.settimeout(_ANSWER_S)
        connection.sendall(f"{point.identity}\n".encode())
        identity, _, number = _line(connection).rpartition(" ")
    if identity != point.identity:
        raise ValueError(f"it is {identity[:80]!r}, not this run's")
    return int(number)


def _line(connection: socket.socket) -> str:
    """What is sent up to the end of a line, at most 1,000 bytes."""
    received = b""
    while not received.endswith(b"\n") and len(received) < 1000:
        more = connection.recv(1000)
        if not more:
            break
        received += more
    return received.decode(errors="replace").rstrip("\n")


def ephemeral_range() -> tuple[int, int]:
    """First and last port that Linux gives to outgoing connections; (1, 0) where it is unknown."""
    try:
        low, high = _EPHEMERAL.read_text().split()
    except (OSError, ValueError):
        return 1, 0
    return int(low), int(high)


def _addresses(name: str) -> list[str]:
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return sorted({str(address[0]) for *_, address in found})


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")
