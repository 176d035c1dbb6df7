"""Every engine, ZeRO stage and world size is the same training as the single process.

The reference is the replicated torch engine on one process. Compared are, at every step, loss,
gradient norm, every gradient and the order of samples, then every weight and the validation loss;
with clipping active, off, and once with SGD (Adam and clipping hide scale).

Tolerance: 1e-5 relative in fp32. Adam's eps is 1e-6 here, not 1e-8: it divides gradients that are
zero in exact arithmetic (key biases: softmax does not see a shift) or nearly so by their own
rounding noise, so with 1e-8 single weights move by lr in a direction that rounding decides.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed import Pools
from tests.parity.harness import Record, merge, record_rank, relative

LAYOUTS = [
    ("torch", 0),
    ("torch", 1),
    ("torch", 2),
    ("torch", 3),
    ("deepspeed", 1),
    ("deepspeed", 2),
    ("deepspeed", 3),
]
WORLDS = (1, 2, 4)
STEPS = 6
CLIP = 0.5

BASE: dict[str, Any] = {
    # odd sizes: flat partitions and row shards need padding everywhere
    "model": {
        "num_layers": 2,
        "hidden_size": 36,
        "num_attention_heads": 4,
        "ffn_hidden_size": 75,
        "seq_length": 23,
        "vocab_size": 101,
    },
    "data": {"split": [0.8, 0.2]},
    "train": {"global_batch_size": 8, "micro_batch_size": 1, "max_steps": 20},
    "optimizer": {"lr": 1e-3, "eps": 1e-6},
    "schedule": {"name": "linear", "warmup_steps": 2},
}
LLAMA = {
    "model.hidden_size": 40,  # rotary needs an even head width
    "model.num_kv_heads": 2,
    "model.position_embedding": "rope",
    "model.norm": "rmsnorm",
    "model.activation": "swiglu",
    "model.bias": False,
    "model.tie_word_embeddings": False,
    # masked labels: the number of targets differs between ranks and micro-batches
    "data.isolate_documents": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "clipped": {"optimizer.grad_clip": CLIP, "model.dropout": 0.1},
    "unclipped": {"optimizer.grad_clip": 0.0, **LLAMA},
    "sgd": {"optimizer.name": "sgd", "optimizer.lr": 0.1, "optimizer.grad_clip": 0.0},
}


def settings_of(prefix: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """The base settings on the dataset `prefix`, with dotted changes."""
    settings = copy.deepcopy(BASE)
    if changes.get("optimizer.name") == "sgd":
        settings["optimizer"] = {}
    settings["data"]["path"] = str(prefix)
    for path, value in changes.items():
        section, _, name = path.partition(".")
        settings.setdefault(section, {})[name] = value
    return settings


@pytest.fixture(scope="module")
def references() -> dict[str, Record]:
    """Single-process records by variant and precision, made when first needed."""
    return {}


def reference(
    records: dict[str, Record], pools: Pools, prefix: Path, variant: str, dtype: str
) -> Record:
    """The single process's record of a variant."""
    key = f"{variant} {dtype}"
    if key not in records:
        changes = {**VARIANTS[variant], "precision.dtype": dtype, "parallel.engine": "torch"}
        settings = settings_of(prefix, changes)
        records[key] = merge(pools(1).run(record_rank, settings=settings, steps=STEPS))
    return records[key]


def run(
    pools: Pools, prefix: Path, variant: str, dtype: str, world: int, engine: str, stage: int
) -> Record:
    """One layout's record, with a validation between steps."""
    changes = {
        **VARIANTS[variant],
        "precision.dtype": dtype,
        "parallel.engine": engine,
        "parallel.zero_stage": stage,
    }
    settings = settings_of(prefix, changes)
    ranks = pools(world).run(record_rank, settings=settings, steps=STEPS, evaluate_every=2)
    return merge(ranks)


def cases(worlds: tuple[int, ...]) -> list[Any]:
    """All layouts but the reference itself, by world size (so that pools are reused)."""
    return [
        pytest.param(world, engine, stage, id=f"{engine}{stage}-w{world}")
        for world in worlds
        for engine, stage in LAYOUTS
        if (world, engine, stage) != (1, "torch", 0)
    ]


