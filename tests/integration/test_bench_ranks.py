"""The bench's peers of several processes run, and tell what they are asked for."""

from __future__ import annotations

import json
import math

import pytest

from tools.bench.job import Job
from tools.bench.ranks import start_ranks

TINY = Job(
    num_layers=2,
    hidden_size=64,
    num_heads=2,
    vocab_size=2048,
    seq_length=32,
    micro_batch_size=2,
    dtype="fp32",
    warmup=1,
    steps=2,
)
OURS = json.dumps({"engine": "torch", "stage": 3, "passes": 2})


@pytest.mark.parametrize(
    ("module", "variant"), [("megascale_ranks", OURS), ("torch_ranks", "fsdp2/2")]
)
def test_two_ranks_report(module: str, variant: str) -> None:
    rows = start_ranks(module, TINY, variant, 2)
    assert len(rows) == 2
    for row in rows:
        assert all(math.isfinite(loss) for loss in row["losses"])
        assert row["before_mb"] < row["start_mb"]
        assert row["before_mb"] < row["steady_mb"]
        # weights, and two moments, on half of the parameters; the rest is a batch and buffers
        expected = 12 / 2 * TINY.parameters
        assert expected <= row["live_bytes"] < 1.1 * expected + 100_000


def test_a_peer_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="invalid literal for int"):
        start_ranks("torch_ranks", TINY, "fsdp2/two", 2)
