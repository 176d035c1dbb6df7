"""Entropies against hand-computed values and against plain counting."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megascale.data import statistics
from megascale.data.corpus import TokenCorpus
from megascale.data.statistics import most_frequent_token, ngram_entropy
from megascale.data.token_file import TokenFileWriter


def _corpus(folder: Path, tokens: list[int]) -> TokenCorpus:
    with TokenFileWriter(folder / "corpus", np.int32) as writer:
        writer.add_document([np.array(tokens)])
    return TokenCorpus.open(folder / "corpus")


def _by_counting(tokens: list[int]) -> tuple[float, float]:
    unigrams, firsts = Counter(tokens), Counter(tokens[:-1])
    pairs = Counter(itertools.pairwise(tokens))
    first = -sum(n / len(tokens) * math.log(n / len(tokens)) for n in unigrams.values())
    total = len(tokens) - 1
    return first, -sum(n / total * math.log(n / firsts[a]) for (a, _), n in pairs.items())


def test_the_most_frequent_token_of_a_part(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path, [4, 7, 9, 7, 9, 9])
    assert most_frequent_token(corpus, (0, 6)) == 9
    assert most_frequent_token(corpus, (0, 5)) == 7, "the smaller id of two"
    assert most_frequent_token(corpus, (0, 1)) == 4


def test_by_hand(tmp_path: Path) -> None:
    # Pairs ab ba ab bb: H(x) = ln 5 - (2 ln 2 + 3 ln 3) / 5; after a always b (2 of 4 pairs);
    # after b once a and once b, so H(x|y) = 1/2 ln 2.
    unigram, bigram = ngram_entropy(_corpus(tmp_path, [7, 9, 7, 9, 9]), (0, 5))
    assert unigram == pytest.approx(math.log(5) - (2 * math.log(2) + 3 * math.log(3)) / 5)
    assert bigram == pytest.approx(0.5 * math.log(2))


def test_a_constant_and_an_alternating_stream(tmp_path: Path) -> None:
    assert ngram_entropy(_corpus(tmp_path, [4] * 9), (0, 9)) == (0.0, 0.0)
    unigram, bigram = ngram_entropy(_corpus(tmp_path, [0, 70_000] * 5), (0, 10))
    assert unigram == pytest.approx(math.log(2))
    assert bigram == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("group_pairs", [1, 50, 10_000])
def test_groups_and_chunks_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_pairs: int
) -> None:
    monkeypatch.setattr(statistics, "_CHUNK_TOKENS", 97)
    tokens = np.random.default_rng(0).zipf(1.5, 2000).clip(max=300).tolist()
    corpus = _corpus(tmp_path, tokens)
    found = ngram_entropy(corpus, (10, 1900), group_pairs=group_pairs)
    assert found == pytest.approx(_by_counting(tokens[10:1900]))
