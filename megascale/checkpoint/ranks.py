"""What a save asks of the ranks that take part: to exchange small values, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megascale.errors import DiskFullError, UserError

SAVE_TIMEOUT = timedelta(hours=4)
"""The slowest rank's writing may last this long: the others wait for it in an exchange."""


_HEAD = 1024  # bytes: most messages are shorter, and one collective carries them


class Ranks(Protocol):
    """The processes that write or read one checkpoint together."""

    rank: int
    size: int

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's JSON value, by rank. Collective."""
        ...

    def share(self, tensor: torch.Tensor | None, source: int, holders: Sequence[int]) -> None:
        """Copy the tensor of rank `source` into those of the `holders`. Collective over all ranks.

        Args:
            tensor: of this rank, contiguous; None where it is no holder.
        """
        ...


class OneRank:
    """A process alone."""

    rank = 0
    size = 1

    def exchange(self, value: Any) -> list[Any]:
        """See `Ranks.exchange`."""
        return [value]

    def share(self, tensor: torch.Tensor | None, source: int, holders: Sequence[int]) -> None:
        """See `Ranks.share`."""


class GroupRanks:
    """The ranks of a process group of its own (gloo), so that no collective of the training waits.

    Making one is collective. The group may be used from another thread than the training's.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def exchange(self, value: Any) -> list[Any]:
        """See `Ranks.exchange`."""
        # the limit of the training's collectives, set for all groups, is too short for writing
        dist.distributed_c10d._set_pg_timeout(SAVE_TIMEOUT, self._group)
        text = json.dumps(value).encode()
        heads = self._gather(len(text).to_bytes(8, "little") + text[: _HEAD - 8], _HEAD)
        sizes = [int.from_bytes(head[:8], "little") for head in heads]
        texts = [head[8 : 8 + size] for head, size in zip(heads, sizes, strict=True)]
        rest = max(sizes) - (_HEAD - 8)
        if rest > 0:  # the same on all ranks
            texts = [
                a + b for a, b in zip(texts, self._gather(text[_HEAD - 8 :], rest), strict=True)
            ]
        return [json.loads(text[:size]) for text, size in zip(texts, sizes, strict=True)]

    def _gather(self, data: bytes, size: int) -> list[bytes]:
        """Every rank's `data`, with zeros behind up to `size` bytes."""
        mine = torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=torch.uint8)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine, group=self._group)
        return [part.numpy().tobytes() for part in everyone]

    def share(self, tensor: torch.Tensor | None, source: int, holders: Sequence[int]) -> None:
        """See `Ranks.share`."""
        key = tuple(holders)
        if key not in self._groups:  # every rank comes here alike, as new_group demands
            self._groups[key] = dist.new_group(list(key), backend="gloo", timeout=SAVE_TIMEOUT)
        if tensor is None:
            return
        on_host = tensor.detach().cpu()  # itself, where it is there already
        dist.broadcast(on_host, source, group=self._groups[key])
        if on_host.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(on_host)


def make_ranks() -> Ranks:
    """All processes of the default group, or this one alone where there is none. Collective."""
    return GroupRanks() if dist.is_initialized() and dist.get_world_size() > 1 else OneRank()


def agree(ranks: Ranks, action: Callable[[], Any]) -> list[Any]:
    """Run `action` on every rank and exchange the results; fail on all ranks if one failed.

    Raises:
        UserError: what the first failing rank raised, with its number.
    """
    outcome: dict[str, Any]
    mistake: Exception | None = None
    try:
        outcome = {"value": action()}
    except UserError as error:
        outcome = {"error": [error.what, error.rule, error.remedy]}
        outcome["full"] = isinstance(error, DiskFullError)
    except OSError as error:  # of a read; the others must not wait for this rank
        outcome = {"error": [f"{type(error).__name__}: {error}", "", "check the storage"]}
    except Exception as error:  # ours; the others end too, and this rank shows where it happened
        outcome, mistake = {"error": [f"{type(error).__name__}: {error}", "", ""]}, error
    outcomes = ranks.exchange(outcome)
    if mistake is not None:
        raise mistake
    for rank, other in enumerate(outcomes):
        if "error" in other:
            what, rule, remedy = other["error"]
            where = f"rank {rank}: " if ranks.size > 1 else ""
            kind = DiskFullError if other.get("full") else UserError
            raise kind(f"{where}{what}", rule=rule, remedy=remedy)
    return [other["value"] for other in outcomes]
