"""Compiled passes against torch's own operations in fp64: fp32 to 1e-5, bf16 to its rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megascale.errors import UserError
from megascale.kernels import library, passes
from megascale.kernels.library import LIBRARY, Library
from megascale.models import blockwise_attention
from megascale.models.attention import CoreAttention, Visibility
from megascale.models.dropout import keep_mask, sample_keys
from megascale.parallel import linear_cross_entropy as fused
from megascale.parallel.linear_cross_entropy import LossTerms, linear_cross_entropy

CPU = torch.device("cpu")
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", list(CLOSE), ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    """Everything goes to the compiled functions."""
    LIBRARY.enable("always", CPU)
    yield
    LIBRARY.enable("never", CPU)


def drawn(*shape: int, seed: int = 1, scale: float = 3.0) -> Tensor:
    """Values that bf16 holds exactly, so that both sides begin with the same."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).bfloat16().double()


def near(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Within the type's tolerance of the largest value."""
    assert found.dtype == dtype
    limit = CLOSE[dtype] * max(1.0, wanted.abs().max().item())
    assert (found.double() - wanted).abs().max().item() <= limit


@DTYPES
def test_probabilities_and_what_the_loss_needs(dtype: torch.dtype) -> None:
    logits, labels = drawn(70, 5003, scale=6), torch.arange(70) * 71
    found = logits.to(dtype)
    log_z, target, total = passes.probabilities_(found, labels)
    near(found, logits.softmax(-1), dtype)
    torch.testing.assert_close(log_z.double(), logits.logsumexp(-1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(target.double(), logits[torch.arange(70), labels])
    torch.testing.assert_close(total.double(), logits.sum(-1), rtol=1e-4, atol=1e-2)


@DTYPES
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_gelu_and_its_gradient(name: passes.GeluName, dtype: torch.dtype) -> None:
    values = torch.linspace(-12, 12, 50_001).bfloat16().double().requires_grad_()
    F.gelu(values, approximate="tanh" if name == "gelu_tanh" else "none").sum().backward()
    own = values.detach().to(dtype).requires_grad_()
    out = passes.gelu(own, name)
    out.sum().backward()
    assert own.grad is not None
    assert values.grad is not None
    reference = F.gelu(values.detach(), approximate="tanh" if name == "gelu_tanh" else "none")
    near(out.detach(), reference, dtype)
    near(own.grad, values.grad, dtype)


@DTYPES
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_gelu_of_what_is_not_finite(name: passes.GeluName, dtype: torch.dtype) -> None:
    """The same for one of 16 numbers and for one of the rest."""
    values = torch.zeros(17, dtype=dtype)
    for bad in (math.inf, math.nan):
        values[3] = values[16] = bad
        found = passes.gelu(values, name)
        torch.testing.assert_close(found[3], values[3], equal_nan=True)
        torch.testing.assert_close(found[16], values[16], equal_nan=True)
        assert not found[4:16].any()


@DTYPES
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_gelu_again_with_its_gradient(name: passes.GeluName, dtype: torch.dtype) -> None:
    x, grad = drawn(3, 33, 7).to(dtype).requires_grad_(), drawn(3, 33, 7, seed=2).to(dtype)
    wanted = passes.gelu(x, name)
    wanted.backward(grad)
    assert x.grad is not None
    assert torch.equal(passes.gelu_again_(x.detach(), grad, name), wanted)
    assert torch.equal(grad, x.grad)


MASKS = [
    # local shape, places along each dim of the whole, its shape
    ((7,), None, None),
    ((3, 5, 33), None, None),
    ((2, 4, 3), ([6, 2], [1, 3, 5, 7], [40, 8, 9]), (8, 9, 41)),
    ((2, 1), ([3, 3], [2**33]), (5, 2**40)),
    ((80, 150), None, None),  # enough for several threads
    ((3, 0), None, None),
]


@pytest.mark.parametrize(("shape", "places", "full"), MASKS)
def test_masks_of_dropout_are_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    places: tuple[list[int], ...] | None,
    full: tuple[int, ...] | None,
) -> None:
    compiled, calls = passes.keep_mask, []

    def counted(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return compiled(*arguments)

    monkeypatch.setattr(passes, "keep_mask", counted)
    keys = sample_keys(-3, torch.tensor([5, 2**62, 0, 1]))[::2]
    where = None if places is None else [torch.tensor(along) for along in places]
    for site, p in ((0, 0.5), (2**63 + 1, 0.1), (-7, 0.0)):
        assert LIBRARY.enable("auto", CPU) is None
        found = keep_mask(keys, site, shape, p, where, full)
        LIBRARY.enable("never", CPU)
        assert torch.equal(found, keep_mask(keys, site, shape, p, where, full))
        assert found.shape == (2, *shape)
    assert len(calls) == 3


def test_gelu_of_the_extremes() -> None:
    ends = torch.tensor([-1e4, 0.0, 1e30, math.inf, math.nan])
    for name in ("gelu", "gelu_tanh"):
        out = passes.gelu(ends, name)
        assert out[:4].tolist() == [pytest.approx(0), 0.0, pytest.approx(1e30), math.inf]
        assert out[4].isnan()


@pytest.mark.parametrize(
    "seen",
    [
        Visibility(),
        Visibility(window=3),
        Visibility(causal=False),
        Visibility(document_ids=torch.tensor([[0] * 9 + [1] * 14, [0] * 23])),
        Visibility(window=5, document_ids=torch.tensor([[0] * 9 + [1] * 14, [0] * 23])),
        Visibility(causal=False, real=torch.tensor([[1] * 23, [1] * 15 + [0] * 8])),
    ],
    ids=["causal", "window", "both_sides", "documents", "window_documents", "padding"],
)
@pytest.mark.parametrize("kv_heads", [4, 2])
@DTYPES
def test_attention_and_its_gradients(
    dtype: torch.dtype, kv_heads: int, seen: Visibility, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise_attention, "BLOCK", 5)
    core = CoreAttention(0.0, 1, kernel="blockwise")
    results = []
    for kind in (torch.float64, dtype):
        shapes = ((2, 4, 23, 8), (2, kv_heads, 23, 8), (2, kv_heads, 23, 8))
        values = [
            drawn(*shape, seed=seed, scale=1).to(kind).requires_grad_()
            for seed, shape in enumerate(shapes)
        ]
        out = core(*values, seen, None)
        out.backward(drawn(2, 4, 23, 8, seed=9, scale=1).to(kind))
        results.append([out.detach(), *(v.grad for v in values)])
    for wanted, found in zip(*results, strict=True):
        near(found, wanted, dtype)


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.05)])
@pytest.mark.parametrize("words", [301, 302])  # odd: not by compiled products
@DTYPES
def test_the_loss_of_a_head(
    dtype: torch.dtype, words: int, smoothing: float, z_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Library, "has_fast_products", property(lambda library: library.enabled))
    product = mock.Mock(wraps=fused.product_)
    monkeypatch.setattr(fused, "product_", product)
    monkeypatch.setattr(fused, "BLOCK_ELEMENTS", 301 * 8)
    monkeypatch.setattr(fused, "GROUP_BYTES", 301 * 8 * 16)
    monkeypatch.setattr(fused, "PART_ELEMENTS", 16 * 64)
    terms = LossTerms(words, label_smoothing=smoothing, z_loss=z_loss)
    labels = torch.arange(50) * 6
    labels[[3, 49]] = -100
    results = []
    for kind in (torch.float64, dtype):
        values = [
            drawn(*shape, seed=seed, scale=1).to(kind).requires_grad_()
            for seed, shape in enumerate([(50, 16), (words, 16), (words,)])
        ]
        loss = linear_cross_entropy(*values, labels, terms)
        loss.backward()
        results.append([v.grad for v in values])
        results[-1].append(loss.detach().to(kind))
    for wanted, found in zip(*results, strict=True):
        near(found, wanted, dtype)
    assert product.called == (words % 2 == 0 and dtype == torch.bfloat16)


