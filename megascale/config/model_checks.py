"""Rules that join several settings of the model's shape."""

from __future__ import annotations

from collections.abc import Iterator

from megascale.config.problems import Problem
from megascale.config.rules import Check, among, divisors_near, either, ignored, neighbours
from megascale.config.schema import Config


def heads_divide_hidden_size(config: Config, world_size: int | None) -> Iterator[Problem]:
    """Every head has the same width, where none is given."""
    hidden, heads = config.model.hidden_size, config.model.num_attention_heads
    if config.model.head_dim is None and hidden % heads:
        rule = f"must be a multiple of model.num_attention_heads = {heads}"
        hint = (
            f"model.hidden_size = {either(neighbours(hidden, heads))}, "
            f"or model.num_attention_heads = {either(divisors_near(hidden, heads))}"
        )
        yield Problem("model.hidden_size", hidden, rule, hint)


def kv_heads_divide_heads(config: Config, world_size: int | None) -> Iterator[Problem]:
    """Every key-value head serves the same number of query heads."""
    heads, kv_heads = config.model.num_attention_heads, config.model.resolved_num_kv_heads
    if heads % kv_heads:
        rule = f"must divide model.num_attention_heads = {heads}"
        hint = f"model.num_kv_heads = {either(divisors_near(heads, kv_heads))}"
        yield Problem("model.num_kv_heads", kv_heads, rule, hint)


def rope_needs_even_width(config: Config, world_size: int | None) -> Iterator[Problem]:
    """Rotary positions turn pairs of features (arXiv:2104.09864)."""
    model = config.model
    divides = model.head_dim is not None or model.hidden_size % model.num_attention_heads == 0
    width = model.rotary_width
    if model.position_embedding != "rope" or not divides or (width >= 2 and width % 2 == 0):
        return
    if model.rotary_fraction != 1:
        rule = (
            "rope rotates pairs of features, so rotary_fraction * head width must be even; "
            f"{model.rotary_fraction} * {model.head_width} gives {width}"
        )
        fitting = neighbours(width, 2) or [2]
        hint = f"model.rotary_fraction = {fitting[-1] / model.head_width:.6g}"
        yield Problem("model.rotary_fraction", model.rotary_fraction, rule, hint)
        return
    rule = (
        "rope rotates pairs of features, so the head width must be even; hidden_size / "
        f"num_attention_heads = {model.hidden_size} / {model.num_attention_heads} = "
        f"{model.head_width}"
    )
    hint = f"model.hidden_size = {either(neighbours(model.hidden_size, 2 * _heads(config)))}"
    if model.head_dim is not None:
        rule = f"rope rotates pairs of features, so model.head_dim = {model.head_dim} must be even"
        hint = f"model.head_dim = {either(neighbours(model.head_dim, 2))}"
    yield Problem("model.position_embedding", "rope", rule, hint)


def _heads(config: Config) -> int:
    return config.model.num_attention_heads


def stretching_needs_factor(config: Config, world_size: int | None) -> Iterator[Problem]:
    """A scaling of the rotary wavelengths scales."""
    model = config.model
    if model.rope_scaling != "none" and model.rope_scaling_factor == 1:
        rule = f"must be > 1: model.rope_scaling = {model.rope_scaling} stretches by it"
        yield Problem("model.rope_scaling_factor", 1.0, rule, "for example 8.0")


def llama3_needs_a_passage(config: Config, world_size: int | None) -> Iterator[Problem]:
    """llama3's scaling goes from stretched to unstretched wavelengths between two bounds."""
    low, high = config.model.rope_low_freq_factor, config.model.rope_high_freq_factor
    if config.model.rope_scaling == "llama3" and low >= high:
        rule = f"must be > model.rope_low_freq_factor = {low}"
        yield Problem("model.rope_high_freq_factor", high, rule, f"for example {4 * low}")


def local_theta_needs_windows(config: Config, world_size: int | None) -> Iterator[Problem]:
    """There are windowed layers, and they rotate."""
    model = config.model
    used = model.position_embedding == "rope" and model.sliding_window is not None
    if model.rope_local_theta is not None and not used:
        rule = (
            "has an effect only when positions are rotary and layers are windowed; "
            f"model.position_embedding is {model.position_embedding}, model.sliding_window is "
            f"{model.sliding_window}"
        )
        hint = "leave it out, or change the other settings"
        yield Problem("model.rope_local_theta", model.rope_local_theta, rule, hint)


def _llama3_only(path: str) -> Check:
    return ignored(path, "model.rope_scaling", among("llama3"), "rope_scaling is llama3")


_WIDTH = ("model.hidden_size", "model.num_attention_heads", "model.head_dim")

MODEL_CHECKS: tuple[Check, ...] = (
    Check(_WIDTH, heads_divide_hidden_size),
    Check(("model.num_attention_heads", "model.num_kv_heads"), kv_heads_divide_heads),
    Check((*_WIDTH, "model.position_embedding", "model.rotary_fraction"), rope_needs_even_width),
    Check(("model.rope_scaling", "model.rope_scaling_factor"), stretching_needs_factor),
    Check(
        ("model.rope_scaling", "model.rope_low_freq_factor", "model.rope_high_freq_factor"),
        llama3_needs_a_passage,
    ),
    Check(
        ("model.rope_local_theta", "model.position_embedding", "model.sliding_window"),
        local_theta_needs_windows,
    ),
    *(
        ignored(f"model.{name}", "model.position_embedding", among("rope"), "positions are rotary")
        for name in ("rope_theta", "rotary_fraction", "rope_scaling")
    ),
    ignored(
        "model.rope_scaling_factor",
        "model.rope_scaling",
        among("linear", "llama3"),
        "rope_scaling is linear or llama3",
    ),
    *(
        _llama3_only(f"model.{name}")
        for name in ("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_length")
    ),
    ignored("model.norm_unit_offset", "model.norm", among("rmsnorm"), "the norm is rmsnorm"),
    ignored(
        "model.global_layer_interval",
        "model.sliding_window",
        lambda window: window is not None,
        "sliding_window is set",
    ),
)
