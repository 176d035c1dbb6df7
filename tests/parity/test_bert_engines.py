"""BERT under every engine and ZeRO stage is the training of the single process.

Two objectives with different numbers of targets, which differ between ranks and micro-batches:
what is compared, and how closely, is that of tests/parity/test_engines.py (1e-5 in fp32).
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest

from tests.bert_data import make_bert_dataset
from tests.distributed import Pools
from tests.parity.harness import Record, merge, record_rank, relative, resume_rank, save_rank
from tests.parity.test_engines import LAYOUTS, assert_same

STEPS = 4
BASE: dict[str, Any] = {
    "model": {
        "family": "bert",
        "num_layers": 2,
        "hidden_size": 36,
        "num_attention_heads": 4,
        "ffn_hidden_size": 75,
        "seq_length": 29,
        "activation": "gelu",
        "dropout": 0.1,
    },
    "data": {"split": [0.8, 0.2], "masking": "whole_word", "sentence_objective": "nsp"},
    "train": {"global_batch_size": 8, "micro_batch_size": 2, "max_steps": 20},
    "optimizer": {"lr": 1e-3, "eps": 1e-6, "grad_clip": 0.5},
    "schedule": {"name": "linear", "warmup_steps": 2},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert_dataset(tmp_path_factory.mktemp("bert"))


def settings_of(data: Path, **changes: Any) -> dict[str, Any]:
    """The base settings on `data`; `changes` by "section__name"."""
    settings = copy.deepcopy(BASE)
    settings["data"]["path"] = str(data)
    for name, value in changes.items():
        section, _, key = name.partition("__")
        settings.setdefault(section, {})[key] = value
    return settings


def record(pools: Pools, world: int, settings: dict[str, Any]) -> Record:
    """One layout's record."""
    return merge(pools(world).run(record_rank, settings=settings, steps=STEPS, evaluate_every=2))


@pytest.fixture(scope="module")
def reference(pools: Pools, data: Path) -> Record:
    """The single process, with the whole batch of a step in one pass."""
    settings = settings_of(data, parallel__engine="torch", train__micro_batch_size=8)
    return record(pools, 1, settings)


@pytest.mark.parametrize(("engine", "stage"), LAYOUTS)
def test_two_ranks_with_accumulation(
    pools: Pools, data: Path, reference: Record, engine: str, stage: int
) -> None:
    settings = settings_of(data, parallel__engine=engine, parallel__zero_stage=stage)
    assert_same(record(pools, 2, settings), reference)


def test_sop_without_dropout(pools: Pools, data: Path) -> None:
    sop = {"data__sentence_objective": "sop", "data__masking": "ngram", "model__dropout": 0.0}
    expected = record(pools, 1, settings_of(data, parallel__engine="torch", **sop))
    settings = settings_of(data, parallel__engine="torch", parallel__zero_stage=2, **sop)
    assert_same(record(pools, 2, settings), expected)


def test_masked_tokens_alone(pools: Pools, data: Path, reference: Record) -> None:
    alone = {"data__sentence_objective": "none"}
    expected = record(pools, 1, settings_of(data, parallel__engine="torch", **alone))
    assert not any("sentence_head" in name for name in expected.weights)
    assert any("sentence_head" in name for name in reference.weights)
    settings = settings_of(data, parallel__zero_stage=3, **alone)
    assert_same(record(pools, 2, settings), expected)


def test_the_loss_is_the_sum_of_two_means(pools: Pools, data: Path, reference: Record) -> None:
    """Not one mean over all targets: the first loss is near ln(vocabulary) + ln(2)."""
    vocabulary, _ = reference.weights["model.embedding.tokens.weight"].shape
    expected = math.log(vocabulary) + math.log(2)
    assert relative(reference.losses[0], expected) < 0.02


@pytest.mark.parametrize(("engine", "stage"), [("torch", 3), ("deepspeed", 2)])
def test_resume_is_bit_identical(
    pools: Pools, data: Path, tmp_path: Path, engine: str, stage: int
) -> None:
    settings = settings_of(data, parallel__engine=engine, parallel__zero_stage=stage)
    folder = str(tmp_path)
    straight = pools(2).run(save_rank, settings=settings, folder=folder, at_step=3, steps=6)
    assert len(straight[0]) == 3
    assert pools(2).run(resume_rank, settings=settings, folder=folder, steps=6) == straight
