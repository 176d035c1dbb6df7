"""The quality and repetition rules of MassiveText, Gopher's corpus.

Rae et al. 2021, arXiv:2112.11446, appendix A.1.1 and table A1. Words are what white space
separates. A repeated line, paragraph or n-gram counts from its second occurrence on, and a
character in several repeated n-grams counts once; characters are those of words.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from data_prep.clean.rule import Filter, TextView
from data_prep.dedup.word_hashes import KnownHashes

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_BULLETS = ("•", "‣", "◦", "●", "-", "*", "·")
_ELLIPSES = ("...", "…")


class GopherQuality(Filter):
    """Length, word length, symbols, bullets, ellipses, letters and stop words."""

    name: ClassVar[str] = "gopher_quality"

    min_words: int = Field(default=50, ge=0)
    max_words: int = Field(default=100_000, ge=1)
    min_mean_word_length: float = Field(default=3.0, ge=0)
    max_mean_word_length: float = Field(default=10.0, ge=0)
    max_symbol_word_ratio: float = Field(default=0.1, ge=0)
    """Of hash signs and ellipses, each by itself."""
    max_bullet_lines: float = Field(default=0.9, ge=0, le=1)
    """Largest fraction of lines that begin with a bullet point."""
    max_ellipsis_lines: float = Field(default=0.3, ge=0, le=1)
    """Largest fraction of lines that end with an ellipsis."""
    min_alphabetic_words: float = Field(default=0.8, ge=0, le=1)
    """Smallest fraction of words with a letter in them."""
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    min_stop_words: int = Field(default=2, ge=0)
    """How many different ones of `stop_words` must occur."""

    def reason(self, view: TextView) -> str:
        """The first limit that is broken."""
        words, lines = view.words, view.lines
        count = len(words)
        if not self.min_words <= count <= self.max_words:
            return "words"
        mean = sum(map(len, words)) / max(count, 1)
        if not self.min_mean_word_length <= mean <= self.max_mean_word_length:
            return "word_length"
        hashes = view.text.count("#")
        ellipses = view.text.count("...") + view.text.count("…")
        if max(hashes, ellipses) > self.max_symbol_word_ratio * count:
            return "symbols"
        if sum(line.startswith(_BULLETS) for line in lines) > self.max_bullet_lines * len(lines):
            return "bullets"
        if sum(line.endswith(_ELLIPSES) for line in lines) > self.max_ellipsis_lines * len(lines):
            return "ellipses"
        lettered = sum(word.isalpha() or any(map(str.isalpha, word)) for word in words)
        if lettered < self.min_alphabetic_words * count:
            return "letters"
        found = {word.lower() for word in words}.intersection(self.stop_words)
        return "stop_words" if len(found) < self.min_stop_words else ""


class GopherRepetition(Filter):
    """Repeated lines, paragraphs and n-grams of words; table A1."""

    name: ClassVar[str] = "gopher_repetition"

    max_line_fraction: float = Field(default=0.30, ge=0, le=1)
    max_paragraph_fraction: float = Field(default=0.30, ge=0, le=1)
    max_line_characters: float = Field(default=0.20, ge=0, le=1)
    max_paragraph_characters: float = Field(default=0.20, ge=0, le=1)
    max_top_ngram: dict[int, float] = Field(default={2: 0.20, 3: 0.18, 4: 0.16})
    """By words in an n-gram: largest fraction of characters in the most frequent one."""
    max_repeated_ngrams: dict[int, float] = Field(
        default={5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    )
    """By words in an n-gram: largest fraction of characters in all repeated ones."""

    def reason(self, view: TextView) -> str:
        """The first limit that is broken, with the n of n-grams."""
        for parts, kind, of_count, of_characters in (
            (view.lines, "lines", self.max_line_fraction, self.max_line_characters),
            (
                view.paragraphs,
                "paragraphs",
                self.max_paragraph_fraction,
                self.max_paragraph_characters,
            ),
        ):
            count, characters = _repeated(parts)
            if count > of_count:
                return f"repeated_{kind}"
            if characters > of_characters:
                return f"characters_in_repeated_{kind}"
        return self._ngram_reason(view.words)

    def _ngram_reason(self, words: list[str]) -> str:
        numbers: dict[str, int] = {}
        # dense numbers are multiplied once: small ones would make hashes that collide
        ids = np.array([numbers.setdefault(word, len(numbers) + 1) for word in words], np.uint64)
        ids = (ids * _MULTIPLIER) ^ ((ids * _MULTIPLIER) >> np.uint64(29))
        lengths = np.array([len(word) for word in words], dtype=np.int64)
        for size, limit in self.max_top_ngram.items():
            if len(words) > size and _top_ngram(ids, lengths, size) > limit:
                return f"top_{size}_gram"
        everywhere: np.ndarray | None = None
        for size, limit in sorted(self.max_repeated_ngrams.items()):
            if len(words) > size:
                fraction, everywhere = _repeated_ngrams(ids, lengths, size, everywhere)
                if fraction > limit:
                    return f"repeated_{size}_grams"
        return ""


def _repeated(parts: list[str]) -> tuple[float, float]:
    """Fractions of parts, and of their characters, that occurred before."""
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count += 1
            characters += len(part)
        seen.add(part)
    return count / max(len(parts), 1), characters / max(sum(map(len, parts)), 1)


def _ngrams(ids: np.ndarray, size: int, begins: np.ndarray | None = None) -> np.ndarray:
    """A hash of `size` consecutive words from each of `begins` on; None: from every word on."""
    if begins is None:
        begins = np.arange(len(ids) - size + 1)
    result = ids[begins]
    for offset in range(1, size):
        result = result * _MULTIPLIER + ids[begins + offset]
    return result


def _top_ngram(ids: np.ndarray, lengths: np.ndarray, size: int) -> float:
    """Fraction of the characters that is in the most frequent n-gram; the longest of several."""
    ngrams = _ngrams(ids, size)
    ordered = np.sort(ngrams)
    ends = np.flatnonzero(np.concatenate((ordered[1:] != ordered[:-1], [True])))
    counts = np.diff(ends, prepend=-1)
    most = int(counts.max())
    if most < 2:
        return 0.0
    at = KnownHashes(ordered[ends[counts == most]]).positions(ngrams)
    characters = sum(lengths[at + offset] for offset in range(size))
    return most * int(np.max(characters)) / int(lengths.sum())


def _repeated_ngrams(
    ids: np.ndarray, lengths: np.ndarray, size: int, begins: np.ndarray | None
) -> tuple[float, np.ndarray]:
    """Fraction of the characters that is in n-grams which occurred before.

    Args:
        begins: where a shorter n-gram begins that occurs more than once: a longer one that does
            can begin nowhere else. None: not known.

    Returns:
        The fraction, and `begins` for the next size.
    """
    if begins is None:
        ngrams = _ngrams(ids, size)
        ordered = np.sort(ngrams)  # far cheaper than to sort positions, and few are repeated
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        begins = np.zeros(0, dtype=np.int64)
        if repeated.size:
            begins = KnownHashes(repeated).positions(ngrams)
    begins = begins[begins + size <= len(ids)]
    ngrams = _ngrams(ids, size, begins)
    order = np.argsort(ngrams, kind="stable")
    same = ngrams[order][1:] == ngrams[order][:-1]
    later = begins[order[1:][same]]
    several = np.union1d(later, begins[order[:-1][same]])
    steps = np.zeros(len(ids) + 1, dtype=np.int64)
    steps[later] += 1
    steps[later + size] -= 1
    covered = np.cumsum(steps[:-1]) > 0
    return int(lengths[covered].sum()) / int(lengths.sum()), several