def assert_same(found: Record, expected: Record, limit: float = 1e-5) -> None:
    """Everything within `limit`, relative to the largest element of each tensor; fp32's is 1e-5."""
    assert found.sample_ids == expected.sample_ids
    assert relative(found.losses, expected.losses) < limit
    for a, b in zip(found.norms, expected.norms, strict=True):
        assert relative(a, b) < limit
    assert relative(found.valid[0], expected.valid[0]) < limit
    assert found.valid[1] == expected.valid[1]
    for step, (ours, theirs) in enumerate(zip(found.gradients, expected.gradients, strict=True)):
        assert ours.keys() == theirs.keys()
        # Key biases have gradients that are zero in exact arithmetic, 1e-12 of rounding here:
        # a tensor counts as at least 1e-5 of the whole's norm (1e-10 of the norm, absolute).
        floor = 1e-5 * expected.norms[step]
        for name in theirs:
            assert relative(ours[name], theirs[name], floor) < limit, (step, name)
    assert found.weights.keys() == expected.weights.keys()
    for name in expected.weights:
        assert np.abs(found.weights[name] - expected.weights[name]).max() < limit, name
        assert np.isfinite(found.weights[name]).all(), name


@pytest.mark.parametrize(("world", "engine", "stage"), cases(WORLDS))
def test_fp32_clipped_with_dropout(
    pools: Pools,
    token_prefix: Path,
    references: dict[str, Record],
    world: int,
    engine: str,
    stage: int,
) -> None:
    expected = reference(references, pools, token_prefix, "clipped", "fp32")
    assert min(expected.norms) > CLIP * 1.2, "clipping must be active, and the norm not the clip"
    assert_same(run(pools, token_prefix, "clipped", "fp32", world, engine, stage), expected)


@pytest.mark.parametrize(("world", "engine", "stage"), cases((2, 4)))
def test_fp32_unclipped_llama_with_isolated_documents(
    pools: Pools,
    token_prefix: Path,
    references: dict[str, Record],
    world: int,
    engine: str,
    stage: int,
) -> None:
    expected = reference(references, pools, token_prefix, "unclipped", "fp32")
    assert_same(run(pools, token_prefix, "unclipped", "fp32", world, engine, stage), expected)


@pytest.mark.parametrize(("world", "engine", "stage"), cases((2,)))
def test_fp32_sgd(
    pools: Pools,
    token_prefix: Path,
    references: dict[str, Record],
    world: int,
    engine: str,
    stage: int,
) -> None:
    expected = reference(references, pools, token_prefix, "sgd", "fp32")
    assert_same(run(pools, token_prefix, "sgd", "fp32", world, engine, stage), expected)


@pytest.mark.parametrize(("world", "engine", "stage"), cases(WORLDS))
def test_bf16(
    pools: Pools,
    token_prefix: Path,
    references: dict[str, Record],
    world: int,
    engine: str,
    stage: int,
) -> None:
    """bf16 has 8 bits: DeepSpeed rounds gradients to it where the torch engines sum in fp32.

    One rounding is 2^-9 = 2e-3 relative; gradients are compared in the first step, before Adam
    has turned rounding into steps, with 1e-2 of each tensor's largest element.
    """
    expected = reference(references, pools, token_prefix, "clipped", "bf16")
    found = run(pools, token_prefix, "clipped", "bf16", world, engine, stage)
    assert found.sample_ids == expected.sample_ids
    assert relative(found.losses, expected.losses) < 1e-3
    assert relative(found.valid[0], expected.valid[0]) < 1e-3
    for a, b in zip(found.norms, expected.norms, strict=True):
        assert relative(a, b) < 1e-2
    floor = 1e-2 * expected.norms[0]
    for name, gradient in expected.gradients[0].items():
        assert relative(found.gradients[0][name], gradient, floor) < 1e-2, name
    for name, weight in expected.weights.items():
        difference = np.abs(found.weights[name] - weight)
        assert np.isfinite(difference).all(), name
        assert difference.mean() < 1e-4, name  # a tenth of one step of lr 1e-3


def test_bf16_stays_near_fp32(
    pools: Pools, token_prefix: Path, references: dict[str, Record]
) -> None:
    """The bf16 reference itself is right: the same curve as fp32 within bf16's rounding."""
    exact = reference(references, pools, token_prefix, "clipped", "fp32")
    rounded = reference(references, pools, token_prefix, "clipped", "bf16")
    assert exact.losses != rounded.losses
    assert relative(rounded.losses, exact.losses) < 2e-3
    assert relative(rounded.norms, exact.norms) < 2e-2


def test_the_comparison_can_fail(
    pools: Pools, token_prefix: Path, references: dict[str, Record]
) -> None:
    """A gradient scaled by 1.001, a NaN, or another order of samples is found."""
    expected = reference(references, pools, token_prefix, "sgd", "fp32")
    name = next(iter(expected.weights))
    for damage in ("gradient", "weight", "nan", "order"):
        broken = copy.deepcopy(expected)
        if damage == "gradient":
            broken.gradients[-1][name] *= 1.001
        elif damage == "weight":
            broken.weights[name].flat[-1] += 1e-4
        elif damage == "nan":
            broken.norms[0] = float("nan")
        else:
            broken.sample_ids[0].reverse()
        with pytest.raises(AssertionError):
            assert_same(broken, expected)
