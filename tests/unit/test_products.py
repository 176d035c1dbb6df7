"""Compiled products of bf16 matrices against torch's in fp64, and what layers make of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megascale.kernels.library import LIBRARY, Library
from megascale.kernels.passes import product_, weight_gradient_
from megascale.models.activated_linear import ActivatedLinear, ActivatedProduct
from megascale.models.gradient_sink import attach_sink, detach_sink
from megascale.models.linear import Linear
from megascale.models.mlp import MLP
from megascale.parallel import gradient_reducer
from megascale.parallel.gradient_reducer import GradientReducer, ReducerSink

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The products are taken, also by a processor on which they are slow."""
    monkeypatch.setattr(Library, "has_fast_products", property(lambda library: library.enabled))
    assert LIBRARY.enable("auto", CPU) is None
    yield
    LIBRARY.enable("never", CPU)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def drawn(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).bfloat16()


def within(found: Tensor, wanted: Tensor, limit: float) -> None:
    """Within `limit` of the largest value; NaN never is."""
    worst = (found.double() - wanted).abs().max().item()
    assert worst <= limit * wanted.abs().max().item(), worst


SHAPES = [(1, 1, 2), (3, 17, 34), (64, 64, 64), (130, 200, 70), (257, 63, 6002), (5, 300, 32)]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_product(rows: int, columns: int, depth: int, turned: bool, threads: int) -> None:
    # parts of wider matrices, whose rows are not next to one another in memory
    a = drawn(rows, depth + 6)[:, :depth]
    b = drawn(columns, depth + 3, seed=2)[:, :depth].t()
    if not turned:
        b = drawn(depth, columns + 5, seed=3)[:, :columns]
    wanted = a.double() @ b.double()
    room = torch.full((rows, columns + 8), 7.0)
    within(product_(a, b, room[:, :columns]), wanted, 1e-5)
    within(product_(a, b, room[:, :columns], add=True), 2 * wanted, 1e-5)
    narrow = torch.full((rows, columns + 1), 7.0, dtype=torch.bfloat16)
    within(product_(a, b, narrow[:, :columns]), wanted, 2.0**-8)
    assert (room[:, columns:] == 7).all()
    assert (narrow[:, columns:] == 7).all()


@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs"),
    [(1, 1, 1), (33, 5, 70), (64, 64, 128), (100, 130, 48), (4100, 65, 17), (2049, 3, 64)],
)
def test_weight_gradient(tokens: int, outputs: int, inputs: int, threads: int) -> None:
    grad = drawn(tokens, outputs + 3)[:, :outputs]
    x = drawn(tokens, inputs + 1, seed=2)[:, :inputs]
    wanted, wanted_sums = grad.double().t() @ x.double(), grad.double().sum(0)
    total, sums = torch.full((outputs, inputs), 7.0), torch.full((outputs,), 7.0)
    weight_gradient_(grad, x, total, False, sums, False)
    within(total, wanted, 1e-5)
    within(sums, wanted_sums, 1e-5)
    weight_gradient_(grad, x, total, True, sums, True)
    within(total, 2 * wanted, 1e-5)
    within(sums, 2 * wanted_sums, 1e-5)
    weight_gradient_(grad.t().contiguous().t(), x, total, False, None, False)
    within(total, wanted, 1e-5)


def test_weight_gradient_of_no_token() -> None:
    total, sums = torch.full((4, 3), 7.0), torch.full((4,), 7.0)
    nothing = torch.empty(0, 4).bfloat16(), torch.empty(0, 3).bfloat16()
    weight_gradient_(*nothing, total, True, sums, True)
    assert (total == 7).all()
    assert (sums == 7).all()
    weight_gradient_(*nothing, total, False, sums, False)
    assert not total.any()
    assert not sums.any()


def test_nan_and_infinity_stay() -> None:
    for bad in (float("nan"), float("inf")):
        grad, x = drawn(40, 70), drawn(40, 66, seed=2)
        grad[7, 5] = bad
        total, sums = torch.empty(70, 66), torch.empty(70)
        weight_gradient_(grad, x, total, False, sums, False)
        assert not total[5].isfinite().any()
        assert not sums[5].isfinite()
        total[5], sums[5] = 0.0, 0.0
        assert total.isfinite().all()
        assert sums.isfinite().all()
        out = product_(grad, drawn(70, 3, seed=3), torch.empty(40, 3))
        assert not out[7].isfinite().any()
        assert out[:7].isfinite().all()


def small(*shape: int, seed: int) -> Tensor:
    """Numbers whose products and sums are exact in bf16 and fp32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).bfloat16()


def main_gradients(layer: nn.Module, inputs: list[Tensor], sinks: bool) -> dict[str, Tensor]:
    """Of the sum of the layer's outputs, each times a number of its own, in a few micro-batches."""
    reducer = GradientReducer(list(layer.parameters()), None)
    if sinks:
        for param in layer.parameters():
            attach_sink(param, ReducerSink(reducer, param))
    for index, x in enumerate(inputs):
        reducer.begin_backward(last=index == len(inputs) - 1)
        out = layer(x)
        (out * small(*out.shape, seed=9)).sum().backward()
    reducer.finish()
    assert all(p.grad is None for p in layer.parameters())
    found = {n: reducer.main_gradient(p).clone() for n, p in layer.named_parameters()}
    reducer.close()
    return found


