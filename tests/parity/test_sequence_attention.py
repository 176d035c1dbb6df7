"""Attention over a sequence that is cut over ranks, against attention as it is defined.

The oracle is written out: scores, the rule of what is seen as a Python expression of places,
softmax, product, all in float64. Outputs and the gradients of queries, keys and values are
compared, on 2 and 4 ranks, with tiles smaller than a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megascale.models.attention import CoreAttention, Visibility
from megascale.models.dropout import sample_keys
from megascale.parallel import ring_attention
from megascale.parallel.context_parallel import (
    ContextGroup,
    RingAttention,
    UlyssesAttention,
    cut_tokens,
    join_tokens,
    own_tokens,
)
from tests.distributed import Pools

B, H, T, K = 2, 4, 24, 6


@dataclass(frozen=True)
class Case:
    """One attention: what it sees and how it scores."""

    visibility: Visibility
    kv_heads: int = H
    softcap: float | None = None
    query_scaling: float | None = None
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32


DOCUMENTS = torch.tensor([[0] * 5 + [1] * 9 + [2] * 10, [0] * 12 + [1] * 12])
REAL = (torch.arange(T) < torch.tensor([[17], [6]])).long()
CASES = {
    "causal": Case(Visibility()),
    "one key head": Case(Visibility(), kv_heads=1),
    "two key heads": Case(Visibility(), kv_heads=2, query_scaling=3.0),
    "window": Case(Visibility(window=5)),
    "window of one": Case(Visibility(window=1)),
    "documents": Case(Visibility(document_ids=DOCUMENTS), kv_heads=2),
    "documents in a window": Case(Visibility(window=7, document_ids=DOCUMENTS)),
    "all": Case(Visibility(causal=False)),
    "padding": Case(Visibility(causal=False, real=REAL)),
    "softcap": Case(Visibility(window=9), softcap=0.7, kv_heads=2),
    "dropout": Case(Visibility(document_ids=DOCUMENTS), dropout=0.4, kv_heads=2),
    "dropout and softcap": Case(Visibility(causal=False), dropout=0.2, softcap=1.5),
    "bf16": Case(Visibility(), kv_heads=2, dtype=torch.bfloat16),
}


def inputs(case: Case) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values of whole samples, and the gradient of the output."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(B, heads, T, K) for heads in (H, case.kv_heads, case.kv_heads, H)]
    *qkv, grad = [torch.randn(s, generator=generator).to(case.dtype) * 2 for s in shapes]
    return qkv, grad


def sees(case: Case, sample: int, query: int, key: int) -> bool:
    """The rule, of one query and one key."""
    seen = case.visibility
    return (
        not (seen.causal and key > query)
        and not (seen.window is not None and query - key >= seen.window)
        and (seen.document_ids is None or bool(DOCUMENTS[sample, query] == DOCUMENTS[sample, key]))
        and (seen.real is None or bool(REAL[sample, key]))
    )


def expected(case: Case) -> list[Tensor]:
    """Output and gradients of queries, keys, values, in float64."""
    qkv, grad = inputs(case)
    q, k, v = (t.double().requires_grad_() for t in qkv)
    groups = H // case.kv_heads
    key, value = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    scores = q @ key.transpose(-1, -2) / math.sqrt(case.query_scaling or K)
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    rule = [[[sees(case, s, i, j) for j in range(T)] for i in range(T)] for s in range(B)]
    probabilities = scores.masked_fill(~torch.tensor(rule)[:, None], -math.inf).softmax(-1)
    if case.dropout:
        core = CoreAttention(case.dropout, 9)
        probabilities = core.dropout(probabilities, sample_keys(5, torch.arange(B)))
    out = probabilities @ value
    out.backward(grad.double())
    return [out.detach(), *(t.grad for t in (q, k, v) if t.grad is not None)]


def attend(method: str, names: list[str], tile: int) -> dict[str, list[Tensor]]:
    """Runs on every rank: its part of what `expected` gives."""
    usual, ring_attention.TILE = ring_attention.TILE, tile
    try:
        return {name: _attend(method, CASES[name]) for name in names}
    finally:
        ring_attention.TILE = usual


def _attend(method: str, case: Case) -> list[Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    qkv, grad = inputs(case)
    parts = [cut_tokens(t, rank, size, dim=2).requires_grad_() for t in qkv]
    core = CoreAttention(case.dropout, 9, case.softcap, case.query_scaling)
    group = dist.group.WORLD
    assert group is not None
    kind: Any = RingAttention if method == "ring" else UlyssesAttention
    module = kind(core, ContextGroup(group, rank, size, method))  # type: ignore[arg-type]
    out = module(*parts, case.visibility, sample_keys(5, torch.arange(B)))
    assert out.dtype == case.dtype
    out.backward(cut_tokens(grad, rank, size, dim=2))
    return [out.detach(), *(p.grad for p in parts if p.grad is not None)]


@pytest.mark.parametrize("method", ["ring", "ulysses"])
@pytest.mark.parametrize(("world", "tile"), [(2, 4), (4, 1024)])
def test_equals_attention_as_defined(pools: Pools, world: int, tile: int, method: str) -> None:
    ranks = pools(world).run(attend, method=method, names=list(CASES), tile=tile)
    for name, case in CASES.items():
        found = [
            join_tokens(list(parts), dim=2) for parts in zip(*(r[name] for r in ranks), strict=True)
        ]
        limit = 1e-5 if case.dtype == torch.float32 else 3e-2
        for what, ours, theirs in zip("oqkv", found, expected(case), strict=True):
            # a query that sees one key has a gradient of zero: rounding counts against 1
            error = (ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1.0)
            assert error < limit, (name, what, float(error))


def test_the_oracle_is_torchs_attention() -> None:
    """Where torch's fused attention can say it."""
    for name in ("causal", "all", "two key heads"):
        case = CASES[name]
        q, k, v = (t.double() for t in inputs(case)[0])
        scale = 1 / math.sqrt(case.query_scaling or K)
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=case.visibility.causal, scale=scale, enable_gqa=True
        )
        torch.testing.assert_close(out, expected(case)[0])


