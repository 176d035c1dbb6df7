from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from megascale.errors import UserError
from megascale.models.gpt import GPT, GPTConfig
from megascale.optim.factory import STATE_KEYS, OptimizerSettings, build_optimizer
from megascale.optim.param_groups import is_hidden_matrix, parameter_groups

CONFIG = GPTConfig(
    vocab_size=11,
    num_layers=2,
    hidden_size=8,
    num_attention_heads=2,
    num_kv_heads=2,
    ffn_hidden_size=12,
    seq_length=6,
)


def build(name: str, groups: list[dict[str, Any]], momentum: float = 0.9) -> torch.optim.Optimizer:
    return build_optimizer(OptimizerSettings(name, 0.1, (0.8, 0.9), 0.5, momentum), groups)


def test_groups_are_complete_disjoint_and_in_order() -> None:
    model = GPT(CONFIG)
    named = dict(model.named_parameters())
    decaying, plain = parameter_groups(model.named_parameters(), 0.1)
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    for group in (decaying, plain):
        assert [id(named[name]) for name in group["names"]] == [id(p) for p in group["params"]]
        assert group["names"] == [name for name in named if name in set(group["names"])]
    assert sorted(decaying["names"] + plain["names"]) == sorted(named)
    assert all(name.endswith("bias") or "norm" in name for name in plain["names"])
    assert not any(name.endswith("bias") or "norm" in name for name in decaying["names"])


def test_empty_groups_frozen_and_tied_parameters() -> None:
    weight, frozen = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3, 3), False)
    groups = parameter_groups([("a.weight", weight), ("b", frozen), ("head", weight)], 0.1)
    assert [group["names"] for group in groups] == [["a.weight"]]
    assert parameter_groups([("bias", nn.Parameter(torch.ones(2)))], 0.1)[0]["names"] == ["bias"]
    assert parameter_groups([], 0.1) == []


def test_adamw_first_update_by_hand_and_states_by_name() -> None:
    matrix, bias = nn.Parameter(torch.full((2, 2), 3.0)), nn.Parameter(torch.full((2,), 3.0))
    optimizer = build("adamw", parameter_groups([("m", matrix), ("b", bias)], 0.5))
    matrix.grad, bias.grad = torch.full((2, 2), 0.5), torch.full((2,), -0.5)
    optimizer.step()
    # The first bias-corrected step is lr * grad / (|grad| + eps); the matrix alone decays.
    torch.testing.assert_close(matrix.data, torch.full((2, 2), 3.0 * (1 - 0.1 * 0.5) - 0.05))
    torch.testing.assert_close(bias.data, torch.full((2,), 3.0 + 0.05))
    state = optimizer.state[matrix]
    assert set(state) == {*STATE_KEYS["adamw"], "step"}
    torch.testing.assert_close(state["exp_avg"], torch.full((2, 2), 0.5 * 0.2))
    torch.testing.assert_close(state["exp_avg_sq"], torch.full((2, 2), 0.25 * 0.1))
    assert [group["names"] for group in optimizer.param_groups] == [["m"], ["b"]]


def test_sgd_with_momentum_by_hand() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = build("sgd", parameter_groups([("w", weight)], 0.0))
    for _ in range(2):
        weight.grad = torch.full((2, 2), 2.0)
        optimizer.step()
    torch.testing.assert_close(weight.data, torch.full((2, 2), 1 - 0.1 * 2 - 0.1 * 3.8))
    assert tuple(optimizer.state[weight]) == STATE_KEYS["sgd"]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_one_tensor_at_a_time_and_in_one_pass(name: str) -> None:
    optimizer = build(name, parameter_groups(GPT(CONFIG).named_parameters(), 0.1))
    for group in optimizer.param_groups:
        assert group["foreach"] is False
        assert group["fused"] is True
        assert group["lr"] == 0.1


def test_unknown_optimizer() -> None:
    groups = parameter_groups(GPT(CONFIG).named_parameters(), 0.1)
    with pytest.raises(UserError, match=r"'adagrad'.*\n.*adamw, sgd, lion, lamb, adafactor, muon"):
        build("adagrad", groups)


def test_layer_lr_decay_falls_towards_the_embeddings() -> None:
    groups = parameter_groups(GPT(CONFIG).named_parameters(), 0.1, 0.5, num_layers=2)
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scales["final_norm.weight"] == 1.0
    assert scales["layers.1.mlp.up.weight"] == scales["layers.1.mlp.up.bias"] == 0.5
    assert scales["layers.0.attention_norm.weight"] == 0.25
    assert scales["embedding.tokens.weight"] == scales["embedding.positions.weight"] == 0.125
    assert len(scales) == len(dict(GPT(CONFIG).named_parameters()))
    assert {(g["weight_decay"] > 0) for g in groups if g["lr_scale"] == 0.5} == {True, False}
    # a module's prefix changes nothing
    assert (
        parameter_groups([("model.layers.0.a.weight", nn.Parameter(torch.ones(2, 2)))], 0, 0.5, 2)[
            0
        ]["lr_scale"]
        == 0.25
    )


def test_matrices_inside_layers_are_set_apart_for_muon() -> None:
    groups = parameter_groups(GPT(CONFIG).named_parameters(), 0.1, apart=True)
    hidden = [name for group in groups if group["hidden_matrices"] for name in group["names"]]
    assert hidden == [
        name
        for name, p in GPT(CONFIG).named_parameters()
        if name.startswith("layers.") and p.ndim == 2
    ]
    assert all(is_hidden_matrix(f"model.{name}", 2) for name in hidden)
    assert not is_hidden_matrix("head.weight", 2)
