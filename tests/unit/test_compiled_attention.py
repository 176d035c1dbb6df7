"""The compiled attention of bf16 heads against the scores written out, in fp64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megascale.kernels.library import LIBRARY, Library
from megascale.models import compiled_attention
from megascale.models.attention import CoreAttention, Visibility

CPU = torch.device("cpu")
ROUNDING = 4e-3  # of a whole tensor: half a unit of bf16 is 2e-3 of a number


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel is taken, also by a processor on which it is slow, and for a single head."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(Library, "has_fast_products", property(lambda library: library.enabled))
    assert LIBRARY.enable("auto", CPU) is None
    yield
    LIBRARY.enable("never", CPU)
    torch.set_num_threads(threads)


def drawn(samples: int, heads: int, length: int, width: int, seed: int) -> Tensor:
    """(B, H, T, K), as a projection leaves it: heads are not the outer dimension in memory."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(samples, length, heads, width, generator=generator)
    return (1.5 * numbers).bfloat16().transpose(1, 2)


def written_out(query: Tensor, key: Tensor, value: Tensor, seen: Visibility) -> Tensor:
    groups, places = query.shape[1] // key.shape[1], torch.arange(query.shape[2])
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return scores.masked_fill(~seen.mask(places, places), -math.inf).softmax(-1) @ value


def documents(length: int) -> Tensor:
    """(2, T): one of a few documents, and one of a single one."""
    ids = (torch.arange(length) * 4 // length)[None].repeat(2, 1)
    ids[1] = 7
    return ids


def real(length: int) -> Tensor:
    """(2, T): the end of the second sample is padding."""
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, (length + 1) // 2 :] = 0
    return mask


def visibility(kind: str, length: int) -> Visibility:
    return {
        "causal": Visibility(),
        "window": Visibility(window=9),
        "both_sides": Visibility(causal=False),
        "window_both_sides": Visibility(causal=False, window=70),
        "documents": Visibility(document_ids=documents(length)),
        "window_documents": Visibility(window=33, document_ids=documents(length)),
        "documents_both_sides": Visibility(causal=False, document_ids=documents(length)),
        "padding": Visibility(causal=False, real=real(length)),
    }[kind]


KINDS = (
    *("causal", "window", "both_sides", "window_both_sides", "documents", "window_documents"),
    *("documents_both_sides", "padding"),
)


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "width"),
    [
        (2, 2, 64, 64),
        (4, 2, 200, 64),
        (3, 1, 131, 80),
        (2, 2, 65, 16),
        (2, 1, 63, 128),
        (1, 1, 9, 32),
    ],
)
def test_output_and_gradients(
    kind: str, heads: int, kv_heads: int, length: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(2, h, length, width) for h in (heads, kv_heads, kv_heads)]
    values = [drawn(*shape, seed).requires_grad_() for seed, shape in enumerate(shapes)]
    exact = [v.detach().double().requires_grad_() for v in values]
    seen = visibility(kind, length)
    monkeypatch.setattr("megascale.models.attention.blockwise_attention", None)
    found = CoreAttention(0.0, 1)(*values, seen, None)
    wanted = written_out(*exact, seen)
    assert found.dtype == torch.bfloat16
    assert error(found, wanted) < ROUNDING
    upstream = drawn(2, heads, length, width, 9)
    # of two or three keys the weights' gradient less its mean is next to nothing
    limit = ROUNDING if length > 9 else 3 * ROUNDING
    grads = torch.autograd.grad(wanted, exact, upstream.double())
    for ours, theirs in zip(torch.autograd.grad(found, values, upstream), grads, strict=True):
        assert error(ours, theirs) < limit


