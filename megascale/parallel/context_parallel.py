"""Context parallelism: the tokens of every sample cut over ranks.

A sample of T tokens is cut into 2 n equal chunks, of which rank r of n holds two (zig-zag):

    n = 2:     rank 0: chunks 0, 3        rank 1: chunks 1, 2

With a causal mask the first tokens see few keys and the last ones many; an early and a late chunk
together are the same work on every rank. Everything in a layer but attention looks at one token
at a time, and position ids tell it which; only the core of attention is replaced, by one of

    ulysses   all-to-all: all tokens of H / n heads before, the own tokens of all heads after
              (arXiv:2309.14509)
    ring      keys and values of the other ranks come by, one rank's at a time (ring_attention.py)

The order of cutting: `own_tokens` takes a rank's chunks of a micro-batch, before any engine sees
it; sequence parallelism cuts what a rank holds once more, over the tensor-parallel ranks. What
masks are made of (document ids, padding) stays whole on every rank: it is a few bytes a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megascale.parallel.collectives import transposed
from megascale.parallel.ring_attention import Ring, ring_attention
from megascale.parallel.tensor_parallel import matched, replace_module

Method = Literal["ulysses", "ring"]
ContextStyle = Literal["attention", "drop_sequence"]
ContextPlan = Mapping[str, ContextStyle]
"""Pattern of module names (`*` stands for one dotted part) -> what the cut means to the module:
`attention` the core of attention, `drop_sequence` a dropout over (T, ...)."""

_PER_TOKEN = ("input_ids", "labels", "token_type_ids", "position_ids")
_PER_SAMPLE = "sentence_labels"
_NO_TARGET = -100


@dataclass(frozen=True)
class ContextGroup:
    """The ranks that share the tokens of a sample, as a module's cut needs them.

    Attributes:
        tensor_rank, tensor_size: place among the ranks that share the heads.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    method: Method
    tensor_rank: int = 0
    tensor_size: int = 1

    @property
    def chunks(self) -> tuple[int, int]:
        """The chunks of a sample, of 2 x size, that this rank holds."""
        return zigzag(self.rank, self.size)


def zigzag(rank: int, size: int) -> tuple[int, int]:
    """The two of 2 x size chunks that a rank holds."""
    return rank, 2 * size - 1 - rank


def cut_tokens(x: Tensor, rank: int, size: int, dim: int = 1) -> Tensor:
    """(..., T, ...) -> (..., T / size, ...): a rank's chunks along `dim`, one after the other."""
    chunks = x.chunk(2 * size, dim)
    return torch.cat([chunks[number] for number in zigzag(rank, size)], dim)


def join_tokens(parts: list[Tensor], dim: int = 1) -> Tensor:
    """The parts of all ranks in order -> the whole sequence; inverse of `cut_tokens`."""
    halves = [part.chunk(2, dim) for part in parts]
    return torch.cat([a for a, _ in halves] + [b for _, b in reversed(halves)], dim)


def own_tokens(micro_batch: Mapping[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """This rank's part of a micro-batch of whole samples.

    What belongs to one token is cut; position ids are added where there are none; document ids and
    the attention mask stay whole, since masks need those of other ranks' keys. The target of a
    whole sample (a sentence label) stays on the rank that holds the first token.
    """
    if size == 1:
        return dict(micro_batch)
    own = dict(micro_batch)
    ids = micro_batch["input_ids"]
    length = ids.shape[1]
    assert length % (2 * size) == 0, f"{length} tokens for {size} context-parallel ranks"
    own.setdefault("position_ids", torch.arange(length, device=ids.device)[None])
    for name in _PER_TOKEN:
        if name in own:
            own[name] = cut_tokens(own[name], rank, size)
    if _PER_SAMPLE in own and rank:
        own[_PER_SAMPLE] = torch.full_like(own[_PER_SAMPLE], _NO_TARGET)
    return own


def gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, T_local, ...) of every rank -> (B, T, ...) in the sample's order; no gradient."""
    size = dist.get_world_size(group)
    if size == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, x.contiguous(), group=group)
    return join_tokens(parts)


