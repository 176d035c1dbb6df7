"""Masking: how much, in which units, replaced by what, and decided by what."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from megascale.data.bert_masking import (
    MaskedVocabulary,
    Masking,
    MaskingUnit,
    mask_tokens,
    span_probability,
)

VOCAB = 500
UNITS = get_args(MaskingUnit)
ROWS, LENGTH = 400, 128


def _vocabulary(word_length: int = 3) -> MaskedVocabulary:
    """Each `word_length`-th id begins a word."""
    starts = np.arange(VOCAB) % word_length == 0
    return MaskedVocabulary(1, 2, 3, 0, starts, np.arange(4, VOCAB))


def _batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Consecutive ids, two segments with a separator, and padding."""
    rng = np.random.default_rng(0)
    ids = (rng.integers(4, VOCAB, (ROWS, 1)) + np.arange(LENGTH)) % (VOCAB - 4) + 4
    segments = np.zeros_like(ids)
    segments[:, 60:] = 1
    for place in (0, 59, 119):
        segments[:, place] = -1
    segments[:, 119:] = -1
    return ids, segments, rng.integers(0, 2**63, ROWS, dtype=np.uint64)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_share_and_fate_of_the_chosen(unit: MaskingUnit, probability: float) -> None:
    ids, segments, keys = _batch()
    vocabulary = _vocabulary()
    masked, labels = mask_tokens(ids, segments, keys, vocabulary, Masking(probability, unit))
    chosen = labels != -100
    assert not chosen[segments < 0].any()
    assert np.array_equal(labels[chosen], ids[chosen])
    assert np.array_equal(masked[~chosen], ids[~chosen])
    # 46,800 tokens; words and spans are decided as one, so there are fewer free decisions
    assert chosen[segments >= 0].mean() == pytest.approx(probability, abs=0.012)
    # every position alike: also at the ends of segments, where no span begins before
    by_position = chosen.mean(axis=0)[(segments >= 0)[0]]
    assert np.abs(by_position - probability).max() < 5 * np.sqrt(probability / ROWS)
    now = masked[chosen]
    assert (now == vocabulary.mask_id).mean() == pytest.approx(0.8, abs=0.02)
    assert (now == ids[chosen]).mean() == pytest.approx(0.1, abs=0.015)
    drawn = now[(now != vocabulary.mask_id) & (now != ids[chosen])]
    assert drawn.min() >= 4, "no special token is drawn"
    assert len(np.unique(drawn)) > 0.5 * min(VOCAB, len(drawn))


@pytest.mark.parametrize("unit", ["whole_word", "ngram"])
def test_words_are_masked_as_a_whole(unit: MaskingUnit) -> None:
    ids, segments, keys = _batch()
    vocabulary = _vocabulary()
    _, labels = mask_tokens(ids, segments, keys, vocabulary, Masking(0.3, unit))
    chosen = labels != -100
    inside = (segments[:, 1:] >= 0) & (segments[:, :-1] == segments[:, 1:])
    continues = inside & ~vocabulary.word_starts[ids[:, 1:]]
    assert continues.any()
    assert np.array_equal(chosen[:, 1:][continues], chosen[:, :-1][continues])
    _, by_token = mask_tokens(ids, segments, keys, vocabulary, Masking(0.3, "token"))
    parted = (by_token[:, 1:] != -100)[continues] != (by_token[:, :-1] != -100)[continues]
    assert parted.any(), "single tokens do part words"


def test_spans_have_one_to_three_words() -> None:
    """With words of one token and few spans, runs of chosen tokens are the spans: 6 : 3 : 2."""
    ids, segments, keys = _batch()
    _, labels = mask_tokens(ids, segments, keys, _vocabulary(1), Masking(0.02, "ngram"))
    chosen = np.pad((labels != -100)[:, 1:59], ((0, 0), (1, 1)))
    edges = np.diff(chosen.astype(int), axis=1)
    whole = chosen[:, 1] + chosen[:, -2] == 0  # a span may be cut at the end of a segment
    lengths = np.concatenate(
        [np.flatnonzero(row == -1) - np.flatnonzero(row == 1) for row in edges[whole]]
    )
    assert len(lengths) > 100
    shares = [float((lengths == n).mean()) for n in (1, 2, 3)]
    assert shares == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.12)
    assert (lengths <= 3).mean() > 0.93


def test_span_probability_covers_each_word_as_asked() -> None:
    for probability in (0.01, 0.15, 0.6, 0.99):
        begin = span_probability(probability)
        uncovered = (1 - begin) * (1 - begin * 5 / 11) * (1 - begin * 2 / 11)
        assert 1 - uncovered == pytest.approx(probability, abs=1e-12)


@pytest.mark.parametrize("unit", UNITS)
def test_a_sample_is_masked_by_its_key_alone(unit: MaskingUnit) -> None:
    ids, segments, keys = _batch()
    masking = Masking(0.15, unit)
    whole = mask_tokens(ids, segments, keys, _vocabulary(), masking)
    rows = np.array([7, 3])
    alone = mask_tokens(ids[rows], segments[rows], keys[rows], _vocabulary(), masking)
    for a, b in zip(alone, whole, strict=True):
        assert np.array_equal(a, b[rows])
    other = mask_tokens(ids, segments, keys + np.uint64(1), _vocabulary(), masking)
    assert not np.array_equal(other[1], whole[1])
