"""Every update rule against its equations, written out once more in numpy or from its parts."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from megascale.models.gpt import GPT, GPTConfig
from megascale.optim.factory import (
    COUNTS_STEPS,
    STATE_KEYS,
    OptimizerSettings,
    build_optimizer,
    state_shapes,
)
from megascale.optim.param_groups import parameter_groups

LR, B1, B2, EPS, MOMENTUM, DECAY = 0.1, 0.8, 0.9, 1e-3, 0.7, 0.2
STEPS = 4
NAMES = {"layers.0.matrix": (5, 3), "embedding.table": (4, 6), "norm.weight": (7,)}
Values = dict[str, np.ndarray]


def _gradients() -> list[Values]:
    rng = np.random.default_rng(3)
    return [{name: rng.normal(size=size) for name, size in NAMES.items()} for _ in range(STEPS)]


def _start() -> Values:
    rng = np.random.default_rng(4)
    return {name: rng.normal(size=size) for name, size in NAMES.items()}


def _train(name: str) -> tuple[Values, torch.optim.Optimizer, dict[str, nn.Parameter]]:
    params = {n: nn.Parameter(torch.tensor(w, dtype=torch.float64)) for n, w in _start().items()}
    groups = parameter_groups(params.items(), DECAY, apart=name == "muon")
    optimizer = build_optimizer(OptimizerSettings(name, LR, (B1, B2), EPS, MOMENTUM), groups)
    for gradients in _gradients():
        for parameter, gradient in zip(params.values(), gradients.values(), strict=True):
            parameter.grad = torch.tensor(gradient)
        optimizer.step()
    return {n: p.detach().numpy() for n, p in params.items()}, optimizer, params


def _lion(w: np.ndarray, gradients: list[np.ndarray], decay: float) -> np.ndarray:
    m = np.zeros_like(w)
    for g in gradients:
        update = np.sign(B1 * m + (1 - B1) * g)
        w = w - LR * (update + decay * w)
        m = B2 * m + (1 - B2) * g
    return w


def _lamb(w: np.ndarray, gradients: list[np.ndarray], decay: float) -> np.ndarray:
    m = v = np.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g
        u = (m / (1 - B1**t)) / (np.sqrt(v / (1 - B2**t)) + EPS) + decay * w
        ratio = np.linalg.norm(w) / np.linalg.norm(u) if w.ndim == 2 else 1.0
        w = w - LR * ratio * u
    return w


def _adafactor(w: np.ndarray, gradients: list[np.ndarray], decay: float) -> np.ndarray:
    tiny = np.finfo(np.float64).eps
    rows, columns, whole = 0.0, 0.0, np.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        beta = 1 - t**-0.8
        alpha = max(1e-3, np.sqrt((w * w).mean())) * min(LR, 1 / math.sqrt(t))
        w = w * (1 - LR * decay)
        if w.ndim == 2:
            rows = beta * rows + (1 - beta) * (g * g).mean(1, keepdims=True)
            columns = beta * columns + (1 - beta) * (g * g).mean(0, keepdims=True)
            variance = rows @ columns / max(rows.mean(), tiny)
        else:
            variance = whole = beta * whole + (1 - beta) * g * g
        u = g / np.sqrt(np.maximum(variance, tiny**2))
        w = w - alpha * u / max(1.0, np.sqrt((u * u).mean()))
    return w


@pytest.mark.parametrize(
    ("name", "rule"), [("lion", _lion), ("lamb", _lamb), ("adafactor", _adafactor)]
)
def test_rule_by_hand(
    name: str, rule: Callable[[np.ndarray, list[np.ndarray], float], np.ndarray]
) -> None:
    found, *_ = _train(name)
    for key, weight in _start().items():
        gradients = [step[key] for step in _gradients()]
        expected = rule(weight, gradients, DECAY if weight.ndim == 2 else 0.0)
        np.testing.assert_allclose(found[key], expected, rtol=1e-6, err_msg=key)
        assert np.abs(found[key] - weight).max() > 1e-3


def test_muon_orthogonalises_layers_and_leaves_the_rest_to_adamw() -> None:
    found, _, _ = _train("muon")
    adamw, _, _ = _train("adamw")
    for key in ("embedding.table", "norm.weight"):
        np.testing.assert_array_equal(found[key], adamw[key])
    # One step, by the singular vectors: Newton-Schulz maps singular values to 1 within 0.3.
    weight = nn.Parameter(torch.zeros(5, 3))
    groups = parameter_groups([("layers.0.m", weight)], DECAY, apart=True)
    optimizer = build_optimizer(OptimizerSettings("muon", LR, (B1, B2), EPS, 0.0), groups)
    weight.grad = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(weight.grad, full_matrices=False)
    optimizer.step()
    scaled = weight.detach() / (-LR * 0.2 * math.sqrt(5))
    values = (left.T @ scaled @ right.T).diagonal()
    assert ((values > 0.6) & (values < 1.3)).all(), values
    assert torch.linalg.norm(left.T @ scaled @ right.T - values.diag()) < 0.05


def test_muon_follows_the_schedule_in_both_parts() -> None:
    params = {n: nn.Parameter(torch.tensor(w)) for n, w in _start().items()}
    groups = parameter_groups(params.items(), 0.0, apart=True)
    optimizer = build_optimizer(OptimizerSettings("muon", LR, (B1, B2), EPS, MOMENTUM), groups)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in params.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in params.items():
        np.testing.assert_array_equal(parameter.detach().numpy(), _start()[name])


def test_states_have_the_declared_names_and_shapes() -> None:
    model = GPT(
        GPTConfig(
            vocab_size=11,
            num_layers=1,
            hidden_size=8,
            num_attention_heads=2,
            num_kv_heads=2,
            ffn_hidden_size=12,
            seq_length=6,
        )
    )
    named = dict(model.named_parameters())
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    for optimizer_name in STATE_KEYS:
        groups = parameter_groups(named.items(), 0.1, apart=optimizer_name == "muon")
        settings = OptimizerSettings(optimizer_name, 1e-3, (B1, B2), EPS, MOMENTUM)
        optimizer = build_optimizer(settings, groups)
        optimizer.step()
        seen: set[str] = set()
        for name, parameter in named.items():
            state = dict(optimizer.state[parameter])
            counted = state.pop("step", None)
            shapes = {key: tuple(value.shape) for key, value in state.items()}
            assert shapes == state_shapes(optimizer_name, name, tuple(parameter.shape))
            assert counted is None or optimizer_name in COUNTS_STEPS
            seen |= set(state)
        assert seen == set(STATE_KEYS[optimizer_name])
