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

from megascale.training.evaluation import evaluate
from megascale.training.state import TrainState
from tests.bert_data import make_bert_dataset
from tests.distributed import Pools
from tests.parity.harness import (
    Record,
    merge,
    record_rank,
    relative,
    resume_rank,
    run_steps,
    save_rank,
    set_up,
)
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
        "vocab_size": 281,  # odd, and with it the number of parameters: 36,361
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


@pytest.fixture(scope="module")
def even_reference(pools: Pools, data: Path) -> Record:
    """The single process on samples of a length that two ranks can share."""
    return record(pools, 1, settings_of(data, parallel__engine="torch", model__seq_length=28))


@pytest.mark.parametrize(
    ("world", "sequence", "engine", "stage", "mode"),
    [
        (2, False, "torch", 0, "selective"),
        (2, True, "torch", 0, "none"),
        (4, False, "deepspeed", 1, "full"),
        (4, True, "torch", 3, "full"),
        (4, True, "deepspeed", 2, "selective"),
    ],
)
def test_tensor_parallel(
    pools: Pools,
    data: Path,
    even_reference: Record,
    world: int,
    sequence: bool,
    engine: str,
    stage: int,
    mode: str,
) -> None:
    """Heads, inner width and vocabulary cut over two ranks; 75 rows are cut unevenly."""
    settings = settings_of(
        data,
        model__seq_length=28,
        parallel__engine=engine,
        parallel__zero_stage=stage,
        parallel__tensor_parallel_size=2,
        parallel__sequence_parallel=sequence,
        parallel__activation_recomputation=mode,
    )
    assert_same(record(pools, world, settings), even_reference)


@pytest.mark.parametrize("objective", ["none", "sop"])
def test_sequence_parallel_with_other_objectives(pools: Pools, data: Path, objective: str) -> None:
    """Without the sentence head, and with span masks and the order of the segments."""
    changes = {
        "data__sentence_objective": objective,
        "data__masking": "ngram",
        "model__seq_length": 28,
        "parallel__engine": "torch",
    }
    expected = record(pools, 1, settings_of(data, **changes))
    cut = {"parallel__tensor_parallel_size": 2, "parallel__sequence_parallel": True}
    assert_same(record(pools, 2, settings_of(data, **changes, **cut)), expected)


def _metrics(settings: dict[str, Any]) -> dict[str, float]:
    """Runs on every rank: metrics of one validation after some steps."""
    setup = set_up(settings)
    run_steps(setup, TrainState(), 12)
    result = evaluate(setup.engine, setup.valid, setup.mesh, setup.parts.device)
    setup.engine.close()
    return {"loss": result.loss, "perplexity": result.perplexity, **result.metrics}


def test_metrics_are_exact_in_every_layout(pools: Pools, data: Path) -> None:
    """Ranks without samples, and a vocabulary that is cut, count nothing twice."""
    learning = {"optimizer__lr": 0.01, "schedule__warmup_steps": 0, "model__dropout": 0.0}
    expected = pools(1).run(_metrics, settings=settings_of(data, **learning))[0]
    assert set(expected) == {
        *("loss", "perplexity", "masked_lm_loss", "nsp_loss"),
        *("masked_lm_accuracy", "nsp_accuracy"),
    }
    assert 0 < expected["masked_lm_accuracy"] < 1
    assert 0 < expected["nsp_accuracy"] < 1
    total = expected["masked_lm_loss"] + expected["nsp_loss"]
    assert relative(expected["loss"], total) < 1e-12
    assert relative(expected["perplexity"], math.exp(expected["masked_lm_loss"])) < 1e-12
    cut = {"parallel__tensor_parallel_size": 2}
    for world, changes in ((2, {"parallel__zero_stage": 3}), (2, cut), (4, {})):
        settings = settings_of(data, parallel__engine="torch", **learning, **changes)
        for found in pools(world).run(_metrics, settings=settings):
            for name, value in expected.items():
                exact = name.endswith("accuracy")
                assert relative(found[name], value) < (1e-15 if exact else 1e-5), name


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