def parallelize_context(module: nn.Module, plan: ContextPlan, context: ContextGroup) -> None:
    """Make `module` work on this rank's tokens, in place; after the tensor-parallel cut.

    No parameter is cut or renamed.

    Raises:
        ValueError: a line of the plan that fits no module.
    """
    for name, child, _, style in matched(module, plan):
        if style == "drop_sequence":
            child.set_chunks(0, context.chunks, 2 * context.size)  # type: ignore[operator]
        else:
            core = UlyssesAttention if context.method == "ulysses" else RingAttention
            replace_module(module, name, core(child, context))


class UlyssesAttention(nn.Module):
    """A core of attention between two all-to-alls (arXiv:2309.14509).

        (B, H, T / n, K)  --all-to-all-->  (B, H / n, T, K)  core  --all-to-all-->  (B, H, T / n, K)

    The core sees whole sequences, so that masks, windows and dropout are those of one process.
    Key and value heads that n does not divide are repeated as often as needed.

    Args:
        core: the original; it has no parameters.
    """

    def __init__(self, core: nn.Module, context: ContextGroup) -> None:
        super().__init__()
        self.core, self.context = core, context
        index = context.tensor_rank * context.size + context.rank
        core.dropout.set_shard(0, index, context.tensor_size * context.size)  # type: ignore

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, visibility: Any, keys: Tensor | None
    ) -> Tensor:
        """As the core, of T_local tokens: (B, H, T_local, K) -> (B, H, T_local, K)."""
        size = self.context.size
        repeats = size // gcd(size, key.shape[1])
        if repeats > 1:
            key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
        # one message: from each of the three the heads that go to a rank
        split = [t.unflatten(1, (size, -1)) for t in (query, key, value)]
        heads = [t.shape[2] for t in split]
        packed = transposed(
            torch.cat(split, dim=2), self.context.group, _tokens_to_heads, _heads_to_tokens
        )
        attended = self.core(*packed.split(heads, dim=1), visibility, keys)
        tokens = transposed(attended, self.context.group, _heads_to_tokens, _tokens_to_heads)
        return tokens.flatten(1, 2)


def _tokens_to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, n, H_n, T_local, K), heads by the rank they go to -> (B, H_n, T, K) of this rank's."""
    sent = x.transpose(0, 1).contiguous()  # (n, B, H_n, T_local, K)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return join_tokens(list(received.unbind(0)), dim=2)


def _heads_to_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, H_n, T, K) -> (B, n, H_n, T_local, K), heads by the rank they come from."""
    size = dist.get_world_size(group)
    sent = torch.stack([cut_tokens(x, rank, size, dim=2) for rank in range(size)])
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.transpose(0, 1)


class RingAttention(nn.Module):
    """A core of attention past which the keys and values of all ranks travel.

    Args:
        core: the original; its settings and its dropout are read, its forward is not used.
    """

    def __init__(self, core: nn.Module, context: ContextGroup) -> None:
        super().__init__()
        self.core, self.context = core, context

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, visibility: Any, keys: Tensor | None
    ) -> Tensor:
        """As the core, of T_local tokens: (B, H, T_local, K) -> (B, H, T_local, K).

        Raises:
            ValueError: training with dropout and no keys.
        """
        core, context = self.core, self.context
        dropout: Any = core.dropout
        dropping = self.training and dropout.p > 0
        if dropping and keys is None:
            raise ValueError(f"dropout p={dropout.p} is active but no dropout_keys were given")
        heads, num_heads = dropout.coordinates(0, query.shape[1], query.device)
        length = query.shape[2] * context.size

        def keep(rows: Tensor, columns: Tensor) -> Tensor:
            return dropout.keep(keys, (heads, rows, columns), (num_heads, length, length))

        ring = Ring(
            group=context.group,
            rank=context.rank,
            size=context.size,
            visibility=visibility,
            root=float(core.query_scaling or query.shape[-1]) ** 0.5,  # type: ignore[arg-type]
            softcap=core.softcap,  # type: ignore[arg-type]
            dropout=dropout.p if dropping else 0.0,
            keep=keep,
        )
        return ring_attention(query, key, value, ring)
