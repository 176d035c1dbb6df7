from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from megascale.models.flops import flops_per_token, num_parameters
from megascale.models.gpt import GPT, GPTConfig
from megascale.models.head import LMHead

GPT2 = GPTConfig(
    vocab_size=50257,
    num_layers=12,
    hidden_size=768,
    num_attention_heads=12,
    num_kv_heads=12,
    ffn_hidden_size=3072,
    seq_length=1024,
)
LLAMA3_8B = GPTConfig(
    vocab_size=128256,
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_kv_heads=8,
    ffn_hidden_size=14336,
    seq_length=8192,
    position_embedding="rope",
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
    rope_theta=500000.0,
    tie_word_embeddings=False,
)


def built(config: GPTConfig) -> int:
    with torch.device("meta"):
        model = GPT(config)
        head = LMHead(config.hidden_size, config.vocab_size, config.tie_word_embeddings)
    return sum(p.numel() for part in (model, head) for p in part.parameters())


def test_published_counts() -> None:
    assert num_parameters(GPT2) == built(GPT2) == 124_439_808
    assert num_parameters(LLAMA3_8B) == built(LLAMA3_8B) == 8_030_261_248


def test_count_is_exact_for_every_choice() -> None:
    choices = product(
        ("learned", "rope"),
        ("layernorm", "rmsnorm"),
        ("gelu", "swiglu"),
        (True, False),
        (True, False),
        (1, 2, 6),
    )
    for index, (position, norm, activation, bias, tied, kv_heads) in enumerate(choices):
        config = GPTConfig(
            vocab_size=31 + index,
            num_layers=1 + index % 3,
            hidden_size=24,
            num_attention_heads=6,
            num_kv_heads=kv_heads,
            ffn_hidden_size=17,
            seq_length=9,
            position_embedding=position,
            norm=norm,
            activation=activation,
            bias=bias,
            tie_word_embeddings=tied,
        )
        assert num_parameters(config) == built(config), config


@pytest.mark.parametrize(
    "changes",
    [
        {"head_width": 10},
        {"qkv_bias": False},
        {"attention_output_bias": False},
        {"mlp_bias": False},
        {"bias": False, "qkv_bias": True},
        {"qk_norm": True},
        {"qk_norm": True, "norm": "rmsnorm", "norm_unit_offset": True},
        {"norm_placement": "sandwich"},
        {"norm_placement": "sandwich", "norm": "rmsnorm"},
        {"activation": "geglu"},
        {"activation": "geglu_tanh", "mlp_bias": False},
        {"parallel_residual": True, "sliding_window": 4, "scale_embeddings": True},
    ],
)
def test_count_is_exact_for_every_variant(changes: dict[str, Any]) -> None:
    small = replace(GPT2, num_layers=2, hidden_size=24, num_attention_heads=3, num_kv_heads=3)
    config = replace(small, ffn_hidden_size=20, vocab_size=31, **changes)
    assert num_parameters(config) == built(config)


def test_windows_count_what_they_see() -> None:
    window = replace(GPT2, sliding_window=256, global_layer_interval=6)
    saved = 10 * 12 * 768 * (1024 - 256)  # layers 5 and 11 of 12 see all
    assert flops_per_token(GPT2, 1024) - flops_per_token(window, 1024) == saved
    assert flops_per_token(GPT2, 128) == flops_per_token(window, 128)


def test_flops_by_hand() -> None:
    # Per layer 4 * 768^2 + 8 * 768^2 weights, and the head.
    weights = 12 * 12 * 768**2 + 50257 * 768
    assert flops_per_token(GPT2, 1024) == 6 * weights + 12 * 12 * 768 * 1024
    untied = replace(GPT2, tie_word_embeddings=False, position_embedding="rope", bias=False)
    assert flops_per_token(untied, 1024) == flops_per_token(GPT2, 1024)


@pytest.mark.parametrize("config", [GPT2, LLAMA3_8B], ids=["gpt2", "llama"])
def test_flops_agree_with_counted_matrix_products(config: GPTConfig) -> None:
    """torch counts the same forward FLOPs on a small model of the same style."""
    from torch.utils.flop_counter import FlopCounterMode

    length = 10
    small = replace(
        config,
        num_layers=2,
        hidden_size=48,
        num_attention_heads=4,
        num_kv_heads=2,
        ffn_hidden_size=72,
        vocab_size=65,
        attention_dropout=1e-9,  # the explicit path, whose products the counter sees
    )
    model, head = GPT(small), LMHead(48, 65, tied=True)
    keys = torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = model(torch.zeros(1, length, dtype=torch.int64), dropout_keys=keys)
        head(hidden, torch.zeros(65, 48))
    assert 3 * counter.get_total_flops() == length * flops_per_token(small, length)
