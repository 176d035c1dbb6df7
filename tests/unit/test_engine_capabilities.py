"""The table of what may be combined: what each row refuses, by name and by `auto`."""

from __future__ import annotations

import re

import pytest

from megascale.cli.config import all_checks
from megascale.config.load import load_config
from megascale.config.problems import ConfigError, Problem
from megascale.engine.capabilities import REFUSALS, choose_engine, require_allowed


def problems(overrides: str) -> tuple[Problem, ...]:
    try:
        load_config({"data": {"path": "d"}}, overrides.split(), checks=all_checks())
    except ConfigError as error:
        return error.problems
    return ()


def chosen(overrides: str, device: str) -> str:
    config = load_config({"data": {"path": "d"}}, overrides.split(), checks=all_checks())
    require_allowed(config, device)
    return choose_engine(config, device)


ZERO = "parallel.zero_stage="
FP16 = "precision.dtype=fp16 "


@pytest.mark.parametrize(
    ("overrides", "device", "engine"),
    [
        ("", "cpu", "torch"),
        (ZERO + "1", "cpu", "deepspeed"),
        (FP16 + ZERO + "0", "cuda", "torch"),
        (FP16 + ZERO + "2", "cpu", "torch"),
        (FP16 + ZERO + "2", "cuda", "deepspeed"),
        ("optimizer.name=lion " + ZERO + "3", "cpu", "deepspeed"),
        ("optimizer.name=lamb " + ZERO + "3", "cuda", "torch"),
        ("optimizer.name=muon", "cpu", "torch"),
        ("parallel.offload_optimizer=true " + ZERO + "1", "cuda", "deepspeed"),
        ("parallel.offload_parameters=true " + ZERO + "3", "cpu", "deepspeed"),
    ],
)
def test_auto_takes_the_engine_that_is_right(overrides: str, device: str, engine: str) -> None:
    assert chosen(overrides, device) == engine


PP = "parallel.pipeline_parallel_size=2 "
ZBV = "parallel.pipeline_schedule=zbv parallel.virtual_pipeline_stages=2 "
DEEPSPEED, TORCH = "parallel.engine=deepspeed ", "parallel.engine=torch "


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (DEEPSPEED + ZERO + "0", "with parallel.zero_stage as given"),
        (DEEPSPEED + FP16 + ZERO + "1 run.device=cpu", "is_fp16_supported"),
        (DEEPSPEED + "precision.dtype=fp64 " + ZERO + "1", "fp32 at most"),
        (DEEPSPEED + "optimizer.name=lamb " + ZERO + "1", "flat shards"),
        (DEEPSPEED + "optimizer.name=muon " + ZERO + "1", "flat shards"),
        (TORCH + "optimizer.name=muon " + ZERO + "1", "whole matrix"),
        (TORCH + "optimizer.name=adafactor " + ZERO + "3", "whole matrix"),
        (TORCH + "optimizer.name=muon parallel.tensor_parallel_size=2", "whole matrix"),
        (TORCH + "parallel.offload_optimizer=true " + ZERO + "1", "offloading"),
        (TORCH + "parallel.offload_parameters=true " + ZERO + "3", "offloading"),
        (DEEPSPEED + "parallel.offload_parameters=true " + ZERO + "2", "only ZeRO stage 3"),
        (DEEPSPEED + PP + ZERO + "2", "fail under a pipeline"),
        (DEEPSPEED + PP + ZERO + "1 optimizer.layer_lr_decay=0.9", "different groups"),
        (TORCH + PP + ZBV + ZERO + "2", "zero-bubble schedules"),
    ],
)
def test_an_engine_by_name_is_refused_with_the_reason(overrides: str, words: str) -> None:
    (problem,) = problems(overrides)
    assert problem.path == "parallel.engine"
    assert words in problem.rule
    assert problem.hint


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        ("optimizer.name=muon " + ZERO + "1", "optimizer.name", "deepspeed: .*torch: "),
        ("optimizer.name=adafactor " + ZERO + "2", "optimizer.name", "zero_stage=0"),
        ("parallel.offload_optimizer=true", "parallel.offload_optimizer", "stage 0.*offloading"),
        (
            "parallel.offload_parameters=true " + ZERO + "2",
            "parallel.offload_parameters",
            "only ZeRO stage 3",
        ),
        (
            "optimizer.name=lamb parallel.offload_optimizer=true " + ZERO + "1",
            "parallel.offload_optimizer",
            "flat shards",
        ),
    ],
)
def test_what_no_engine_does_is_refused(overrides: str, path: str, words: str) -> None:
    (problem,) = problems(overrides)
    assert problem.path == path
    assert re.search(words, problem.rule), problem.rule
    assert problem.hint.startswith("change ")


