"""The comparison of fast and plain losses passes what is the same, and nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megascale.config.performance_schema import PerformanceConfig
from tests.distributed import Pools
from tools.bench import losses
from tools.bench.peers.megascale_step import VARIANTS

TINY = replace(
    losses.JOB,
    num_layers=1,
    hidden_size=32,
    num_heads=2,
    vocab_size=128,
    seq_length=16,
    dtype="fp32",
    steps=3,
)
SAME = [8.0, 7.0, 6.0]
SPREAD = [8.0, 7.07, 6.0]


def curves(fast: list[float], other: list[float] = SPREAD) -> losses.Curves:
    return {losses.FAST: fast, losses.PLAIN: SAME, losses.OTHER: other}


def test_what_is_plain_leaves_nothing_on() -> None:
    assert set(VARIANTS["plain"]["performance"]) == set(PerformanceConfig.model_fields)


@pytest.mark.parametrize(
    ("dtype", "passes", "fails", "why"),
    [
        ("fp32", 1 + 0.9e-5, 1 + 1.1e-5, "differ by 1.1e-05 > 1e-05"),
        ("fp32", 1 - 0.9e-5, 1 - 1.1e-5, "differ by 1.1e-05 > 1e-05"),
        ("bf16", 1.009, 1.011, "differ by 1.1e-02, two seeds only by 1.0e-02"),
    ],
)
def test_the_limit_of_a_type(dtype: str, passes: float, fails: float, why: str) -> None:
    assert losses.failure(dtype, curves(SAME)) is None
    assert losses.failure(dtype, curves([8.0, 7.0, 6.0 * passes])) is None
    assert why in str(losses.failure(dtype, curves([8.0, 7.0, 6.0 * fails])))


def test_many_small_differences_fail_as_one_large_does() -> None:
    why = losses.failure("bf16", curves([8.04, 7.035, 6.03]))
    assert why == "fast and plain differ by 5.0e-03, two seeds only by 3.3e-03"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_number_fails_in_any_run(dtype: str, bad: float) -> None:
    broken = [8.0, bad, 6.0]
    assert f"fast: the loss of step 2 is {bad}" in str(losses.failure(dtype, curves(broken)))
    assert f"weights: the loss of step 2 is {bad}" in str(
        losses.failure(dtype, curves(SAME, broken))
    )


def test_curves_of_unequal_length_are_no_comparison() -> None:
    with pytest.raises(ValueError, match="longer"):
        losses.failure("fp32", curves([8.0, 7.0]))


def test_batches_are_the_text_in_order_without_the_mask() -> None:
    words = losses.text(TINY.vocab_size - 2)
    assert set(words.tolist()) == set(range(TINY.vocab_size - 1))
    seen = []
    for index in range(3):
        inputs, targets = TINY.batch(index)
        assert inputs.shape == targets.shape == (TINY.micro_batch_size, TINY.seq_length)
        assert inputs[:, 1:].equal(targets[:, :-1])
        for row, last in zip(inputs.tolist(), targets[:, -1].tolist(), strict=True):
            seen += [*row, last]
    assert seen == words[: len(seen)].tolist()
    around, _ = TINY.batch(len(words))  # whose number of samples times the text is whole rounds
    assert around.equal(TINY.batch(0)[0])


def train_rank(model: str) -> list[list[float]]:
    """Runs on a rank: fast, plain, plain with other weights, and a fast one that is wrong."""
    job = replace(TINY, model=model, dropout=losses.DROPOUT[model])
    wrong: tuple[dict[str, Any], int] = ({**losses.ON, "schedule": {"name": "linear"}}, 0)
    return [losses.train(job, *how) for how in (*losses.RUNS.values(), wrong)]


@pytest.mark.parametrize("model", ["gpt", "bert"])
def test_real_runs(pools: Pools, model: str) -> None:
    ((fast, plain, other, wrong),) = pools(1).run(train_rank, model=model)
    assert len(fast) == TINY.steps
    found = {losses.FAST: fast, losses.PLAIN: plain, losses.OTHER: other}
    assert losses.failure("fp32", found) is None
    assert max(losses.differences(other, plain)) > 1e-4
    assert "differ by" in str(losses.failure("fp32", {**found, losses.FAST: wrong}))


def test_a_difference_ends_the_tool(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With code 1 and the reason, after the table is shown and written."""
    path = tmp_path / "losses.json"
    monkeypatch.setattr(losses.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(losses.dist, "destroy_process_group", lambda: None)
    ends = {True: 6.0, False: 7.0}
    monkeypatch.setattr(losses, "train", lambda _, how, seed: [8.0, ends[how is losses.ON]])
    monkeypatch.setattr("sys.argv", ["losses", "--models", "gpt", "--json", str(path)])
    with pytest.raises(SystemExit, match=r"gpt, fp32: fast and plain differ by 1\.4e-01") as ended:
        losses.main()
    assert isinstance(ended.value.code, str)  # Python prints it and exits with 1
    assert "1.4e-01" in capsys.readouterr().out
    assert [row[0] for row in json.loads(path.read_text())["rows"]] == ["gpt, fp32", "gpt, bf16"]
