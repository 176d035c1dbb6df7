"""Packed and padded samples are the same training in every layout, and after a resume.

Samples have padding and so different numbers of targets, on every rank and in every micro-batch:
a mean that were taken over places, or first over micro-batches, would show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megascale.config.load import load_config
from megascale.data.token_file import TokenFileWriter, token_dtype
from megascale.training.datasets import open_corpora
from megascale.training.tasks.registry import build_task
from tests.distributed import Pools
from tests.integration.runs import make_dataset, make_middle_tokenizer, make_tokenizer
from tests.parity.harness import Record, merge, record_rank, relative, resume_rank, save_rank
from tests.parity.test_engines import LLAMA, assert_same, settings_of

STEPS = 3
LENGTH = 40


def _mix(start: int, *sources: tuple[Any, float]) -> dict[str, Any]:
    pairs = [{"path": str(path), "weight": weight} for path, weight in sources]
    return {"from_sample": start, "sources": pairs}


@pytest.fixture(scope="module")
def variants(token_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings by name; both have padding."""
    short = tmp_path_factory.mktemp("short") / "corpus"
    rng = np.random.default_rng(8)
    with TokenFileWriter(short, token_dtype(96)) as writer:
        for _ in range(150):
            writer.add_document([rng.integers(0, 96, int(rng.integers(0, 14)))])
    base = {"model.seq_length": LENGTH, "data.path": None, "optimizer.grad_clip": 0.5}
    mixes = [_mix(0, (token_prefix, 2.0)), _mix(11, (short, 1.0), (token_prefix, 1.0))]
    return {
        "best_fit": {**LLAMA, **base, "data.stages": mixes, "data.packing": "best_fit"},
        "one_document": {
            **base,
            "model.hidden_size": 40,
            "model.dropout": 0.1,
            "data.stages": [_mix(0, (short, 1.0), (token_prefix, 0.5))],
            "data.packing": "one_document",
        },
    }


@pytest.fixture(scope="module")
def references(pools: Pools, token_prefix: Path, variants: dict[str, Any]) -> dict[str, Record]:
    return {
        name: merge(
            pools(1).run(record_rank, settings=settings_of(token_prefix, changes), steps=STEPS)
        )
        for name, changes in variants.items()
    }


@pytest.mark.parametrize("name", ["best_fit", "one_document"])
def test_there_is_padding_and_it_is_no_target(
    token_prefix: Path, variants: dict[str, Any], name: str
) -> None:
    """Else the layouts below would prove nothing."""
    config = load_config(settings_of(token_prefix, {**variants[name], "model.vocab_size": 101}))
    data = build_task(config).open_data(open_corpora(config))
    batch = data.train.batch(np.arange(8 * STEPS))
    targets = (batch["labels"] != -100).sum(axis=1)
    assert len(set(targets.tolist())) > 5
    assert targets.min() < LENGTH / 2
    assert (targets > 0).all()


def _layout(engine: str, stage: int, **parallel: Any) -> dict[str, Any]:
    settings = {"engine": engine, "zero_stage": stage, **parallel}
    return {f"parallel.{name}": value for name, value in settings.items()}


CONTEXT = {"context_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "micro-batches of 4": (1, {"train.micro_batch_size": 4}),
    "dp2": (2, _layout("torch", 0)),
    "dp2 ZeRO 3": (2, _layout("torch", 3)),
    "dp2 DeepSpeed 2": (2, _layout("deepspeed", 2)),
    "tp2 sp": (2, _layout("torch", 0, tensor_parallel_size=2, sequence_parallel=True)),
    "tp2 DeepSpeed 1": (2, _layout("deepspeed", 1, tensor_parallel_size=2)),
    "cp2 ring": (2, _layout("torch", 0, **CONTEXT, context_parallel_method="ring")),
    "cp2 ulysses DeepSpeed 1": (
        2,
        _layout("deepspeed", 1, **CONTEXT, context_parallel_method="ulysses"),
    ),
    "pp2": (2, _layout("torch", 0, pipeline_parallel_size=2)),
    "pp2 DeepSpeed 1": (2, _layout("deepspeed", 1, pipeline_parallel_size=2)),
}
# where much padding and dropout are tried beside best_fit
MOST_PADDING = ("micro-batches of 4", "dp2", "dp2 DeepSpeed 2", "cp2 ring", "pp2")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_training(
    pools: Pools,
    token_prefix: Path,
    variants: dict[str, Any],
    references: dict[str, Record],
    layout: str,
) -> None:
    world, changes = LAYOUTS[layout]
    for name in ("best_fit", "one_document") if layout in MOST_PADDING else ("best_fit",):
        settings = settings_of(token_prefix, {**variants[name], **changes})
        assert_same(
            merge(pools(world).run(record_rank, settings=settings, steps=STEPS)), references[name]
        )


# Resuming -------------------------------------------------------------------------------------

AT_STEP, LAST = 3, 6  # of 8 samples: 24 are read when the checkpoint is written


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Stages that change in the middle of steps, before and after the checkpoint; with FIM."""
    root = tmp_path_factory.mktemp("mixed")
    tokenizer = make_middle_tokenizer(make_tokenizer(root))
    paths = []
    for shift in (0, 7):
        (root / str(shift)).mkdir()
        paths.append(make_dataset(root / str(shift), tokenizer, shift=shift))
    first, second = paths
    return {
        "model.vocab_size": 273,
        "model.dropout": 0.1,
        "data.path": None,
        "data.stages": [
            _mix(0, (first, 3.0), (second, 1.0)),
            _mix(13, (second, 1.0)),
            _mix(29, (second, 1.0), (first, 5.0)),
        ],
        "data.fim_rate": 0.6,
        "data.isolate_documents": True,
    }


@pytest.mark.parametrize(("packing", "elsewhere"), [("concat", (4, 2)), ("best_fit", (1, 4))])
def test_a_resumed_run_is_the_run_that_never_stopped(
    pools: Pools,
    token_prefix: Path,
    tmp_path: Path,
    mixed: dict[str, Any],
    packing: str,
    elsewhere: tuple[int, int],
) -> None:
    """Same layout: every bit; another number of ranks and micro-batch size: 1e-5."""
    settings = settings_of(token_prefix, {**mixed, "data.packing": packing})
    folder = str(tmp_path)
    straight = pools(2).run(
        save_rank, settings=settings, folder=folder, at_step=AT_STEP, steps=LAST
    )
    assert len(straight[0]) == LAST - AT_STEP
    assert pools(2).run(resume_rank, settings=settings, folder=folder, steps=LAST) == straight
    world, micro = elsewhere
    settings["train"]["micro_batch_size"] = micro
    resumed = pools(world).run(resume_rank, settings=settings, folder=folder, steps=LAST)
    for found, expected in zip(resumed[0], straight[0], strict=True):
        assert relative(found[0], expected[0]) < 1e-5
        assert relative(found[1], expected[1]) < 1e-5
