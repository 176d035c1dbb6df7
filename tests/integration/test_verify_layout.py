"""`megascale verify layout` proves what is right; what is not: test_planted_bugs.py."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megascale.cli.config import all_checks
from megascale.config.load import load_config
from megascale.errors import UserError
from megascale.kernels import passes
from megascale.kernels.library import Library
from megascale.verification.compare import FP32, TOLERANCES, Verdict, compare
from megascale.verification.distances import distances
from megascale.verification.layout import SINGLE, Layout, legal_layouts, parse_layouts
from megascale.verification.record import read_record, record_run
from tests.bert_data import make_bert_dataset
from tests.distributed import Pools
from tests.integration.runs import run, write_config
from tests.parity.test_engines import settings_of

MODEL = {
    "model.hidden_size": 40,
    "model.seq_length": 24,
    "train.micro_batch_size": 2,
    "optimizer.name": "sgd",
    "optimizer.lr": 0.1,
    "optimizer.grad_clip": 0.0,
}


def _record(settings: dict[str, Any], folder: str, layout: Layout, steps: int = 2) -> None:
    """Runs on every rank."""
    config = load_config(
        settings, layout.overrides(), checks=all_checks(), world_size=layout.world_size
    )
    record_run(config, torch.device("cpu"), steps, Path(folder) / str(layout))


@pytest.fixture(scope="module")
def expected(pools: Pools, token_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    settings = settings_of(token_prefix, MODEL)
    pools(1).run(_record, settings=settings, folder=str(folder), layout=SINGLE)
    return folder


def _verdict(pools: Pools, prefix: Path, folder: Path, tmp_path: Path, layout: Layout) -> Verdict:
    settings = settings_of(prefix, MODEL)
    pools(layout.world_size).run(_record, settings=settings, folder=str(tmp_path), layout=layout)
    found = read_record(tmp_path / str(layout), layout.world_size)
    reference = read_record(folder / str(SINGLE), 1)
    with contextlib.closing(found), contextlib.closing(reference):
        return compare(found, reference, layout, FP32, micro=4 // layout.dp, lr=0.1)


TENSOR = Layout(tp=2, engine="torch")
SEQUENCE = Layout(tp=2, sp=1, engine="torch")
REPLICAS = Layout(dp=2, engine="torch")


@pytest.mark.parametrize("layout", [TENSOR, SEQUENCE, REPLICAS], ids=str)
def test_what_is_right_agrees(
    pools: Pools, token_prefix: Path, expected: Path, tmp_path: Path, layout: Layout
) -> None:
    verdict = _verdict(pools, token_prefix, expected, tmp_path, layout)
    assert verdict.first is None
    assert 0 <= verdict.gradient < 1e-5


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_cut_sequence_in_half_precision(
    pools: Pools, token_prefix: Path, tmp_path: Path, dtype: str
) -> None:
    settings = settings_of(token_prefix, {**MODEL, "precision.dtype": dtype})
    ring = Layout(cp=2, method="ring", zero=1, engine="torch")
    for layout in (SINGLE, ring):
        run_on = pools(layout.world_size)
        run_on.run(_record, settings=settings, folder=str(tmp_path), layout=layout)
    found = read_record(tmp_path / str(ring), 2)
    reference = read_record(tmp_path / str(SINGLE), 1)
    with contextlib.closing(found), contextlib.closing(reference):
        verdict = compare(found, reference, ring, TOLERANCES[dtype], micro=4, lr=0.1)
        assert verdict.first is None, verdict.first
        assert verdict.gradient > FP32.gradient  # it did compute in half precision


def _record_compiled(settings: dict[str, Any], folder: str, layout: Layout) -> int:
    """Runs on every rank: as `_record`, also where compiled attention is slow; counts its calls."""
    wanted = mock.patch.object(Library, "has_fast_products", property(lambda one: one.enabled))
    with wanted, mock.patch.object(passes, "attention", wraps=passes.attention) as kernel:
        _record(settings, folder, layout)
    return kernel.call_count


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=2, engine="torch"),
        Layout(tp=2, sp=1, engine="torch"),
        Layout(cp=2, method="ulysses", zero=3, engine="torch"),
        Layout(dp=2, zero=3, engine="deepspeed", recompute="full"),
        Layout(pp=2, schedule="zbv", vpp=2, engine="torch"),
    ],
    ids=str,
)
def test_compiled_attention_is_the_same_training(
    pools: Pools, token_prefix: Path, tmp_path: Path, layout: Layout
) -> None:
    wide = {"model.hidden_size": 64, "model.num_kv_heads": 2, "precision.dtype": "bf16"}
    settings = settings_of(token_prefix, {**MODEL, **wide, "model.num_layers": 4})
    for one in (SINGLE, layout):
        run_on = pools(one.world_size)
        calls = run_on.run(_record_compiled, settings=settings, folder=str(tmp_path), layout=one)
        assert min(calls) > 0
    found, reference = (
        read_record(tmp_path / str(layout), 2),
        read_record(tmp_path / str(SINGLE), 1),
    )
    with contextlib.closing(found), contextlib.closing(reference):
        micro = 4 // layout.dp
        verdict = compare(found, reference, layout, TOLERANCES["bf16"], micro=micro, lr=0.1)
        assert verdict.first is None, verdict.first


@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_a_head_of_the_first_token_counts_where_that_token_is(
    pools: Pools, tmp_path: Path, method: str
) -> None:
    bert = {"model.family": "bert", "model.activation": "gelu", "model.vocab_size": 281}
    prefix = make_bert_dataset(tmp_path)
    settings = settings_of(prefix, {**MODEL, **bert, "data.sentence_objective": "nsp"})
    cut = Layout(cp=2, method=method, engine="torch")
    for layout in (SINGLE, cut):
        run_on = pools(layout.world_size)
        run_on.run(_record, settings=settings, folder=str(tmp_path), layout=layout)
    found, reference = read_record(tmp_path / str(cut), 2), read_record(tmp_path / str(SINGLE), 1)
    with contextlib.closing(found), contextlib.closing(reference):
        assert "sentence_head.dense" in found.outputs[0]
        verdict = compare(found, reference, cut, FP32, micro=4, lr=0.1)
        assert verdict.first is None, verdict.first


FLAT = Layout(tp=2, zero=3, engine="deepspeed")


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_copies_of_a_weight_stay_alike_in_flat_partitions(
    pools: Pools, token_prefix: Path, tmp_path: Path, optimizer: str
) -> None:
    """An uneven cut puts them at different places of DeepSpeed's partitions: not one bit differs.

    torch's fused updates round the last few elements of a tensor otherwise than all others.
    """
    settings = settings_of(token_prefix, {**MODEL, "optimizer.name": optimizer})
    settings["optimizer"] = {"name": optimizer, "lr": 1e-2, "grad_clip": 0.0}
    settings["train"]["global_batch_size"] = 2
    pools(2).run(_record, settings=settings, folder=str(tmp_path), layout=FLAT, steps=12)
    found = read_record(tmp_path / str(FLAT), 2)
    with contextlib.closing(found):
        assert found.ranks[0].keys() == found.ranks[1].keys()
        drift = distances(found, found).drift
    assert drift
    assert not [key for key, steps in drift.items() if steps.any()]


def test_layouts_are_parsed_and_refused() -> None:
    assert parse_layouts("dp=4; tp=2,dp=2,zero=1,sp=1") == [
        Layout(dp=4),
        Layout(dp=2, tp=2, zero=1, sp=1),
    ]
    assert parse_layouts(str(SEQUENCE)) == [SEQUENCE]
    context = Layout(tp=2, sp=1, cp=4, method="ring")
    assert parse_layouts(str(context)) == [context]
    assert context.world_size == 8
    for text, words in (
        ("pq=2", "pq=2"),
        ("tp=0", "at least 1"),
        ("zero=4", "0 to 3"),
        ("method=x", "ulysses"),
    ):
        with pytest.raises(UserError, match=words):
            parse_layouts(text)


def test_auto_takes_every_legal_layout(token_prefix: Path) -> None:
    settings = settings_of(token_prefix, MODEL)

    def check(layout: Layout) -> None:
        load_config(settings, layout.overrides(), checks=all_checks(), world_size=layout.world_size)

    found = list(legal_layouts(2, check))
    # dp 2, tp 2, tp 2 with sp, and cp 2 by two methods, each 7 of (engine, stage), each 3
    # recomputations; pp 2 by two schedules, for which DeepSpeed has stage 1 only
    assert len(found) == (5 * 7 + 2 * 5) * 3
    assert {one.method for one in found if one.cp == 2} == {"ulysses", "ring"}
    assert len(set(found)) == len(found)
    assert not any(one.engine == "deepspeed" and one.zero == 0 for one in found)


_SENT = ("all_gather", "all_reduce", "reduce_scatter", "scalar")


def test_the_command(token_prefix: Path, tmp_path: Path) -> None:
    settings = settings_of(token_prefix, {**MODEL, "train.global_batch_size": 4})
    config = write_config(tmp_path / "config.yaml", settings)
    done = run("verify", "layout", config, "--layouts", "tp=2,sp=1", "--steps", "1", "--json")
    assert done.code == 0, done.output
    (row,) = json.loads(done.stdout)
    assert row["agrees"]
    assert set(row["variants"]) == {"config", "sgd"}
    assert row["variants"]["sgd"]["gradient"] < 1e-5
    assert set(row["sent_bytes"]) == {f"tp {kind}" for kind in _SENT}
    assert row["held_bytes"]["weights"] == row["held_bytes"]["states"]  # momentum


def _threads_of(settings: dict[str, Any], folder: str, layouts: list[Layout]) -> list[int]:
    """Runs on every rank: its threads after each recorded layout."""
    counts = []
    for layout in layouts:
        _record(settings, folder, layout)
        counts.append(len(list(Path("/proc/self/task").iterdir())))
    return counts


def test_threads_of_groups_end_with_their_layout(
    pools: Pools, token_prefix: Path, tmp_path: Path
) -> None:
    """FSDP2's caches kept each mesh, and three polling threads of each of its groups."""
    sharded = [Layout(dp=2, zero=stage, engine="torch") for stage in (1, 2, 3)]
    settings = settings_of(token_prefix, MODEL)
    counts = pools(2).run(
        _threads_of, settings=settings, folder=str(tmp_path), layouts=[*sharded, *sharded]
    )
    for after in counts:
        assert after[-1] <= after[0], after