def test_a_loss_that_is_not_finite_is_seen() -> None:
    hidden, weight = drawn(4, 8).float(), drawn(11, 8).float()
    weight[3, 2] = math.nan
    assert linear_cross_entropy(hidden, weight, None, torch.arange(4), LossTerms(11)).isnan()


def test_auto_takes_bf16_only_and_never_nothing() -> None:
    assert LIBRARY.enable("auto", CPU) is None
    kinds = (torch.bfloat16, torch.float32, torch.float64, torch.float16)
    assert [LIBRARY.takes(torch.ones(1, dtype=d)) for d in kinds] == [True, False, False, False]
    LIBRARY.enable("never", CPU)
    assert not LIBRARY.takes(torch.ones(1, dtype=torch.bfloat16))


def test_without_a_compiler_auto_says_so_and_torch_takes_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fresh = library.Library()
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    note = fresh.enable("auto", CPU, tmp_path)
    assert note is not None
    assert "no C++ compiler (looked for c++, g++, clang++)" in note
    assert "\n" not in note
    assert not fresh.dtypes
    with pytest.raises(UserError, match=r"compiled_kernels=always.*no C\+\+ compiler"):
        fresh.enable("always", CPU, tmp_path)


def test_a_compiler_that_fails_and_a_cache_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'kernels.cpp:1: error: no such option' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(library, "COMPILERS", (str(broken),))
    note = library.Library().enable("auto", CPU, tmp_path / "cache")
    assert note is not None
    assert "error: no such option" in note
    assert list((tmp_path / "cache").iterdir()) == []
    note = library.Library().enable("auto", CPU, broken / "below_a_file")
    assert note is not None
    assert "Not a directory" in note


def test_a_compiled_file_is_used_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library.load(tmp_path)
    (made,) = tmp_path.iterdir()
    monkeypatch.setattr(library, "_compile", lambda *_: pytest.fail("compiled again"))
    library.load(tmp_path)
    assert list(tmp_path.iterdir()) == [made]
