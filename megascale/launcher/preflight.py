"""What the machines of a run look like, compared before they work together; without torch.

`gather_facts` looks at one machine in milliseconds. `compare` finds what is wrong with one of
them, or between them: findings that make a training wrong or impossible are errors, the rest warns.
"""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import psutil

from megascale.errors import UserError

PACKAGES = ("megascale", "torch", "deepspeed", "numpy", "triton", "transformers")
LOW_DISK = 2 << 30
LOW_MEMORY = 1 << 30
LOW_SHARED_MEMORY = 64 << 20
MAX_SKEW_S = 5.0
STALE_LOCK_S = 600.0
SLOW = 1.5
"""A machine whose product takes so many times the median is an outlier."""


@dataclass(frozen=True)
class Facts:
    """One machine, seen by one rank.

    Attributes:
        versions: of Python and of the packages that must agree.
        devices: names of the accelerators that the process sees.
        free: bytes free in the run's folder, the temporary folder and /dev/shm.
        memory: available host memory, bytes.
        clock_s: seconds since the epoch, read at the same moment on all ranks.
        address: of the machine's own name, or the interface that is set in its place; "" if it
            has none.
        compiler: whether a C++ compiler and ninja are there, with which DeepSpeed builds.
        allocator: the host's memory allocator.
        stale_locks: locks in the folder of built extensions that nobody holds any more.
        product_s: seconds of one matrix product; 0: not measured.
    """

    rank: int
    host: str
    versions: Mapping[str, str]
    devices: Sequence[str] = ()
    free: Mapping[str, int] = field(default_factory=dict)
    memory: int = 0
    clock_s: float = 0.0
    address: str = ""
    compiler: bool = True
    allocator: str = "malloc"
    stale_locks: Sequence[str] = ()
    product_s: float = 0.0


@dataclass(frozen=True)
class Finding:
    """Something wrong, and what to do about it.

    Attributes:
        host: the machine; "" where none is to blame.
        is_error: whether the run may not start.
        is_bad_node: whether the machine is to be left out.
    """

    host: str
    text: str
    remedy: str
    is_error: bool = False
    is_bad_node: bool = False

    def __str__(self) -> str:
        where = f"{self.host}: " if self.host else ""
        return f"{where}{self.text} ({self.remedy})"


def gather_facts(
    rank: int, output: Path, devices: Sequence[str] = (), needs_compiler: bool = True
) -> Facts:
    """Look at this machine.

    Args:
        output: the run's folder; where it is not made yet, one above it.
        needs_compiler: whether it matters that there is one.
    """
    folder = next((path for path in (output, *output.parents) if path.exists()), Path("/"))
    places = {str(folder): folder, "/tmp": Path("/tmp"), "/dev/shm": Path("/dev/shm")}
    return Facts(
        rank=rank,
        host=socket.gethostname(),
        versions=_versions(),
        devices=tuple(devices),
        free={name: shutil.disk_usage(path).free for name, path in places.items() if path.exists()},
        memory=psutil.virtual_memory().available,
        clock_s=time.time(),
        address=_own_address(),
        compiler=not needs_compiler or _can_compile(),
        allocator=_allocator(),
        stale_locks=tuple(map(str, stale_locks())),
    )


