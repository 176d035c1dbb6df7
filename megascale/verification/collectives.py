"""Counting what a step sends: bytes by mesh axis and kind, seen where torch dispatches them.

Every collective of torch.distributed, FSDP2 and DeepSpeed goes through the c10d operators of the
dispatcher, whatever Python function it was called by, or through the memory of a group, which tells
its observer. What is counted is the size of the whole tensor (the output of an all-gather, the
input of a reduce-scatter); what a ring sends of it is (n - 1) / n of that, twice for an all-reduce.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megascale.parallel.mesh import AXES, ParallelMesh
from megascale.parallel.shared_memory import SharedMemoryGroup

SCALAR_ELEMENTS = 8
"""Collectives of at most so many elements (losses, norms, counts) are counted as "scalar"."""

# operator -> (kind, position of the argument that holds the whole tensor)
_OPERATORS = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "alltoall_base_": ("all_to_all", 1),
    "alltoall_": ("all_to_all", 1),
    "send": ("send", 0),
    "gather_": ("gather", 0),
    "scatter_": ("scatter", 0),
}

Volumes = Mapping[tuple[str, str], int]
"""(axis, kind) -> bytes. The axis is a name of the mesh, or "world"."""


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives of this rank while it is entered.

    Attributes:
        bytes: (axis, kind) -> bytes of the whole tensors.
        calls: (axis, kind) -> number of calls.
    """

    def __init__(self, mesh: ParallelMesh) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()
        meshes = {"data": mesh.data_mesh, "model": mesh.model_mesh}
        meshes |= {axis: mesh.device_mesh[axis] for axis in AXES}  # of equal groups, these names
        groups = {axis: dist.get_process_group_ranks(m.get_group()) for axis, m in meshes.items()}
        self._axes = {tuple(ranks): axis for axis, ranks in groups.items() if len(ranks) > 1}
        every = {each.get_group() for each in meshes.values()}
        self._groups = [group for group in every if isinstance(group, SharedMemoryGroup)]

    def __enter__(self) -> CollectiveCounter:
        for group in self._groups:
            axis = self._axis(group)
            group.observer = partial(self._add, axis) if axis else None
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for group in self._groups:
            group.observer = None
        super().__exit__(*error)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Count `func` if it is a collective, and run it."""
        packet = getattr(func, "overloadpacket", None)
        if getattr(func, "namespace", "") == "c10d" and packet is not None:
            self._count(packet.__name__, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Sequence[Any]) -> None:
        if name not in _OPERATORS:
            return  # barriers, and receiving what the sender counts
        kind, position = _OPERATORS[name]
        tensors = list(_tensors(args[position]))
        elements = sum(tensor.numel() for tensor in tensors)
        boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
        axis = self._axis(dist.ProcessGroup.unbox(boxed))
        if axis is not None:
            self._add(axis, kind, elements, sum(tensor.nbytes for tensor in tensors))

    def _add(self, axis: str, kind: str, elements: int, size: int) -> None:
        key = (axis, kind if elements > SCALAR_ELEMENTS else "scalar")
        self.bytes[key] += size
        self.calls[key] += 1

    def _axis(self, group: dist.ProcessGroup) -> str | None:
        """The axis of a collective's group; None for a group of one rank."""
        ranks = tuple(dist.get_process_group_ranks(group))
        return None if len(ranks) == 1 else self._axes.get(ranks, "world")


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
