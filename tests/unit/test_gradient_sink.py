"""Gradients that are added in place, against those that autograd hands on; in fp64, to 1e-12."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from megascale.models.embedding import TokenEmbedding
from megascale.models.gradient_sink import attach_sink
from megascale.parallel.gradient_reducer import GradientReducer, ReducerSink
from megascale.parallel.linear_cross_entropy import LossTerms, linear_cross_entropy

V, D, N = 29, 6, 40


class Model(nn.Module):
    """A token's own row predicts the next: the table is looked up, and is the head."""

    def __init__(self, tied: bool, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = TokenEmbedding(V, D, dtype=torch.float64)
        self.inner = nn.Linear(D, D, dtype=torch.float64)
        self.head = None if tied else nn.Parameter(torch.randn(V, D, dtype=torch.float64))
        self.fused = fused

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        weight = self.tokens.weight if self.head is None else self.head
        hidden = self.inner(self.tokens(ids))
        if self.fused:
            return linear_cross_entropy(hidden, weight, None, labels, LossTerms(V))
        logits = hidden @ weight.t()
        return nn.functional.cross_entropy(logits, labels, reduction="sum")


def gradients(
    tied: bool, fused: bool, sink: bool, steps: int, freeze: bool = False
) -> list[dict[str, Tensor]]:
    """The main gradients of each step, of two micro-batches."""
    model = Model(tied, fused)
    model.tokens.weight.requires_grad_(not freeze)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    reducer = GradientReducer(list(params.values()), None)
    if sink and not freeze:
        attach_sink(model.tokens.weight, ReducerSink(reducer, model.tokens.weight))
    found = []
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        for last in (False, True):
            ids = torch.randint(0, V - 3, (N + 1,), generator=generator)
            reducer.begin_backward(last=last)
            (model(ids[:-1], ids[1:]) * 0.37).backward()
        reducer.finish()
        found.append({n: reducer.main_gradient(p).clone() for n, p in params.items()})
        reducer.zero()
    reducer.close()
    return found


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_sums_are_those_of_autograd(tied: bool, fused: bool) -> None:
    plain, sunk = (gradients(tied, fused, sink, steps=3) for sink in (False, True))
    for before, after in zip(plain, sunk, strict=True):
        assert before.keys() == after.keys()
        for name, wanted in before.items():
            assert wanted.abs().max() > 0.1
            torch.testing.assert_close(after[name], wanted, rtol=1e-12, atol=1e-12)


def test_a_step_without_a_gradient_has_zeros() -> None:
    model = Model(tied=True, fused=True)
    reducer = GradientReducer(list(model.parameters()), None)
    weight = model.tokens.weight
    sink = ReducerSink(reducer, weight)
    place = sink.claim()
    assert place is not None
    assert sink.claim() is None
    place.fill_(7.0)
    reducer.zero()
    assert torch.equal(sink.numbers(), torch.zeros(V, D, dtype=torch.float64))


def test_bf16_sums_in_fp32() -> None:
    table = TokenEmbedding(3, 2, dtype=torch.bfloat16)
    reducer = GradientReducer([table.weight], None)
    attach_sink(table.weight, ReducerSink(reducer, table.weight))
    reducer.begin_backward(last=True)
    # 1 + 1/512 is no bf16 number: autograd's own sum would lose the second part
    (table(torch.tensor([1])) * 1.0 + table(torch.tensor([1])) * 2.0**-9).sum().backward()
    reducer.finish()
    assert table.weight.grad is None
    assert reducer.main_gradient(table.weight)[1].tolist() == [1 + 2.0**-9] * 2
    assert reducer.main_gradient(table.weight)[0].tolist() == [0, 0]


@pytest.mark.parametrize(("dtype", "stays"), [(torch.bfloat16, False), (torch.float32, True)])
def test_main_gradients_take_memory_within_a_step_only(dtype: torch.dtype, stays: bool) -> None:
    """Those of fp32 weights are what autograd adds to, and stay."""
    inner = nn.Linear(D, D, dtype=dtype)
    reducer = GradientReducer(list(inner.parameters()), None)
    for _ in range(2):
        reducer.begin_backward(last=True)
        inner(torch.ones(N, D, dtype=dtype)).sum().backward()
        reducer.finish()
        assert torch.equal(reducer.main_gradient(inner.bias), torch.full((D,), float(N)))
        view = weakref.ref(reducer.main_gradient(inner.weight))
        reducer.zero()
        assert (view() is not None) == stays
    assert not reducer.main_gradient(inner.weight).any()
    reducer.close()
