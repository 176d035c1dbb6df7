"""In fp64 layouts differ by 1e-14: the prover settles with it what fp32 leaves open."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale.cli.config import all_checks
from megascale.config.load import load_config
from megascale.verification.compare import FP32, FP64, Difference, Verdict, compare
from megascale.verification.layout import SINGLE, Layout
from megascale.verification.record import RunRecord, read_record, record_run
from megascale.verification.report import Row, explain, progress
from tests.distributed import Pools
from tests.parity.test_engines import settings_of

STEPS = 8
MODEL = {
    "model.hidden_size": 40,
    "model.seq_length": 24,
    "model.position_embedding": "rope",
    "model.norm": "rmsnorm",
    "model.activation": "swiglu",
    "model.bias": False,
    "model.qk_norm": True,
    "model.attention_softcap": 20.0,
    "model.dropout": 0.1,
    "train.micro_batch_size": 1,
    "train.label_smoothing": 0.1,
    "train.z_loss": 1e-3,
    "optimizer.name": "adamw",
    "precision.dtype": "fp64",
}
LAYOUTS = [
    Layout(tp=2, sp=1, zero=1, engine="torch", recompute="full"),
    Layout(cp=2, method="ring", engine="torch"),
    Layout(dp=2, zero=3, engine="torch"),
    Layout(tp=2, pp=2, schedule="1f1b", zero=2, engine="torch"),
]


def _record(settings: dict[str, Any], folder: str, layout: Layout) -> None:
    """Runs on every rank."""
    config = load_config(
        settings, layout.overrides(), checks=all_checks(), world_size=layout.world_size
    )
    record_run(config, torch.device("cpu"), STEPS, Path(folder) / str(layout))


@pytest.fixture(scope="module")
def expected(pools: Pools, token_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exact")
    settings = settings_of(token_prefix, MODEL)
    pools(1).run(_record, settings=settings, folder=str(folder), layout=SINGLE)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts_are_the_same_to_fp64s_own_rounding(
    pools: Pools, token_prefix: Path, expected: Path, tmp_path: Path, layout: Layout
) -> None:
    settings = settings_of(token_prefix, MODEL)
    pools(layout.world_size).run(_record, settings=settings, folder=str(tmp_path), layout=layout)
    found = read_record(tmp_path / str(layout), layout.world_size)
    reference = read_record(expected / str(SINGLE), 1)
    with contextlib.closing(found), contextlib.closing(reference):
        assert (
            reference.whole(0, "grad", reference.names[0]).dtype
            == torch.tensor([]).double().numpy().dtype
        )
        verdict = compare(found, reference, layout, FP64, micro=2, lr=1e-3)
        assert verdict.first is None, verdict.first
        assert 0 < verdict.gradient < 1e-12  # another order of summation, but no other numbers

        off = _damaged(found)
        assert compare(off, reference, layout, FP32, micro=2, lr=1e-3).first is None
        first = compare(off, reference, layout, FP64, micro=2, lr=1e-3).first
        assert first is not None
        assert (first.step, first.what) == (3, "loss")


def _damaged(record: RunRecord) -> RunRecord:
    """A loss that is off by what fp32 cannot tell from rounding."""
    losses = list(record.losses)
    losses[2] *= 1 + 1e-8
    return replace(record, losses=losses)


def _verdict(what: str = "", size: float = 0.0) -> Verdict:
    first = Difference(20, what, "", size, "look there", "") if what else None
    return Verdict(loss=size, norm=size, gradient=size, weight=size, first=first)


def test_only_small_differences_of_numbers_are_settled() -> None:
    layout = Layout(cp=2, method="ring")
    small = Row(layout, {"config": _verdict(), "sgd": _verdict("gradient norm", 1.2e-5)})
    large = Row(layout, {"sgd": _verdict("gradient", 2e-3)})
    order = Row(layout, {"sgd": _verdict("samples", 1.0)})
    broken = Row(layout, {"sgd": _verdict("loss", float("nan"))})
    assert [row.may_be_rounding for row in (small, large, order, broken)] == [True] + 3 * [False]
    same = Row(layout, {"sgd": _verdict(size=3e-15)})
    assert not same.may_be_rounding

    assert not small.agrees
    assert "off a little" in progress(small, is_settled_later=True)
    assert "DIFFERS" in progress(small)
    assert "DIFFERS" in progress(large)
    assert replace(small, exact=same).agrees
    assert "3.0e-15" in "".join(explain(replace(small, exact=same)))
    for row in (large, order, broken):
        assert not replace(row, exact=same).agrees

    differs = Row(layout, {"sgd": _verdict("gradient norm", 1.1e-5)})
    assert not replace(small, exact=differs).agrees
    assert not replace(small, exact=Row(layout, {}, failure="rank 1: lost")).agrees
    assert "differs, too" in "".join(explain(replace(small, exact=differs)))