CONTEXT = "parallel.context_parallel_size="
TENSOR = "parallel.tensor_parallel_size="
METHOD = "parallel.context_parallel_method="


@pytest.mark.parametrize(
    ("bad", "path", "words", "good"),
    [
        (
            CONTEXT + "2 model.seq_length=30",
            "model.seq_length",
            r"multiple of 4: it is cut into 2 \* parallel.context_parallel_size = 2 \* 2 chunks.*"
            "28 or 32",
            CONTEXT + "2 model.seq_length=28",
        ),
        (
            CONTEXT + "2 " + TENSOR + "3 parallel.sequence_parallel=true model.seq_length=20",
            "model.seq_length",
            "multiple of 12.*share once more.*12 or 24",
            CONTEXT + "2 " + TENSOR + "3 parallel.sequence_parallel=true model.seq_length=24",
        ),
        (
            CONTEXT + "8 " + METHOD + "ulysses",
            "parallel.context_parallel_method",
            r"12 / \(1 \* 8\) = 1.5.*context_parallel_size = 6, or .*ring",
            CONTEXT + "6 model.seq_length=24 " + METHOD + "ulysses",
        ),
        (
            CONTEXT + "4 " + TENSOR + "4 " + METHOD + "ulysses",
            "parallel.context_parallel_method",
            r"12 / \(4 \* 4\) = 0.75.*context_parallel_size = 3, or .*ring",
            CONTEXT + "4 " + TENSOR + "4 " + METHOD + "ring",
        ),
    ],
)
def test_a_sequence_that_cannot_be_cut(bad: str, path: str, words: str, good: str) -> None:
    (problem,) = problems(bad)
    assert problem.path == path
    assert re.search(words, f"{problem.rule} {problem.hint}"), problem
    assert problems(good) == ()


def test_auto_takes_ulysses_where_every_rank_gets_a_head() -> None:
    for layout, method in (
        ("2", "ulysses"),
        ("8", "ring"),
        ("4 " + TENSOR + "3", "ulysses"),
        ("4 " + TENSOR + "4", "ring"),
    ):
        config = load_config({"data": {"path": "d"}}, (CONTEXT + layout).split(), checks=())
        assert config.resolved_context_parallel_method == method


def test_what_depends_on_the_device_is_refused_when_it_is_known() -> None:
    config = load_config(
        {"data": {"path": "d"}}, (DEEPSPEED + FP16 + ZERO + "1").split(), checks=all_checks()
    )
    require_allowed(config, "cuda")
    with pytest.raises(ConfigError, match="is_fp16_supported"):
        require_allowed(config, "cpu")


def test_every_row_gives_a_reason() -> None:
    for row in REFUSALS:
        assert len(row.reason) > 20, row


TENSOR = "parallel.tensor_parallel_size="


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        (TENSOR + "4 model.num_kv_heads=2", "model.num_kv_heads", "size = 4"),
        (TENSOR + "8", "model.num_attention_heads", "size = 8"),
        (
            TENSOR + "2 parallel.sequence_parallel=true model.seq_length=1023",
            "model.seq_length",
            "multiple of parallel.tensor_parallel_size = 2",
        ),
        (TENSOR + "4 model.ffn_hidden_size=3", "model.ffn_hidden_size", "at least .* = 4"),
    ],
)
def test_what_tensor_parallelism_cannot_cut_is_refused_with_the_numbers(
    overrides: str, path: str, words: str
) -> None:
    found = [problem for problem in problems(overrides) if problem.path == path]
    assert len(found) == 1
    assert re.search(words, found[0].rule), found[0].rule
    assert "parallel.tensor_parallel_size" in found[0].hint or "ranks" in found[0].hint
