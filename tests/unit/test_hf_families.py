"""The tables of Hugging Face families: what they read, write and refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megascale.config.schema import ModelConfig
from megascale.errors import UserError
from megascale.hf.exporting import parse_size
from megascale.hf.fields import resolved, simplified
from megascale.hf.layouts import (
    INTERLEAVED_HEADS,
    JOINED,
    JOINED_TRANSPOSED,
    PLAIN,
    TRANSPOSED,
    Layout,
)
from megascale.hf.registry import FAMILIES, family_for, family_of

TINY = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2}
LLAMA = {**TINY, "model_type": "llama", "intermediate_size": 8}
GEMMA3 = {**TINY, "model_type": "gemma3_text", "intermediate_size": 8, "sliding_window": 4}
QWEN = {**TINY, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7}


def read(config: dict[str, Any]) -> ModelConfig:
    return ModelConfig(**family_of(config, "here").read_config(config))


# Layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "count"),
    [(PLAIN, 1), (TRANSPOSED, 1), (JOINED, 3), (JOINED_TRANSPOSED, 3), (INTERLEAVED_HEADS, 3)],
)
@pytest.mark.parametrize("shape", [(6, 5), (6,)])
def test_split_undoes_merge(layout: Layout, count: int, shape: tuple[int, ...]) -> None:
    parts = [torch.randn(shape) for _ in range(count)]
    merged = layout.merge(parts, 3)
    assert tuple(merged.shape) == layout.shape([shape] * count, 3)
    back = layout.split(merged, [shape] * count, 3)
    assert len(back) == count
    assert all(torch.equal(a, b) for a, b in zip(parts, back, strict=True))


def test_joined_parts_may_differ_in_size() -> None:
    parts = [torch.randn(6, 4), torch.randn(2, 4)]
    for layout in (JOINED, JOINED_TRANSPOSED):
        back = layout.split(layout.merge(parts, 1), [(6, 4), (2, 4)], 1)
        assert all(torch.equal(a, b) for a, b in zip(parts, back, strict=True))


def test_interleaved_heads_are_neox() -> None:
    """One head's query, key and value lie together."""
    query, key, value = (torch.full((4, 1), float(i)) for i in range(3))
    merged = INTERLEAVED_HEADS.merge([query, key, value], 2).flatten().tolist()
    assert merged == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2]


# What is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({**LLAMA, "rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({**LLAMA, "rope_parameters": {"rope_theta": 3e5}}, {"rope_theta": 3e5}),
        (
            {**LLAMA, "rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_theta": 7.0, "rope_scaling": "linear", "rope_scaling_factor": 2.0},
        ),
        ({**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 1}}, {"rope_scaling": "none"}),
        ({**LLAMA, "attention_bias": True}, {"qkv_bias": True, "attention_output_bias": True}),
        (
            {**GEMMA3, "rope_theta": 9.0, "rope_local_base_freq": 3.0},
            {"rope_theta": 9.0, "rope_local_theta": 3.0, "global_layer_interval": 6},
        ),
        ({**GEMMA3, "sliding_window_pattern": 3}, {"global_layer_interval": 3}),
        (
            {**GEMMA3, "layer_types": ["full_attention"] * 6},
            {"sliding_window": None, "rope_local_theta": None},
        ),
        ({**QWEN, "max_window_layers": 0}, {"sliding_window": 7, "global_layer_interval": None}),
        ({**QWEN, "max_window_layers": 6}, {"sliding_window": None}),
        ({**QWEN, "use_sliding_window": False}, {"sliding_window": None}),
        (
            {**QWEN, "layer_types": ["sliding_attention", "full_attention"] * 3},
            {"sliding_window": 7, "global_layer_interval": 2},
        ),
        (
            {**TINY, "model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 20},
            {"rotary_fraction": 0.5, "rope_theta": 20.0, "parallel_residual": True},
        ),
    ],
)
def test_older_and_newer_spellings(config: dict[str, Any], expected: dict[str, Any]) -> None:
    model = read(config)
    assert {name: getattr(model, name) for name in expected} == expected
    # what is written is read back the same, by the family that it came from
    family = FAMILIES[config["model_type"]]
    assert family.differences(model) == []


def test_llama3_scaling_is_read() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = read({**LLAMA, "rope_theta": 5e5, "rope_scaling": scaling})
    assert model.rope_scaling == "llama3"
    assert (model.rope_scaling_factor, model.rope_original_length) == (8.0, 8192)
    assert (model.rope_low_freq_factor, model.rope_high_freq_factor) == (1.0, 4.0)


