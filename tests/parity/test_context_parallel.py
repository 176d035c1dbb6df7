"""A sequence cut over ranks, by either method and under both engines, is the same training.

Losses, gradient norms, every gradient, every weight and the validation loss within 1e-5 of one
process. The models have what a seam could get wrong: rotary and learned positions, isolated
documents, windows, soft-caps, grouped heads, dropout of attention weights and features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import Pools
from tests.parity.harness import Record, merge, record_rank, relative, resume_rank, save_rank
from tests.parity.test_engines import assert_same, settings_of

STEPS = 3
GPT: dict[str, Any] = {
    "model.hidden_size": 40,
    "model.seq_length": 24,
    "model.dropout": 0.1,
    "train.micro_batch_size": 2,
    "optimizer.grad_clip": 0.5,
}
LLAMA: dict[str, Any] = {
    **GPT,
    "model.dropout": 0.0,
    "model.num_kv_heads": 2,
    "model.position_embedding": "rope",
    "model.norm": "rmsnorm",
    "model.activation": "swiglu",
    "model.bias": False,
    "model.tie_word_embeddings": False,
    "data.isolate_documents": True,
    "optimizer.grad_clip": 0.0,
}
GEMMA: dict[str, Any] = {
    **LLAMA,
    "model.attention_dropout": 0.2,
    "model.norm_placement": "sandwich",
    "model.qk_norm": True,
    "model.head_dim": 12,
    "model.query_scaling": 9.0,
    "model.attention_softcap": 2.0,
    "model.logit_softcap": 10.0,
    "model.sliding_window": 7,
    "model.global_layer_interval": 2,
    "data.isolate_documents": False,
}
SGD = {**GPT, "optimizer.name": "sgd", "optimizer.lr": 0.1, "optimizer.grad_clip": 0.0}
MODELS = {"gpt": GPT, "llama": LLAMA, "gemma": GEMMA, "sgd": SGD}

# world, method, cp, tp, sequence parallel, engine, stage, recomputation -> models
LAYOUTS: dict[tuple, tuple[str, ...]] = {
    (2, "ulysses", 2, 1, False, "torch", 0, "none"): tuple(MODELS),
    (2, "ring", 2, 1, False, "torch", 0, "none"): tuple(MODELS),
    (2, "ring", 2, 1, False, "deepspeed", 1, "selective"): ("gpt",),
    (2, "ulysses", 2, 1, False, "deepspeed", 3, "full"): ("llama",),
    (4, "ulysses", 4, 1, False, "torch", 0, "selective"): ("llama",),
    (4, "ring", 4, 1, False, "torch", 3, "full"): ("gemma",),
    (4, "ulysses", 2, 2, True, "torch", 0, "none"): ("gpt", "gemma"),
    (4, "ring", 2, 2, True, "deepspeed", 2, "none"): ("gpt",),
    (4, "ring", 2, 2, False, "torch", 1, "none"): ("gemma",),
    (4, "ring", 2, 1, False, "torch", 2, "none"): ("gpt",),
    (4, "ulysses", 2, 1, False, "deepspeed", 2, "none"): ("gemma",),
    (4, "ring", 2, 1, False, "deepspeed", 3, "none"): ("llama",),
}


def _parallel(
    method: str, cp: int, tp: int, sp: bool, engine: str, stage: int, mode: str
) -> dict[str, Any]:
    changes = {
        "parallel.context_parallel_size": cp,
        "parallel.tensor_parallel_size": tp,
        "parallel.sequence_parallel": sp,
        "parallel.engine": engine,
        "parallel.zero_stage": stage,
        "parallel.activation_recomputation": mode,
    }
    return changes if cp == 1 else {**changes, "parallel.context_parallel_method": method}


@pytest.fixture(scope="module")
def references(pools: Pools, token_prefix: Path) -> dict[str, Record]:
    return {
        name: merge(
            pools(1).run(record_rank, settings=settings_of(token_prefix, changes), steps=STEPS)
        )
        for name, changes in MODELS.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout)))
def test_same_training(
    pools: Pools, token_prefix: Path, references: dict[str, Record], layout: tuple
) -> None:
    world, *parallel = layout
    for name in LAYOUTS[layout]:
        settings = settings_of(token_prefix, {**MODELS[name], **_parallel(*parallel)})
        found = merge(
            pools(world).run(record_rank, settings=settings, steps=STEPS, evaluate_every=2)
        )
        assert_same(found, references[name])
        if name in ("gpt", "sgd"):
            clip = MODELS[name]["optimizer.grad_clip"]
            assert not clip or min(found.norms) > clip, "clipping must be active"
