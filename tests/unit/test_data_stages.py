"""The arithmetic of what a run reads: stages, epochs, ranks, resume points, and its ledger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascale.data import blend as blend_module
from megascale.data.blend import BlendedDataset, Stage
from megascale.data.corpus import TokenCorpus
from megascale.data.gpt_dataset import GPTDataset
from megascale.data.ledger import Ledger, SourceCount
from megascale.data.loader import BatchLoader
from megascale.data.packed_dataset import PackedDataset
from megascale.data.protocol import TrainingSource
from megascale.data.token_file import TokenFileWriter

SMALL_BLOCK = 32  # so that stages of some hundred samples have whole blocks and parts of one
SOURCES = 4


class _Numbered:
    """Sample i of source s is the row [s, i]."""

    seq_length, samples_per_epoch = 2, 10

    def __init__(self, source: int) -> None:
        self.source = source

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        rows = np.stack([np.full_like(indices, self.source), indices], axis=1)
        return {"input_ids": rows, "labels": rows}

    def count_tokens(self, first: int, count: int) -> int:
        return 2 * count

    def spans(self, index: int) -> list[tuple[int, int]]:
        return [(index, 1)]


@st.composite
def mixes(draw: st.DrawFn) -> list[Stage]:
    """Stages in order over some of the sources, which come, go and come back."""
    starts = draw(st.lists(st.integers(1, 300), max_size=4, unique=True))
    stages = []
    for start in [0, *sorted(starts)]:
        sources = draw(st.permutations(range(SOURCES)))[: draw(st.integers(1, SOURCES))]
        weights = [draw(st.integers(1, 9)) / 4 for _ in sources]
        stages.append(Stage(start, tuple(sources), tuple(weights)))
    return stages


def make(stages: Sequence[Stage], seed: int = 0) -> BlendedDataset:
    return BlendedDataset([_Numbered(source) for source in range(SOURCES)], stages, seed)


@settings(max_examples=60, deadline=None)
@given(stages=mixes(), seed=st.integers(0, 5), total=st.integers(1, 400), cut=st.integers(0, 400))
def test_a_change_of_the_mix_skips_nothing_and_repeats_nothing(
    stages: list[Stage], seed: int, total: int, cut: int
) -> None:
    with mock.patch.object(blend_module, "BLOCK_SIZE", SMALL_BLOCK):
        blend = make(stages, seed)
        numbers = np.arange(total)
        sources, inner = blend.locate(numbers)
        for source in range(SOURCES):
            assert np.array_equal(inner[sources == source], np.arange((sources == source).sum()))
        for number, stage in enumerate(stages):
            stop = stages[number + 1].from_sample if number + 1 < len(stages) else total
            assert set(sources[stage.from_sample : stop].tolist()) <= set(stage.sources)
        cut = min(cut, total)
        assert (
            blend.consumed(cut).tolist() == np.bincount(sources[:cut], minlength=SOURCES).tolist()
        )
        # whatever comes later: the samples before it are the same
        shorter = make([stage for stage in stages if stage.from_sample < max(cut, 1)], seed)
        longer = make([*stages, Stage(10**6, (0,), (1.0,))], seed)
        for other in (shorter, longer):
            before = min(cut, total)
            assert np.array_equal(other.locate(numbers[:before])[0], sources[:before])
            assert np.array_equal(other.locate(numbers[:before])[1], inner[:before])


def test_whole_blocks_of_every_stage_hold_exact_shares() -> None:
    stages = [Stage(0, (0, 1), (3, 1)), Stage(100, (1, 2), (1, 3)), Stage(300, (0,), (5,))]
    with mock.patch.object(blend_module, "BLOCK_SIZE", SMALL_BLOCK):
        sources, _ = make(stages).locate(np.arange(400))
    for begin, counts in ((0, [24, 8, 0]), (64, [24, 8, 0]), (100, [0, 8, 24]), (132, [0, 8, 24])):
        assert np.bincount(sources[begin : begin + 32], minlength=3).tolist() == counts
    assert set(sources[300:].tolist()) == {0}


def test_one_stage_is_the_blend_of_old() -> None:
    """Numbers of the blend before there were stages; a run of then goes on as it began."""
    sources, inner = make([Stage(0, (0, 1, 2), (0.5, 0.3, 0.2))], seed=7).locate(np.arange(16))
    assert sources.tolist() == [1, 0, 1, 2, 0, 2, 0, 2, 0, 0, 0, 1, 1, 0, 0, 1]
    assert inner.tolist() == [0, 0, 1, 0, 1, 1, 2, 2, 3, 4, 5, 2, 3, 6, 7, 4]


def test_a_far_stage_costs_nothing() -> None:
    stages = [Stage(0, (0, 1), (1, 3)), Stage(2**45, (1, 0), (3, 5)), Stage(2**52, (0,), (1,))]
    blend = make(stages)
    sources, inner = blend.locate(np.array([2**45 - 1, 2**45, 2**52 + 7]))
    assert inner.dtype == np.int64
    first = 2**45 // 4
    assert blend.consumed(2**45).tolist() == [first, 3 * first, 0, 0]
    assert inner[1] == (3 * first if sources[1] == 1 else first)
    assert blend.consumed(2**52 + 8)[0] == inner[2] + 1
    assert blend.consumed(2**52 + 8).sum() == 2**52 + 8


# Over real token files ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[TokenCorpus]:
    folder = tmp_path_factory.mktemp("corpora")
    rng = np.random.default_rng(3)
    for name in "abc":
        with TokenFileWriter(folder / name, np.uint16) as writer:
            for _ in range(int(rng.integers(12, 30))):
                writer.add_document([rng.integers(0, 900, int(rng.integers(0, 25)))])
    return [TokenCorpus.open(folder / name) for name in "abc"]


def datasets(corpora: list[TokenCorpus], packing: str, length: int) -> list[TrainingSource]:
    found: list[TrainingSource] = []
    for corpus in corpora:
        part = (0, corpus.num_tokens)
        if packing == "concat":
            found.append(GPTDataset(corpus, part, length, 5))
        else:
            found.append(PackedDataset(corpus, part, length, 5, packing))  # type: ignore[arg-type]
    return found


PACKINGS = ("concat", "best_fit", "one_document")
TWO = (Stage(0, (0, 1), (0.7, 0.3)), Stage(45, (2, 0), (1.0, 2.0)), Stage(90, (1,), (1.0,)))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_cut_into_ranks_and_micro_batches_reads_the_same(
    corpora: list[TokenCorpus], data: st.DataObject
) -> None:
    packing = data.draw(st.sampled_from(PACKINGS))
    dp, micro, rounds = (data.draw(st.integers(1, 4)) for _ in range(3))
    seen = data.draw(st.integers(0, 130))
    blend = BlendedDataset(datasets(corpora, packing, data.draw(st.integers(2, 30))), TWO, 5)
    size = dp * micro * rounds
    expected = blend.batch(np.arange(seen, seen + size))
    ids, rows = [], []
    for rank in range(dp):
        loader = BatchLoader(blend, size, micro, rank, dp, prefetch=data.draw(st.booleans()))
        for batch in loader.load(seen):
            assert len(batch["input_ids"]) == micro
            ids += batch["sample_ids"].tolist()
            rows.append({name: batch[name].numpy() for name in expected})
        loader.close()
    assert ids == list(range(seen, seen + size))  # no overlap, nothing left out
    for name, values in expected.items():
        assert np.array_equal(np.concatenate([row[name] for row in rows]), values)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_each_source_gives_every_sample_once_an_epoch(
    corpora: list[TokenCorpus], data: st.DataObject
) -> None:
    packing = data.draw(st.sampled_from(PACKINGS))
    blend = BlendedDataset(datasets(corpora, packing, data.draw(st.integers(2, 30))), TWO, 5)
    total = data.draw(st.integers(1, 400))
    sources, inner = blend.locate(np.arange(total))
    for source, dataset in enumerate(blend.datasets):
        mine = inner[sources == source]
        for epoch in range(len(mine) // dataset.samples_per_epoch):
            numbers = mine[mine // dataset.samples_per_epoch == epoch]
            shown = [tuple(dataset.spans(number)) for number in numbers.tolist()]
            assert len(shown) == len(set(shown)) == dataset.samples_per_epoch


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_ledger_is_the_count(corpora: list[TokenCorpus], data: st.DataObject) -> None:
    packing = data.draw(st.sampled_from(PACKINGS))
    length = data.draw(st.integers(2, 30))
    blend = BlendedDataset(datasets(corpora, packing, length), TWO, 5)
    ledger = Ledger(blend, ("a", "b", "c"))
    for total in data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=4)):  # any order
        expected: dict[str, Any] = {}
        sources, inner = blend.locate(np.arange(total))
        for source, name in enumerate(ledger.names):
            mine = inner[sources == source].tolist()
            spans = [blend.datasets[source].spans(number) for number in mine]
            tokens = sum(min(sum(size for _, size in pieces), length) for pieces in spans)
            if mine:
                epochs = len(mine) / blend.datasets[source].samples_per_epoch
                expected[name] = SourceCount(len(mine), tokens, epochs)
        assert ledger.at(total) == expected
        assert ledger.tokens(total) == sum(count.tokens for count in expected.values())


def test_longer_runs_and_other_workers_begin_alike(
    corpora: list[TokenCorpus], tmp_path: Path
) -> None:
    """Sample n does not know how many are asked for, nor in which order."""
    for packing in PACKINGS:
        blend = BlendedDataset(datasets(corpora, packing, 9), TWO, 5)
        whole = blend.batch(np.arange(200))
        order = np.random.default_rng(0).permutation(200)
        again = BlendedDataset(datasets(corpora, packing, 9), TWO[:2], 5).batch(order[order < 90])
        for name, values in again.items():
            assert np.array_equal(values, whole[name][order[order < 90]])