def test_simplified_says_the_same_with_less() -> None:
    settings = family_of(LLAMA, "here").read_config({**LLAMA, "num_key_value_heads": 2})
    short = simplified({**settings, "ffn_hidden_size": 64, "qkv_bias": False, "mlp_bias": True})
    assert short["num_kv_heads"] is None
    assert short["ffn_hidden_size"] is None  # 64 is what null means here
    assert short["qkv_bias"] is None
    assert short["mlp_bias"] is True
    full = ModelConfig(**{**settings, "ffn_hidden_size": 64, "mlp_bias": True})
    assert resolved(ModelConfig(**short)) == resolved(full)


# What is refused ------------------------------------------------------------------------------


def test_unknown_family_names_the_supported_ones() -> None:
    for config in ({"model_type": "mamba"}, {}):
        with pytest.raises(UserError) as caught:
            family_of(config, "/models/x")
        assert repr(config.get("model_type")) in caught.value.what
        assert all(name in caught.value.rule for name in FAMILIES)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "odd": 1}}, "rope_scaling: odd"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"hidden_act": "relu2"}, "hidden_act = 'relu2'; supported: 'silu'"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "x.py"}}, "auto_map"),
        ({"rope_scaling": 3}, "rope_parameters, rope_scaling"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ],
)
def test_settings_that_are_not_computed_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        read({**LLAMA, **change, "use_cache": True, "eos_token_id": 3})
    assert named in caught.value.what
    assert "eos" not in caught.value.what


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse"),
        ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights = False"),
        ({"model_type": "gpt2", "resid_pdrop": 0.0}, "resid_pdrop = 0.0, embd_pdrop = 0.1"),
        ({**QWEN, "max_window_layers": 3}, r"the layers [0, 1, 2] of 6 see all tokens"),
        ({**QWEN, "layer_types": ["linear_attention"] * 6}, "layer_types: linear_attention"),
        ({**GEMMA3, "use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({**GEMMA3, "attn_logit_softcapping": 3.0}, "attn_logit_softcapping = 3.0"),
    ],
)
def test_settings_of_other_families_are_named(config: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        read(config)
    assert named in caught.value.what


def test_all_of_them_are_named_together() -> None:
    with pytest.raises(UserError) as caught:
        read({**LLAMA, "hidden_act": "relu", "num_experts": 8, "partial_rotary_factor": 0.5})
    assert caught.value.what.count("\n") == 3


# What is written ------------------------------------------------------------------------------


def test_the_plainest_family_that_fits_is_taken() -> None:
    gpt2 = ModelConfig(vocab_size=64)
    llama = ModelConfig(
        vocab_size=64,
        position_embedding="rope",
        norm="rmsnorm",
        activation="swiglu",
        bias=False,
    )
    neox = ModelConfig(vocab_size=64, position_embedding="rope", activation="gelu")
    changes: list[tuple[ModelConfig, dict[str, Any], str]] = [
        (gpt2, {}, "gpt2"),
        (gpt2, {"dropout": 0.1, "tie_word_embeddings": False}, "gpt2"),
        (llama, {}, "llama"),
        (llama, {"mlp_bias": True, "head_dim": 40}, "llama"),
        (llama, {"sliding_window": 9}, "mistral"),
        (llama, {"qkv_bias": True}, "qwen2"),
        (llama, {"qk_norm": True}, "qwen3"),
        (llama, {"qk_norm": True, "sliding_window": 9, "global_layer_interval": 3}, "qwen3"),
        (neox, {}, "gpt_neox"),
        (neox, {"parallel_residual": True, "rotary_fraction": 0.25}, "gpt_neox"),
    ]
    for base, change, expected in changes:
        model = base.model_copy(update=change)
        assert family_for(model).model_type == expected, change
        assert family_for(model, expected).model_type == expected
    assert family_for(llama, "mistral").model_type == "mistral"


def test_a_model_that_no_family_has_is_refused_with_what_differs() -> None:
    odd = ModelConfig(vocab_size=64, position_embedding="rope", mlp_bias=False, activation="gelu")
    with pytest.raises(UserError) as caught:
        family_for(odd)
    assert "nearest is gpt_neox" in caught.value.what
    assert "model.mlp_bias = False, a gpt_neox has True" in caught.value.what
    with pytest.raises(UserError, match="as llama") as caught:
        family_for(odd, "llama")
    assert "model.norm = 'layernorm', a llama has 'rmsnorm'" in caught.value.what
    with pytest.raises(UserError, match="--family lama"):
        family_for(odd, "lama")


def test_sizes() -> None:
    assert parse_size("5GB") == 5_000_000_000
    assert parse_size("1.5 mb") == 1_500_000
    assert parse_size("2MiB") == 2 << 20
    assert parse_size("123") == 123
    for text in ("", "GB", "-1MB", "3 parsecs", "0.2", "1e3"):
        with pytest.raises(UserError, match="--shard-size"):
            parse_size(text)
