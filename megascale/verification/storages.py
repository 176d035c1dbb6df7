"""The tensor storages that live in this process, by what they are for."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from megascale.engine.protocol import Engine


@dataclass(frozen=True)
class LiveBytes:
    """Bytes of the storages of one rank; a storage with several uses counts for the first.

    Attributes:
        weights: what the model computes with, or its shards.
        masters: fp32 weights that the optimizer steps on, where they are not the weights.
        states: of the optimizer, without step counters.
    """

    weights: int
    masters: int
    states: int


def live_bytes(engine: Engine) -> LiveBytes:
    """Count the storages of an engine's parameters and optimizer after a step."""
    seen: set[int] = set()
    weights = _count(_weights(engine.module), seen)
    masters = _count((f.tensor for f in engine.fragments(["master"], replicas=True)), seen)
    kinds = [kind for kind in engine.state_kinds if kind != "master"]
    states = _count((f.tensor for f in engine.fragments(kinds, replicas=True)), seen)
    return LiveBytes(weights, masters, states)


def all_live_bytes() -> int:
    """Bytes of every storage that torch made and some tensor of this process holds.

    Memory that others gave does not count: numpy's, mapped files, what ranks share.
    """
    gc.collect()
    found = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
    held = filter(_has_storage, map(_local, found))
    return _count((tensor for tensor in held if tensor.untyped_storage().resizable()), set())


def _weights(module: torch.nn.Module) -> Iterable[torch.Tensor]:
    for parameter in module.parameters():
        yield _local(parameter)
        shard = getattr(parameter, "ds_tensor", None)  # ZeRO-3's part of it
        if shard is not None:
            yield shard


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _has_storage(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "meta" and tensor.layout is torch.strided


def _count(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    total = 0
    for tensor in filter(_has_storage, tensors):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
