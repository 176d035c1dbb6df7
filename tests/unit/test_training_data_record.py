"""What a checkpoint remembers of its data, and the proof that a resume counts the same."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megascale.config.load import load_config
from megascale.config.schema import Config
from megascale.data.blend import BlendedDataset, Stage
from megascale.data.corpus import ShardIdentity
from megascale.data.ledger import Ledger
from megascale.errors import UserError
from megascale.training.callbacks.ledger import LedgerCallback
from megascale.training.data_record import data_record, describe_change, require_same_samples
from megascale.training.state import TrainState

SHARD = ShardIdentity("shard_00000", 1_000, 20_000, 40_000, "c0", "i0")
NEXT = ShardIdentity("shard_00001", 7, 70, 140, "c1", "i1")


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ([replace(SHARD, documents=999, tokens=19_000), NEXT], "shard shard_00000: 999 documents "),
        ([replace(SHARD, bytes=80_000), NEXT], "80,000 bytes instead of 40,000"),
        ([replace(SHARD, content="x"), NEXT], "shard_00000: the content of its .bin is another"),
        ([SHARD, replace(NEXT, index="x")], "shard_00001: the content of its .idx is another"),
        ([SHARD], "shard shard_00001 is gone"),
        ([SHARD, NEXT, replace(NEXT, prefix="shard_00002")], "shard shard_00002 was not there"),
        ([NEXT, SHARD], "shard shard_00001: was shard_00000, 7 documents instead of 1,000"),
        ([SHARD, NEXT], "the tokenizer is another"),
    ],
)
def test_the_first_shard_that_differs_is_named(now: list[ShardIdentity], said: str) -> None:
    assert said in describe_change([SHARD, NEXT], now)


def _stage(start: int, **weights: float) -> dict[str, Any]:
    pairs = [{"path": path, "weight": weight} for path, weight in weights.items()]
    return {"from_sample": start, "sources": pairs}


def _setup(*stages: dict[str, Any], **sections: Any) -> tuple[Config, Any]:
    config = load_config({"data": {"stages": list(stages)}, **sections})
    corpora = [
        SimpleNamespace(
            fingerprint=f"f-{path}",
            shard_identities=[SHARD],
            path=path,
            was_prefix=lambda fingerprint: fingerprint == "f-prefix",
        )
        for path in config.data.source_paths
    ]
    return config, SimpleNamespace(corpora=corpora, fingerprint="whole")


def _reader(state: dict[str, Any]) -> Any:
    return SimpleNamespace(
        manifest=SimpleNamespace(state=state),
        storage=SimpleNamespace(root="ckpt"),
        attachment=lambda path: b"{}",
    )


def _refusal(old: tuple[Config, Any], new: tuple[Config, Any], seen: int) -> str:
    reader = _reader({"data": data_record(*old)})
    try:
        require_same_samples(reader, *new, seen)
    except UserError as error:
        return str(error)
    return ""


A, AB = _stage(0, a=1.0), _stage(100, a=1.0, b=3.0)


@pytest.mark.parametrize("seen", [0, 1, 100, 101, 500])
@pytest.mark.parametrize(
    ("stages", "allowed_until"),
    [
        ((A, AB), 500),
        ((A, _stage(100, a=0.25, b=0.75)), 500),  # the same shares
        ((A, AB, _stage(500, c=1.0)), 500),
        ((A,), 100),
        ((A, _stage(100, b=3.0, a=1.0)), 100),  # the order of sources orders samples
        ((A, _stage(100, a=1.0, b=2.0)), 100),
        ((A, _stage(101, a=1.0, b=3.0)), 100),
        ((A, _stage(100, a=1.0, c=3.0)), 100),
        ((A, _stage(50, b=1.0), AB), 50),
        ((_stage(0, b=1.0), AB), 0),
    ],
)
def test_only_what_is_to_come_may_change(
    stages: tuple[dict[str, Any], ...], allowed_until: int, seen: int
) -> None:
    message = _refusal(_setup(A, AB), _setup(*stages), seen)
    assert bool(message) == (seen > allowed_until), message


def test_a_prefix_that_has_a_manifest_now_is_told() -> None:
    message = _refusal(_setup(_stage(0, prefix=1.0)), _setup(_stage(0, adopted=1.0)), 4)
    assert "adopted holds the same tokens as prefix, and has a manifest" in message
    assert "give the prefix again (prefix)" in message


def test_what_numbers_the_samples_may_not_change() -> None:
    old = _setup(A)
    for section, change in (
        ("data.packing", {"data": {"stages": [A], "packing": "best_fit"}}),
        ("data.split", {"data": {"stages": [A], "split": [1.0]}}),
        ("model.seq_length", {"model": {"seq_length": 512}}),
    ):
        assert section in _refusal(old, _setup(A, **change), 4)
    masks = {"data": {"stages": [A], "isolate_documents": True}}
    assert not _refusal(old, _setup(A, **masks), 4)


def test_checkpoints_from_before_there_were_stages() -> None:
    reader = _reader({"data_fingerprint": "whole"})
    require_same_samples(reader, *_setup(A), 4)
    other = SimpleNamespace(**{**vars(_setup(A)[1]), "fingerprint": "other"})
    with pytest.raises(UserError, match="fingerprint other"):
        require_same_samples(reader, _setup(A)[0], other, 4)


class _Source:
    seq_length, samples_per_epoch = 8, 5

    def count_tokens(self, first: int, count: int) -> int:
        return 8 * count

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        raise AssertionError("nothing is read to count")

    def spans(self, index: int) -> list[tuple[int, int]]:
        raise AssertionError("nothing is read to count")


def _ledger(share: float) -> LedgerCallback:
    stages = [Stage(0, (0,), (1.0,)), Stage(10, (0, 1), (1.0, share))]
    return LedgerCallback(Ledger(BlendedDataset([_Source(), _Source()], stages, 0), ("a", "b")))


def _start(callback: LedgerCallback, samples_seen: int) -> None:
    trainer: Any = SimpleNamespace(state=TrainState(samples_seen=samples_seen))
    callback.on_fit_start(trainer)


def test_the_ledger_of_a_checkpoint_is_the_arithmetic_of_the_resume() -> None:
    saved = _ledger(4.0)
    _start(saved, 200)
    state = saved.state_dict()
    assert sum(count["samples"] for count in state.values()) == 200
    assert state["a"]["tokens"] == 8 * state["a"]["samples"]
    assert state["b"]["epochs"] == state["b"]["samples"] / 5
    again = _ledger(4.0)
    again.load_state_dict(state)
    _start(again, 200)
    assert again.state_dict() == state
    for other, seen in ((_ledger(0.5), 200), (_ledger(4.0), 199)):
        other.load_state_dict(state)
        with pytest.raises(UserError, match="the checkpoint counted"):
            _start(other, seen)
