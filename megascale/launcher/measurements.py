"""How fast a machine multiplies matrices, and how fast ranks exchange numbers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megascale.launcher.preflight import Facts

_PRODUCT_SIZE = {"cpu": 512, "cuda": 8192}
_SMALL, _LARGE = 256, 4 << 20
"""Elements of the messages by which latency and bandwidth are measured."""
_ROUNDS = 5


@dataclass(frozen=True)
class Exchange:
    """All-reduces along one axis of the mesh.

    Attributes:
        latency_s: of 1 KiB, the median of some.
        bytes_per_s: 2 (n - 1) / n times the size over the time: what a link carries, whatever n.
    """

    axis: str
    size: int
    latency_s: float
    bytes_per_s: float


def product_seconds(device: torch.device) -> float:
    """Median time of a product of two square matrices, 512 wide on a CPU and 8192 on a GPU."""
    width = _PRODUCT_SIZE.get(device.type, 2048)
    a = torch.randn(width, width, device=device)

    def multiply() -> None:
        torch.mm(a, a)

    return _median_seconds(multiply, device)


def all_reduce_speed(axis: str, group: dist.ProcessGroup, device: torch.device) -> Exchange:
    """Measure the all-reduces of a group; collective over the group."""
    size = dist.get_world_size(group)
    small = torch.zeros(_SMALL, device=device)
    large = torch.zeros(_LARGE, device=device)
    latency = _median_seconds(lambda: _reduce(small, group), device)
    seconds = _median_seconds(lambda: _reduce(large, group), device)
    carried = 2 * (size - 1) / size * large.numel() * large.element_size()
    return Exchange(axis, size, latency, carried / seconds)


def _reduce(tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    dist.all_reduce(tensor, group=group)


def _median_seconds(work: Callable[[], None], device: torch.device) -> float:
    times = []
    for _ in range(_ROUNDS + 1):  # the first one warms up
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def device_names() -> list[str]:
    """Names of the accelerators that this process sees."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def everybodys(facts: Facts) -> list[Facts]:
    """The facts of all ranks, with clocks that were read at one moment; collective."""
    gathered: list[Facts | None] = [None] * dist.get_world_size()
    dist.barrier()
    dist.all_gather_object(gathered, replace(facts, clock_s=time.time()))
    return [found for found in gathered if found is not None]
