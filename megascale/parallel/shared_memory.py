"""Collectives through memory, for ranks that share a machine's CPU.

gloo moves every byte through the sockets of the loopback device and wakes three threads a rank for
each hop of its ring: an all-reduce of 1 KB over 4 ranks takes some 30 switches of a thread a rank.
Here a rank writes its part into memory that all of them see, signals, and reads what the others
wrote: one or two meetings a collective, whatever the number of ranks.

The group is an ordinary group of gloo whose most frequent collectives are replaced; point-to-point
messages, rare collectives and types go to gloo as before. All ranks add in the same order, so all
of them get the same bits; bf16 and fp16 are added in fp32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (  # type: ignore[attr-defined]
    AllgatherOptions,
    AllreduceOptions,
    AllToAllOptions,
    BarrierOptions,
    BroadcastOptions,
    ReduceScatterOptions,
    _create_work_from_future,
)
from torch.futures import Future
from torch.profiler import record_function
from torch.utils._pytree import tree_leaves

from megascale.parallel.shared_segment import SLOT_BYTES, Segment, open_segment

BACKEND = "shared_memory"

_DIVIDED_BYTES = 1 << 16
"""Above it ranks of three or more share the adding: each does its part of the elements."""

Combine = Callable[[Tensor, Sequence[Tensor]], None]
"""Writes the sum, the largest or the least of some tensors into another one."""


def _by_gloo(name: str, kind: str = "", whole: int = 0) -> Any:
    """A method of a group that is gloo's own.

    The base class has them all, but calls gloo with Python's global lock held. A thread of gloo's
    that lets a tensor go wants that lock, and may hold the one that the call waits for.

    Args:
        kind: what the observer is told; "": nothing.
        whole: which argument has the whole tensors.
    """

    def method(self: SharedMemoryGroup, *args: Any, **kwargs: Any) -> dist.Work:
        tensors = tree_leaves(args[whole]) if kind else ()
        with self._during(kind, *tensors) if kind else nullcontext():
            return getattr(self._gloo, name)(*args, **kwargs)

    method.__name__ = name
    return method


def _one_by_one(single: Callable[..., dist.Work]) -> Any:
    """A method that does for several outputs and inputs what another one does for one of each."""

    def method(
        self: SharedMemoryGroup, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        for output, input in zip(outputs, inputs, strict=True):
            single(self, output, input, opts).wait()
        return _done(outputs)

    method.__name__ = f"{single.__name__}_coalesced"
    return method


class SharedMemoryGroup(dist.ProcessGroup):
    """A process group of gloo with collectives through memory; see `dist.ProcessGroup`.

    Collectives through memory are over when they return, also with `async_op`.

    Attributes:
        observer: called with the kind of each collective or message, and the number and size in
            bytes of its whole tensor's elements.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
        self._gloo._set_sequence_number_for_group()
        kind = dist.ProcessGroup.BackendType.GLOO
        self._register_backend(torch.device("cpu"), kind, self._gloo)
        self._set_default_backend(kind)
        self._segment = open_segment(store, rank, size, timeout)
        self.observer: Callable[[str, int, int], None] | None = None

    def limit_wait(self, timeout: timedelta) -> None:
        """Let no collective through memory wait longer for other ranks."""
        if self._segment is not None:
            self._segment.timeout = timeout

    def shutdown(self) -> None:
        """Leave the group; ranks that wait for this one fail."""
        if self._segment is not None:
            self._segment.close()
        super().shutdown()

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:  # type: ignore[override]
        """One tensor, in place; see `dist.all_reduce`."""
        opts = opts or AllreduceOptions()
        combine = _combine(tensors[0].dtype, opts.reduceOp)
        memory = self._memory_for(tensors) if combine and len(tensors) == 1 else None
        with self._during("all_reduce", *tensors):
            if memory is None or combine is None:
                return self._gloo.allreduce(tensors, opts)
            _all_reduce(memory, _flat(tensors[0]), combine)
        return _done(tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:  # type: ignore[override]
        """One tensor, in place; see `dist.broadcast`."""
        opts = opts or BroadcastOptions()
        memory = self._memory_for(tensors) if len(tensors) == 1 else None
        with self._during("broadcast", *tensors):
            if memory is None:
                return self._gloo.broadcast(tensors, opts)
            _broadcast(memory, _bytes(tensors[0]), opts.rootRank)
        return _done(tensors)

    def allgather(  # type: ignore[override]
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        """Of one tensor, into tensors of its size; see `dist.all_gather`."""
        everything = [*inputs, *outputs[0]]
        alike = len(inputs) == 1 and len({each.nbytes for each in everything}) == 1
        memory = self._memory_for(everything) if alike else None
        with self._during("all_gather", *outputs[0]):
            if memory is None:
                return self._gloo.allgather(outputs, inputs, opts or AllgatherOptions())
            _all_gather(memory, [_bytes(each) for each in outputs[0]], _bytes(inputs[0]))
        return _done(outputs[0])

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        """See `dist.all_gather_into_tensor`."""
        memory = self._memory_for([output, input])
        with self._during("all_gather", output):
            if memory is None:
                return self._gloo._allgather_base(output, input, opts or AllgatherOptions())
            _all_gather(memory, _bytes(output).view(memory.size, -1).unbind(), _bytes(input))
        return _done([output])

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        """See `dist.reduce_scatter_tensor`."""
        opts = opts or ReduceScatterOptions()
        combine = _combine(input.dtype, opts.reduceOp)
        same_type = output.dtype == input.dtype
        memory = self._memory_for([output, input]) if combine and same_type else None
        with self._during("reduce_scatter", input):
            if memory is None or combine is None:
                return self._gloo._reduce_scatter_base(output, input, opts)
            _reduce_scatter(memory, _flat(output), _flat(input).view(memory.size, -1), combine)
        return _done([output])

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: list[int],
        input_splits: list[int],
        opts: Any = None,
    ) -> dist.Work:
        """With equal parts; see `dist.all_to_all_single`."""
        even = not output_splits and not input_splits
        memory = self._memory_for([output, input]) if even else None
        with self._during("all_to_all", input):
            if memory is None:
                opts = opts or AllToAllOptions()
                return self._gloo.alltoall_base(output, input, output_splits, input_splits, opts)
            _all_to_all(memory, *(_bytes(each).view(memory.size, -1) for each in (output, input)))
        return _done([output])

    # Their names before torch 2.13.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]
    alltoall_base = all_to_all_single  # type: ignore[assignment]

    def barrier(self, opts: Any = None) -> dist.Work:
        """See `dist.barrier`."""
        if self._segment is None:
            return self._gloo.barrier(opts or BarrierOptions())
        self._segment.meet()
        return _done([])

    send = _by_gloo("send", "send")
    recv = _by_gloo("recv")  # the sender tells
    recv_anysource = _by_gloo("recv_anysource")
    reduce = _by_gloo("reduce", "reduce")
    gather = _by_gloo("gather", "gather")
    scatter = _by_gloo("scatter", "scatter")
    reduce_scatter = _by_gloo("reduce_scatter", "reduce_scatter", whole=1)
    alltoall = _by_gloo("alltoall", "all_to_all", whole=1)
    allreduce_coalesced = _by_gloo("allreduce_coalesced", "all_reduce")
    allgather_coalesced = _by_gloo("allgather_coalesced", "all_gather")
    monitored_barrier = _by_gloo("monitored_barrier")
    all_gather_single_coalesced = _one_by_one(all_gather_single)
    reduce_scatter_single_coalesced = _one_by_one(reduce_scatter_single)
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def _memory_for(self, tensors: Sequence[Tensor]) -> Segment | None:
        """The memory, if it can take a collective of these tensors; None: gloo does it."""
        plain = all(
            each.device.type == "cpu" and each.layout == torch.strided and each.is_contiguous()
            for each in tensors
        )
        return self._segment if plain and tensors[0].numel() else None

    def _during(self, kind: str, *whole: Tensor) -> AbstractContextManager[Any]:
        if self.observer is not None:
            self.observer(kind, sum(x.numel() for x in whole), sum(x.nbytes for x in whole))
        profiled = torch.autograd._profiler_enabled()
        return record_function(f"{BACKEND}:{kind}") if profiled else nullcontext()


def register() -> None:
    """Make `backend="shared_memory"` known to torch.distributed, once a process."""
    if BACKEND.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(BACKEND, SharedMemoryGroup, devices=["cpu"])


def _all_reduce(memory: Segment, flat: Tensor, combine: Combine) -> None:
    divided = memory.size > 2 and flat.nbytes > _DIVIDED_BYTES
    for begin, end in _pieces(flat.numel(), SLOT_BYTES // flat.itemsize):
        piece, slots = flat[begin:end], memory.slots(flat.dtype)
        slots[memory.rank][: end - begin].copy_(piece)
        memory.meet()
        if not divided:
            combine(piece, [slot[: end - begin] for slot in slots])
            continue
        shares = [(end - begin) * r // memory.size for r in range(memory.size + 1)]
        first, last = shares[memory.rank], shares[memory.rank + 1]
        combine(piece[first:last], [slot[first:last] for slot in slots])
        slots[memory.rank][first:last].copy_(piece[first:last])  # only this rank reads it there
        memory.meet()
        for rank, slot in enumerate(slots):
            if rank != memory.rank:
                piece[shares[rank] : shares[rank + 1]].copy_(slot[shares[rank] : shares[rank + 1]])


def _broadcast(memory: Segment, flat: Tensor, root: int) -> None:
    for begin, end in _pieces(flat.numel(), SLOT_BYTES):
        slot = memory.slots(flat.dtype)[root][: end - begin]
        if memory.rank == root:
            slot.copy_(flat[begin:end])
        memory.meet()
        if memory.rank != root:
            flat[begin:end].copy_(slot)


def _all_gather(memory: Segment, outputs: Sequence[Tensor], flat: Tensor) -> None:
    for begin, end in _pieces(flat.numel(), SLOT_BYTES):
        slots = memory.slots(flat.dtype)
        slots[memory.rank][: end - begin].copy_(flat[begin:end])
        memory.meet()
        for output, slot in zip(outputs, slots, strict=True):
            output[begin:end].copy_(slot[: end - begin])


def _reduce_scatter(memory: Segment, output: Tensor, rows: Tensor, combine: Combine) -> None:
    for begin, end, parts in _scattered(memory, rows):
        combine(output[begin:end], parts)


def _all_to_all(memory: Segment, outputs: Tensor, rows: Tensor) -> None:
    for begin, end, parts in _scattered(memory, rows):
        for output, part in zip(outputs, parts, strict=True):
            output[begin:end].copy_(part)


def _scattered(memory: Segment, rows: Tensor) -> Iterator[tuple[int, int, list[Tensor]]]:
    """What all ranks have for this one in their rows (rank, elements), piece by piece."""
    size, rank = memory.size, memory.rank
    for begin, end in _pieces(rows.shape[1], SLOT_BYTES // rows.itemsize // size):
        width, slots = end - begin, memory.slots(rows.dtype)
        slots[rank][: size * width].view(size, width).copy_(rows[:, begin:end])
        memory.meet()
        yield begin, end, [slot[rank * width : (rank + 1) * width] for slot in slots]


def _pieces(total: int, most: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, total, most):
        yield begin, min(begin + most, total)


def _combine(dtype: torch.dtype, op: Any) -> Combine | None:
    """How tensors of a type are reduced; None: not here."""
    mean = op == dist.ReduceOp.AVG and dtype.is_floating_point  # FSDP2's
    if mean or (op == dist.ReduceOp.SUM and dtype != torch.bool):
        half = dtype in (torch.bfloat16, torch.float16)
        return partial(_sum_in_fp32 if half else _sum, mean=mean)
    if op == dist.ReduceOp.MAX:
        return partial(_fold, torch.maximum)
    return partial(_fold, torch.minimum) if op == dist.ReduceOp.MIN else None


def _fold(operation: Callable[..., Tensor], out: Tensor, parts: Sequence[Tensor]) -> None:
    operation(parts[0], parts[1], out=out)
    for part in parts[2:]:
        operation(out, part, out=out)


def _sum(out: Tensor, parts: Sequence[Tensor], mean: bool) -> None:
    _fold(torch.add, out, parts)
    if mean:
        out.div_(len(parts))


def _sum_in_fp32(out: Tensor, parts: Sequence[Tensor], mean: bool) -> None:
    total = parts[0].float()
    for part in parts[1:]:
        total.add_(part)
    out.copy_(total.div_(len(parts)) if mean else total)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1)


def _bytes(tensor: Tensor) -> Tensor:
    return _flat(tensor).view(torch.uint8)


def _done(result: list[Tensor]) -> dist.Work:
    future: Future[list[Tensor]] = Future()
    future.set_result(result)
    return _create_work_from_future(future)