@pytest.mark.parametrize("name", CASES)
def test_what_an_interval_sees_agrees_with_the_mask(name: str) -> None:
    """A tile that is left out sees nothing, one without a mask sees everything."""
    seen = CASES[name].visibility
    places = torch.arange(T)
    mask = seen.mask(places, places).expand(B, 1, T, T)
    answers = set()
    for rows in [(a, a + n) for n in (1, 3, 6) for a in range(0, T - n + 1, 3)]:
        for columns in [(a, a + n) for n in (1, 4) for a in range(0, T - n + 1, 2)]:
            part = mask[..., slice(*rows), slice(*columns)]
            answer = seen.sees(rows, columns)
            answers.add(answer)
            if answer is not None:
                assert bool((part == answer).all()), (rows, columns, answer)
            elif seen.document_ids is None and seen.real is None:
                assert part.any()
                assert not part.all()
    assert len(answers) > 1 or not seen.causal


def test_a_causal_ring_gives_every_rank_the_same_work() -> None:
    """Zig-zag: the first tokens see few keys and the last many; each rank has some of both."""
    for size in (2, 4, 8):
        chunk = 3
        work = []
        for rank in range(size):
            places = cut_tokens(torch.arange(2 * size * chunk), rank, size, dim=0)
            work.append(int((places + 1).sum()))
        assert len(set(work)) == 1


def test_cutting_and_joining_a_batch() -> None:
    whole = {
        "input_ids": torch.arange(2 * T).view(2, T),
        "labels": torch.arange(2 * T).view(2, T) + 1,
        "document_ids": DOCUMENTS,
        "sample_ids": torch.tensor([7, 8]),
        "sentence_labels": torch.tensor([0, 1]),
    }
    assert own_tokens(whole, 0, 1).keys() == whole.keys()
    parts = [own_tokens(whole, rank, 3) for rank in range(3)]
    for name in ("input_ids", "labels"):
        assert torch.equal(join_tokens([part[name] for part in parts]), whole[name])
    positions = [part["position_ids"] for part in parts]
    assert torch.equal(join_tokens(positions), torch.arange(T)[None])
    assert positions[1].tolist() == [[4, 5, 6, 7, 16, 17, 18, 19]]
    for rank, part in enumerate(parts):
        assert torch.equal(part["document_ids"], DOCUMENTS)
        assert part["sample_ids"].tolist() == [7, 8]
        # one rank speaks for the sentence: the one that has the first token
        assert part["sentence_labels"].tolist() == ([0, 1] if rank == 0 else [-100, -100])
