"""Attention by blocks against the scores written out whole, in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from megascale.models import blockwise_attention
from megascale.models.attention import CoreAttention, Visibility
from megascale.models.dropout import sample_keys

B, T, K = 3, 23, 4
Tensors = list[torch.Tensor]


def written_out(
    core: CoreAttention, values: Tensors, seen: Visibility, keys: torch.Tensor
) -> torch.Tensor:
    query, key, value = values
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(core.query_scaling or K)
    if core.softcap is not None:
        scores = core.softcap * torch.tanh(scores / core.softcap)
    places = torch.arange(T)
    scores = scores.masked_fill(~seen.mask(places, places), -math.inf)
    return core.dropout(scores.softmax(dim=-1), keys) @ value


def visibilities() -> dict[str, Visibility]:
    documents = torch.randint(0, 4, (B, T), generator=torch.Generator().manual_seed(1)).sort()[0]
    real = torch.ones(B, T, dtype=torch.long)
    real[1, 15:] = 0
    return {
        "causal": Visibility(),
        "window": Visibility(window=3),
        "long_window": Visibility(window=9),
        "documents": Visibility(document_ids=documents),
        "window_documents": Visibility(window=5, document_ids=documents),
        "both_sides": Visibility(causal=False),
        "padding": Visibility(causal=False, real=real),
    }


def values(heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> Tensors:
    generator = torch.Generator().manual_seed(heads)
    shapes = [(B, T, h, K) for h in (heads, kv_heads, kv_heads)]
    drawn = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]
    # as a projection leaves them: heads are not the outer dimension in memory
    return [(3 * t).transpose(1, 2).to(dtype).requires_grad_() for t in drawn]


@pytest.mark.parametrize("seen", visibilities())
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(
    ("block", "scores"),
    [(5, 10**6), (5, 60), (8, 400), (64, 1)],
    ids=["all_heads", "some_heads", "some_samples", "one_block"],
)
def test_output_and_gradients(
    seen: str, heads: int, kv_heads: int, block: int, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise_attention, "BLOCK", block)
    monkeypatch.setattr(blockwise_attention, "SCORES", scores)
    keys = sample_keys(3, torch.arange(B) + 10)
    upstream = torch.randn(B, heads, T, K, dtype=torch.float64)
    for dropout, softcap, scaling in ((0.0, None, None), (0.3, None, 7.0), (0.3, 1.3, None)):
        core = CoreAttention(dropout, 7, softcap, scaling, "blockwise").train()
        inputs = values(heads, kv_heads)
        visibility = visibilities()[seen]
        found = core(*inputs, visibility, keys)
        expected = written_out(core, inputs, visibility, keys)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
        wanted = torch.autograd.grad(expected, inputs, upstream)
        for ours, theirs in zip(torch.autograd.grad(found, inputs, upstream), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seen", visibilities())
def test_the_kernels_agree(seen: str) -> None:
    inputs = values(6, 2)
    one, other = (
        CoreAttention(0.0, 0, kernel=kernel)(*inputs, visibilities()[seen], None)
        for kernel in ("sdpa", "blockwise")
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_keys_after_a_block_are_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise_attention, "BLOCK", 8)
    multiplied: list[tuple[int, int]] = []
    real = torch.baddbmm

    def counted(start: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, **rest: float):
        multiplied.append((rows.shape[1], columns.shape[2]))
        return real(start, rows, columns, **rest)

    monkeypatch.setattr(torch, "baddbmm", counted)
    for seen, expected in (
        (Visibility(), [(8, 8), (8, 16), (7, 23)]),
        (Visibility(window=3), [(8, 8), (8, 10), (7, 9)]),
        (Visibility(causal=False), [(8, 23), (8, 23), (7, 23)]),
    ):
        multiplied.clear()
        CoreAttention(0.0, 0, kernel="blockwise")(*values(2, 2), seen, None)
        assert multiplied == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_torch_s_kernel(dtype: torch.dtype) -> None:
    exact = values(4, 4)
    expected = written_out(CoreAttention(0.0, 0), exact, Visibility(), torch.zeros(B))

    def error(kernel: str) -> float:
        core = CoreAttention(0.0, 0, kernel=kernel)  # type: ignore[arg-type]
        found = core(*values(4, 4, dtype), Visibility(), None)
        assert found.dtype == dtype
        return ((found.double() - expected).norm() / expected.norm()).item()

    # the scores are rounded once more than inside of the fused kernel
    assert error("blockwise") < 3 * error("sdpa")


def test_auto_is_blockwise_in_half_precision_on_cpu() -> None:
    core = CoreAttention(0.0, 0)
    names = {}
    for dtype in (torch.float32, torch.bfloat16):
        found = core(*values(2, 2, dtype), Visibility(), None)
        names[dtype] = type(found.grad_fn).__name__
    assert "Blockwise" in names[torch.bfloat16]
    assert "Blockwise" not in names[torch.float32]