def activated(bias: bool) -> ActivatedLinear:
    product = ActivatedProduct(torch.relu, "always")
    return ActivatedLinear(20, 36, bias, product).bfloat16()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "activated"])
def test_layers_add_to_sinks_what_autograd_hands_on(kind: str, bias: bool) -> None:
    inputs = [small(2, 10, 20, seed=s).requires_grad_() for s in (1, 2, 3)]
    make = activated if kind == "activated" else lambda b: Linear(20, 36, b).bfloat16()
    layer = make(bias)
    with torch.no_grad():
        layer.weight.copy_(small(36, 20, seed=4))
    found = main_gradients(layer, inputs, sinks=True)
    of_inputs = [x.grad for x in inputs]
    other, plain = make(bias), [x.detach().requires_grad_() for x in inputs]
    other.load_state_dict(layer.state_dict())
    wanted = main_gradients(other, plain, sinks=False)
    assert found.keys() == wanted.keys() == ({"weight", "bias"} if bias else {"weight"})
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 3
        assert torch.equal(found[name], gradient), name
    for one, x in zip(of_inputs, plain, strict=True):
        assert one is not None
        assert x.grad is not None
        assert torch.equal(one, x.grad)


def test_layers_that_run_twice_and_again() -> None:
    """A layer that is used twice, and is run again for the backward."""
    found = []
    for sinks in (True, False):
        layer = Linear(20, 20).bfloat16()
        with torch.no_grad():
            for seed, param in enumerate(layer.parameters()):
                param.copy_(small(*param.shape, seed=seed))

        class Twice(nn.Module):
            def __init__(self, inner: Linear) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Tensor) -> Tensor:
                again = checkpoint(self.inner, x, use_reentrant=False)
                return again + self.inner(torch.sign(x))

        inputs = [small(4, 20, seed=s).requires_grad_() for s in (1, 2)]
        found.append(main_gradients(Twice(layer), inputs, sinks))
    for name, wanted in found[1].items():
        assert wanted.any()
        assert torch.equal(found[0][name], wanted), name


def test_what_lost_its_sink_has_a_gradient_of_its_own() -> None:
    layer = Linear(4, 4).bfloat16()
    reducer = GradientReducer(list(layer.parameters()), None)
    attach_sink(layer.weight, ReducerSink(reducer, layer.weight))
    detach_sink(layer.weight)
    detach_sink(layer.weight)
    reducer.close()
    layer(small(2, 4, seed=1)).sum().backward()
    assert layer.weight.grad is not None


def test_sums_are_not_rounded() -> None:
    """1 + 1/512 is no bf16 number: autograd's own gradient would lose the second token."""
    layer = Linear(1, 1).bfloat16()
    found = main_gradients(layer, [torch.tensor([[1.0], [2.0**-9]]).bfloat16()], sinks=True)
    factor = small(2, 1, seed=9).float()
    assert found["weight"].item() == (factor * torch.tensor([[1.0], [2.0**-9]])).sum().item()


def test_buckets_are_reduced_beside_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that went to a sink counts for its bucket as one that autograd handed on."""
    order: list[str] = []

    class Work:
        def wait(self) -> None:
            order.append("wait")

    sent: list[Tensor] = []

    def all_reduce(buffer: Tensor, group: object, async_op: bool) -> Work:
        assert async_op
        order.append("reduce")
        sent.append(buffer.clone())
        return Work()

    monkeypatch.setattr(gradient_reducer, "BUCKET_ELEMENTS", 1000)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    model = nn.Sequential(*(MLP(16, 32, "gelu_tanh", bias=True) for _ in range(3))).bfloat16()
    reducer = GradientReducer(list(model.parameters()), object())  # type: ignore[arg-type]
    for part in model.modules():
        if isinstance(part, Linear):
            for param in part.parameters():
                attach_sink(param, ReducerSink(reducer, param))
    for _ in range(2):
        x = drawn(4, 16).requires_grad_()
        x.register_hook(lambda _: order.append("first layer"))
        reducer.begin_backward(last=False)
        model(x).sum().backward()
        assert order == ["first layer"]
        reducer.begin_backward(last=True)
        model(x).sum().backward()
        assert order.index("first layer", 1) > 3  # buckets of the layers behind it are on their way
        before = len(order)
        reducer.finish()
        assert set(order[before:]) <= {"wait", "reduce"}
        assert order.count("reduce") == order.count("wait")
        whole = [reducer.main_gradient(p).flatten() for p in reversed(list(model.parameters()))]
        assert torch.equal(torch.cat(sent), torch.cat(whole))  # nothing was sent too early
        order.clear()
        sent.clear()
        reducer.zero()
    reducer.close()
