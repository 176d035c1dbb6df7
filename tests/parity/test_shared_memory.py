"""Collectives through memory against arithmetic: every kind, size and type, and lost ranks."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megascale.launcher.failure import lost_peer
from megascale.parallel import shared_memory
from megascale.parallel.shared_memory import SharedMemoryGroup
from megascale.parallel.shared_segment import SLOT_BYTES
from tests.distributed import Pools
from tests.parity.harness import merge, record_rank
from tests.parity.test_engines import assert_same, settings_of

# One element, an odd number, and more than a slot takes of any type.
SIZES = (1, 1003, SLOT_BYTES // 2 + 5)
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)
HALF = (torch.bfloat16, torch.float16)


def _group() -> SharedMemoryGroup:
    shared_memory.register()
    group = dist.new_group(backend=shared_memory.BACKEND)
    assert isinstance(group, SharedMemoryGroup)
    assert group._segment is not None
    return group


def _values(rank: int, count: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(count, generator=generator, dtype=torch.float64) * 50).to(dtype)


def _sum(parts: list[Tensor], divisor: int = 1) -> Tensor:
    """In the order of the ranks; half precision in fp32, rounded once."""
    total = parts[0].float() if parts[0].dtype in HALF else parts[0].clone()
    for part in parts[1:]:
        total += part
    return (total / divisor).to(parts[0].dtype) if divisor > 1 else total.to(parts[0].dtype)


def collectives_rank(size: int, dtype: torch.dtype) -> list[str]:
    """Runs on every rank: the kinds whose result is not the expected one, bit by bit."""
    group = _group()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    parts = [_values(r, size, dtype) for r in range(ranks)]
    rows = [_values(r, size * ranks, dtype).view(ranks, size) for r in range(ranks)]
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    kinds: list[tuple[str, Any, Tensor]] = [
        ("sum", dist.ReduceOp.SUM, _sum(parts)),
        ("max", dist.ReduceOp.MAX, torch.stack(parts).amax(0)),
        ("min", dist.ReduceOp.MIN, torch.stack(parts).amin(0)),
    ]
    if dtype.is_floating_point:  # FSDP2's reduction
        kinds.append(("mean", dist.ReduceOp.AVG, _sum(parts, ranks)))
    for name, op, wanted in kinds:
        got = parts[rank].clone()
        dist.all_reduce(got, op=op, group=group)
        seen[name] = got, wanted
    got = torch.empty(ranks * size, dtype=dtype)
    dist.all_gather_into_tensor(got, parts[rank], group=group)
    seen["gather"] = got, torch.cat(parts)
    listed = [torch.empty(size, dtype=dtype) for _ in range(ranks)]
    dist.all_gather(listed, parts[rank], group=group)
    seen["list"] = torch.cat(listed), torch.cat(parts)
    got = torch.empty(size, dtype=dtype)
    dist.reduce_scatter_tensor(got, rows[rank].flatten(), group=group)
    seen["scatter"] = got, _sum([each[rank] for each in rows])
    if dtype.is_floating_point:
        got = torch.empty(size, dtype=dtype)
        dist.reduce_scatter_tensor(got, rows[rank].flatten(), dist.ReduceOp.AVG, group=group)
        seen["scattered mean"] = got, _sum([each[rank] for each in rows], ranks)
    got = torch.empty(ranks * size, dtype=dtype)
    dist.all_to_all_single(got, rows[rank].flatten(), group=group)
    seen["exchange"] = got, torch.cat([each[rank] for each in rows])
    got = parts[rank].clone()
    dist.broadcast(got, ranks - 1, group=group)
    seen["broadcast"] = got, parts[-1]
    return [kind for kind, (got, wanted) in seen.items() if not torch.equal(got, wanted)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_kind_to_the_bit(pools: Pools, ranks: int, dtype: torch.dtype) -> None:
    for size in SIZES:
        assert pools(ranks).run(collectives_rank, size=size, dtype=dtype) == [[]] * ranks, size


def through_gloo_rank() -> list[Any]:
    """Runs on every rank: what the memory does not take, mixed with what it does."""
    group, rank, ranks = _group(), dist.get_rank(), dist.get_world_size()
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total, op=dist.ReduceOp.PRODUCT, group=group)
    objects: list[Any] = [None] * ranks
    dist.all_gather_object(objects, "x" * (rank + 1), group=group)
    ahead = torch.empty(3)
    sent = dist.isend(torch.full((3,), float(rank)), (rank + 1) % ranks, group=group)
    dist.recv(ahead, (rank - 1) % ranks, group=group)
    sent.wait()
    everyone = torch.ones(1)
    dist.all_reduce(everyone, group=group)
    dist.barrier(group=group)
    return [total.item(), objects, ahead[0].item(), everyone.item()]


def test_what_memory_does_not_take_goes_to_gloo(pools: Pools) -> None:
    words = ["x", "xx", "xxx", "xxxx"]
    wanted = [[24.0, words, float((rank - 1) % 4), 4.0] for rank in range(4)]
    assert pools(4).run(through_gloo_rank) == wanted


def alone_rank(leaves: bool) -> tuple[str, bool, float]:
    """Runs on every rank: the last one does not come; what the others are told, and when."""
    group = _group()
    dist.barrier()
    start = time.monotonic()
    if dist.get_rank() == dist.get_world_size() - 1:
        if leaves:
            group.shutdown()
        dist.barrier()
        return "", True, 0.0
    group.limit_wait(timedelta(seconds=60 if leaves else 0.5))
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        return str(error), lost_peer(error), time.monotonic() - start
    finally:
        dist.barrier()
    return "nothing", False, 0.0


@pytest.mark.parametrize(
    ("leaves", "words"), [(True, "closed by peer 3"), (False, "timed out waiting 0.5 s")]
)
def test_nobody_waits_for_ever(pools: Pools, leaves: bool, words: str) -> None:
    *waiting, _ = pools(4).run(alone_rank, leaves=leaves)
    for told, is_lost, seconds in waiting:
        assert words in told
        assert is_lost
        assert seconds < 30  # far from the limit of 60, far above what a busy machine needs


TENSOR = {"parallel.tensor_parallel_size": 2, "model.seq_length": 24}


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_gloo_alone_is_the_same_training(pools: Pools, token_prefix: Path, engine: str) -> None:
    changes = {**TENSOR, "parallel.engine": engine, "parallel.zero_stage": 1}
    records = []
    for choice in ("auto", "never"):
        settings = settings_of(token_prefix, {**changes, "performance.shared_memory": choice})
        records.append(merge(pools(4).run(record_rank, settings=settings, steps=3)))
    assert_same(*records)