def stale_locks(now: Callable[[], float] = time.time) -> list[Path]:
    """Lock files of torch's extension builder, older than a build takes: builds wait on them."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(named) if named else Path.home() / ".cache" / "torch_extensions"
    found = []
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")] if root.is_dir() else []
    for lock in locks:
        try:
            if now() - lock.stat().st_mtime > STALE_LOCK_S:
                found.append(lock)
        except OSError:  # it was a build that has just ended
            continue
    return found


def compare(all_facts: Sequence[Facts]) -> list[Finding]:
    """Everything wrong with the machines, errors first."""
    by_host = list({facts.host: facts for facts in reversed(all_facts)}.values())[::-1]
    findings = [
        *_unequal_versions(all_facts),
        *_unequal_devices(all_facts),
        *_clock_skew(by_host),
        *_slow_machines(by_host),
    ]
    for facts in by_host:
        findings += _alone(facts, several=len(by_host) > 1)
    return sorted(findings, key=lambda finding: not finding.is_error)


def _unequal_versions(all_facts: Sequence[Facts]) -> Iterable[Finding]:
    for name in sorted({name for facts in all_facts for name in facts.versions}):
        counts = Counter(facts.versions.get(name, "none") for facts in all_facts)
        usual, count = counts.most_common(1)[0]
        for facts in all_facts:
            found = facts.versions.get(name, "none")
            if found != usual:
                yield Finding(
                    facts.host,
                    f"rank {facts.rank} has {name} {found}, the others {usual}",
                    "install the same versions everywhere, or start the same Python",
                    is_error=True,
                    is_bad_node=2 * count > len(all_facts),  # else nobody knows whose is wrong
                )


def _unequal_devices(all_facts: Sequence[Facts]) -> Iterable[Finding]:
    usual, _ = Counter(tuple(facts.devices) for facts in all_facts).most_common(1)[0]
    for facts in all_facts:
        if tuple(facts.devices) != usual:
            yield Finding(
                facts.host,
                f"rank {facts.rank} sees {_listed(facts.devices)}, the others {_listed(usual)}",
                "the slowest device sets the pace of all",
                is_bad_node=len(facts.devices) < len(usual),
            )


def _listed(devices: Sequence[str]) -> str:
    counts = Counter(devices)
    return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "no device"


def _clock_skew(by_host: Sequence[Facts]) -> Iterable[Finding]:
    middle = statistics.median(facts.clock_s for facts in by_host)
    for facts in by_host:
        if abs(facts.clock_s - middle) > MAX_SKEW_S:
            yield Finding(
                facts.host,
                f"its clock is {facts.clock_s - middle:+.0f} s from the others'",
                "logs and notes of failures are ordered by time: let NTP run there",
            )


def _slow_machines(by_host: Sequence[Facts]) -> Iterable[Finding]:
    times = [facts.product_s for facts in by_host if facts.product_s]
    if len(times) < 3:  # of two, nobody knows which is the slow one
        return
    middle = statistics.median(times)
    for facts in by_host:
        if facts.product_s > SLOW * middle:
            yield Finding(
                facts.host,
                f"a matrix product takes {facts.product_s / middle:.1f} times the median",
                "it slows every step of all ranks: leave it out",
                is_bad_node=True,
            )


def _alone(facts: Facts, several: bool) -> Iterable[Finding]:
    """What is wrong with one machine by itself."""
    host = facts.host
    for place, free in facts.free.items():
        least = LOW_SHARED_MEMORY if place == "/dev/shm" else LOW_DISK
        if free < least:
            yield Finding(host, f"{free >> 20} MiB free in {place}", "free some space")
    if facts.memory and facts.memory < LOW_MEMORY:
        yield Finding(host, f"{facts.memory >> 20} MiB of memory available", "who uses the rest?")
    if several and (not facts.address or facts.address.startswith("127.")):
        yield Finding(
            host,
            f"its own name has the address {facts.address or 'none'}",
            "give it the network's in /etc/hosts, or set GLOO_SOCKET_IFNAME",
        )
    if not facts.compiler:
        yield Finding(
            host, "no C++ compiler or no ninja", "DeepSpeed's offloading builds with them"
        )
    for lock in facts.stale_locks:
        yield Finding(host, f"a build was killed and left {lock}", "remove it: builds wait on it")


def crossing_groups(hosts: Sequence[str], size: int) -> list[tuple[int, ...]]:
    """Tensor-parallel groups whose ranks are not on one machine.

    Args:
        hosts: machine of each rank.
        size: ranks of a group; groups are consecutive ranks.
    """
    groups = [tuple(range(first, first + size)) for first in range(0, len(hosts), size)]
    return [group for group in groups if len({hosts[rank] for rank in group}) > 1]


def check_tensor_groups(hosts: Sequence[str], size: int, *, may_cross: bool) -> str:
    """A warning when tensor-parallel groups cross machines; "" when none does.

    Args:
        hosts: machine of each rank.
        size: ranks of a group.
        may_cross: whether the config allows it.

    Raises:
        UserError: groups cross machines and may not.
    """
    crossing = crossing_groups(hosts, size)
    if not crossing:
        return ""
    first = ", ".join(f"{rank} on {hosts[rank]}" for rank in crossing[0])
    text = (
        f"{len(crossing)} of {len(hosts) // size} tensor-parallel groups of {size} cross machines "
        f"(ranks {first})"
    )
    if may_cross:
        return f"{text}; their collectives lie on the critical path of every layer"
    fitting = [n for n in range(1, size) if size % n == 0 and not crossing_groups(hosts, n)]
    raise UserError(
        text,
        rule="every layer waits for several collectives of a tensor-parallel group, so its ranks "
        "are neighbours on one machine",
        remedy=f"parallel.tensor_parallel_size={fitting[-1]}, a multiple of {size} ranks on every "
        "machine, or parallel.tensor_parallel_across_machines=true if the network is meant for it",
    )


def _versions() -> dict[str, str]:
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _can_compile() -> bool:
    return bool(shutil.which("c++") or shutil.which("g++")) and bool(shutil.which("ninja"))


def _own_address() -> str:
    if named := os.environ.get("GLOO_SOCKET_IFNAME"):
        return named
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def _allocator() -> str:
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return "unknown"
    return next((name for name in ("tcmalloc", "jemalloc", "mimalloc") if name in maps), "malloc")