def test_it_is_nearer_than_the_blockwise_one() -> None:
    values = [drawn(2, 4, 150, 64, seed) for seed in range(3)]
    wanted = written_out(*(v.double() for v in values), Visibility())
    core = CoreAttention(0.0, 1)
    compiled = error(core(*values, Visibility(), None), wanted)
    LIBRARY.enable("never", CPU)
    assert compiled < 0.9 * error(core(*values, Visibility(), None), wanted)


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_depend_on_nothing_else(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on threads, on other samples and heads, or on how tensors lie in memory."""
    monkeypatch.setattr("megascale.models.attention.blockwise_attention", None)
    values = [drawn(3, 4, 100, 32, seed) for seed in range(4)]
    torch.set_num_threads(threads)
    whole = attended(*values)
    torch.set_num_threads(1)
    for sample, head in itertools.product(range(3), range(4)):
        one = (slice(sample, sample + 1), slice(head, head + 1))
        alone = attended(*(v[one].contiguous() for v in values))
        for found, part in zip(whole, alone, strict=True):
            assert torch.equal(found[one], part)


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    upstream: Tensor,
    seen: Visibility = Visibility(),
) -> list[Tensor]:
    """Output and gradients."""
    inputs = [t.detach().requires_grad_() for t in (query, key, value)]
    found = CoreAttention(0.0, 1)(*inputs, seen, None)
    return [found.detach(), *torch.autograd.grad(found, inputs, upstream)]


@pytest.mark.parametrize(
    ("place", "bad"), [(0, math.nan), (1, math.nan), (2, math.nan), (0, math.inf), (2, math.inf)]
)
def test_what_is_not_finite_is_seen(place: int, bad: float) -> None:
    values = [drawn(1, 2, 70, 16, seed) for seed in range(3)]
    values[place][0, 1, 66, 3] = bad
    out = CoreAttention(0.0, 1)(*values, Visibility(), None)
    assert not out[0, 1, 66].isfinite().all()
    assert out[0, 0].isfinite().all()
    assert out[0, 1, :64].isfinite().all()


@pytest.mark.parametrize("size", [1e6, 1e12, 1e18])
def test_weights_of_huge_scores(size: float) -> None:
    """The keys are the same in pairs, so that most weights are a half."""
    query, key, value = (drawn(1, 1, 64, 16, seed) for seed in range(3))
    query, key = query * size, key[:, :, :32].repeat_interleave(2, dim=2)
    exact = [t.double().requires_grad_() for t in (query, key, value)]
    seen, upstream = Visibility(causal=False), drawn(1, 1, 64, 16, 9)
    found = attended(query, key, value, upstream, seen)
    wanted = written_out(*exact, seen)
    assert error(found[0], wanted) < ROUNDING
    (of_value,) = torch.autograd.grad(wanted, exact[2:], upstream.double())
    assert error(found[3], of_value) < ROUNDING
    assert all(t.isfinite().all() for t in found)


def test_what_is_not_seen_is_not_added_however_low_the_rest_is() -> None:
    query = torch.full((1, 1, 4, 16), 1e16, dtype=torch.bfloat16)
    value = drawn(1, 1, 4, 16, 1)
    for row in range(4):
        found = CoreAttention(0.0, 1)(query, -query, value, Visibility(), None)[0, 0, row]
        assert error(found, value[0, 0, : row + 1].double().mean(0)) < ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_intervals_are_the_mask(kind: str) -> None:
    for length in (1, 5, 40):
        seen, places = visibility(kind, length), torch.arange(length)
        found = seen.intervals(length)
        assert found is not None
        assert found.dtype == torch.int32
        first, last = found[:, 0, :, None], found[:, 1, :, None]
        mask = (first <= places) & (places < last)
        assert torch.equal(mask, seen.mask(places, places)[:, 0].expand_as(mask))


@pytest.mark.parametrize(
    "seen",
    [
        Visibility(document_ids=torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])),
        Visibility(causal=False, real=torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])),
        Visibility(causal=False, real=torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])),
        Visibility(causal=True, real=torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])),
        Visibility(document_ids=torch.tensor([[0, 0, 1, 1]]), real=torch.tensor([[1, 1, 1, 0]])),
    ],
    ids=["in_pieces", "hole", "nothing", "begins_with_padding", "both"],
)
def test_what_is_no_interval_is_computed_by_blocks(seen: Visibility) -> None:
    assert seen.intervals(4) is None
    values = [drawn(2, 2, 4, 16, seed) for seed in range(3)]
    assert compiled_attention.compiled_attention(*values, seen, 0.25) is None
    places = torch.arange(4)
    mask = seen.mask(places, places).expand(2, 1, 4, 4)
    sees = mask.any(-1)[:, 0]  # rows of the others mean nothing
    found = CoreAttention(0.0, 1)(*values, seen, None).transpose(1, 2)
    wanted = written_out(*(v.double() for v in values), seen).transpose(1, 2)
    assert error(found[sees], wanted[sees]) < 2 * ROUNDING


def test_what_it_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*values: Tensor) -> bool:
        return compiled_attention.compiled_attention(*values, Visibility(), 0.1) is not None

    values = [drawn(2, 2, 8, 16, seed) for seed in range(3)]
    assert taken(*values)
    assert not taken(*(v.float() for v in values))
    assert not taken(*(v[..., :12] for v in values))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert not taken(*values)
    monkeypatch.undo()
    monkeypatch.setattr(Library, "has_fast_products", property(lambda library: False))
    assert not taken(*values)
