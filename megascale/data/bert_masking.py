"""Choosing what a masked language model has to predict, by arithmetic.

Each decision is a hash of (key of the sample, what it is about), so a sample is masked in the same
way wherever it is computed, and in another way when it comes again in a later epoch.

Chosen tokens become [MASK] in 80 % of the cases, a random token in 10 %, and stay in 10 %
(arXiv:1810.04805, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megascale.data.permutation import mix64
from megascale.data.protocol import IGNORE_LABEL
from megascale.data.tokenizer import Tokenizer

MaskingUnit = Literal["token", "whole_word", "ngram"]

# What a draw is for.
_CHOSEN, _LENGTH, _FATE, _REPLACEMENT = range(4)
_TO_MASK, _TO_RANDOM = 0.8, 0.9  # below the first: [MASK]; below the second: a random token
_NGRAM_WEIGHTS = np.array([1.0, 1 / 2, 1 / 3])  # of 1, 2 and 3 words (arXiv:1909.11942)
_NGRAM_TAILS = np.cumsum(_NGRAM_WEIGHTS[::-1])[::-1] / _NGRAM_WEIGHTS.sum()  # P(length >= n)


@dataclass(frozen=True)
class MaskedVocabulary:
    """What masking and sample building need to know of a tokenizer.

    Attributes:
        cls_id, sep_id, mask_id, pad_id: special tokens.
        word_starts: (V,) bool, whether an id begins a word.
        ordinary_ids: ids that may replace a token: all but the special ones.
    """

    cls_id: int
    sep_id: int
    mask_id: int
    pad_id: int
    word_starts: np.ndarray
    ordinary_ids: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> MaskedVocabulary:
        """Read it from a tokenizer.

        Raises:
            UserError: the tokenizer lacks one of the special tokens.
        """
        ids = tokenizer.require_bert_tokens().ids
        ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), list(ids.values()))
        return cls(
            ids["cls"], ids["sep"], ids["mask"], ids["pad"], tokenizer.word_starts(), ordinary
        )


@dataclass(frozen=True)
class Masking:
    """How much is masked, in which units.

    Attributes:
        probability: expected share of the tokens that are predicted, in (0, 1).
        unit: "token": each token by itself. "whole_word": all tokens of a word or none. "ngram":
            spans of n <= 3 whole words inside a segment, with weights proportional to 1/n.
    """

    probability: float = 0.15
    unit: MaskingUnit = "token"

    def __post_init__(self) -> None:
        assert 0 < self.probability < 1, self.probability


def mask_tokens(
    input_ids: np.ndarray,
    segments: np.ndarray,
    keys: np.ndarray,
    vocabulary: MaskedVocabulary,
    masking: Masking,
) -> tuple[np.ndarray, np.ndarray]:
    """Mask a batch of samples.

    Args:
        input_ids: (B, T) int64, special tokens and padding included.
        segments: (B, T) int64, 0, 1, ... where a token may be masked, -1 elsewhere.
        keys: (B,) uint64, one a sample.

    Returns:
        input_ids with what was masked replaced, and labels: the original id where a token is to
        be predicted, -100 elsewhere. Both (B, T) int64.
    """
    draws = _Draws(keys)
    positions = np.broadcast_to(np.arange(input_ids.shape[1]), input_ids.shape)
    maskable = segments >= 0
    if masking.unit == "token":
        chosen = draws.below(masking.probability, positions, _CHOSEN)
    else:
        words = _word_numbers(input_ids, segments, vocabulary.word_starts)
        if masking.unit == "whole_word":
            chosen = draws.below(masking.probability, words, _CHOSEN)
        else:
            chosen = _chosen_spans(words, draws, masking.probability)
    chosen &= maskable
    labels = np.where(chosen, input_ids, IGNORE_LABEL)
    masked = draws.below(_TO_MASK, positions, _FATE)
    unchanged = ~draws.below(_TO_RANDOM, positions, _FATE)
    count = np.uint64(len(vocabulary.ordinary_ids))
    picks = (draws.bits(positions, _REPLACEMENT) % count).astype(np.int64)
    replacement = np.where(masked, vocabulary.mask_id, vocabulary.ordinary_ids[picks])
    return np.where(chosen & ~unchanged, replacement, input_ids), labels


class _Draws:
    """Uniform 64-bit numbers by (sample, index, purpose)."""

    def __init__(self, keys: np.ndarray) -> None:
        self._keys = keys[:, None]

    def bits(self, index: np.ndarray, purpose: int) -> np.ndarray:
        """uint64 of the shape of `index`, (B, T) integers >= 0."""
        return mix64(
            self._keys ^ mix64(index.astype(np.uint64) * np.uint64(4) + np.uint64(purpose))
        )

    def below(self, probability: float, index: np.ndarray, purpose: int) -> np.ndarray:
        """Bool of the shape of `index`, True with this probability (< 1)."""
        return self.bits(index, purpose) < np.uint64(int(probability * 2.0**64))


def _word_numbers(
    input_ids: np.ndarray, segments: np.ndarray, word_starts: np.ndarray
) -> np.ndarray:
    """(B, T) int64: equal within a word, one more at the next, three more at the next segment.

    They begin at 3, and the gap keeps a span of three words from reaching into another segment.
    """
    before = np.pad(segments, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    new_segment = (segments != before) & (segments >= 0)
    begins = (word_starts[input_ids] | new_segment) & (segments >= 0)
    return np.cumsum(begins + 2 * new_segment, axis=1)


def _chosen_spans(words: np.ndarray, draws: _Draws, probability: float) -> np.ndarray:
    """Words covered by a span: one that begins at the word, or at one or two words before it.

    Spans may overlap, and those that would begin before a segment reach into it, so that every
    word is covered with exactly `probability`.
    """
    begin = span_probability(probability)
    chosen = np.zeros(words.shape, dtype=bool)
    for distance, reaches in enumerate(_NGRAM_TAILS.tolist()):
        first = np.maximum(words - distance, 0)
        begins = draws.below(begin, first, _CHOSEN)
        # A probability of 1 has no 64-bit threshold; every span covers its first word.
        long_enough = draws.below(reaches, first, _LENGTH) if distance else True
        chosen |= begins & long_enough
    return chosen


def span_probability(probability: float) -> float:
    """How often a span must begin at a word for a word to be covered with `probability`.

    A word stays uncovered when no span that begins d = 0, 1, 2 words before it reaches it: the
    product of (1 - q P(length > d)) over d must be 1 - probability. It falls with q: bisection.
    """
    low, high = 0.0, probability
    for _ in range(60):
        middle = (low + high) / 2
        uncovered = np.prod(1 - middle * _NGRAM_TAILS)
        low, high = (middle, high) if 1 - uncovered < probability else (low, middle)
    return (low + high) / 2
