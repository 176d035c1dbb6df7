"""The n-grams of evaluation sets, and where they occur in other texts.

Brown et al. 2020 (GPT-3), arXiv:2005.14165, appendix C: n-grams of 13 lower-cased words without
punctuation; shorter examples are searched as a whole, down to 8 words.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.dedup.word_hashes import KnownHashes, hash_ngrams, hash_words
from megascale.errors import UserError


@dataclass(frozen=True)
class Hit:
    """N-grams of one text that evaluation sets hold.

    Attributes:
        text: number of the text in the batch.
        spans: (h, 2) begin and end in the bytes of the text, ascending.
        entries: rows of the index that were hit.
    """

    text: int
    spans: np.ndarray
    entries: np.ndarray


@dataclass(frozen=True)
class EvaluationIndex:
    """Sorted n-gram hashes of all sets.

    Attributes:
        set_names: the names of the sets.
        examples: examples of each set.
        too_short: examples of each set that are too short to be searched for.
        sizes: words in an n-gram -> (hashes, sets, examples), (m,) sorted by hash.
    """

    set_names: tuple[str, ...]
    examples: tuple[int, ...]
    too_short: tuple[int, ...]
    sizes: dict[int, tuple[KnownHashes, np.ndarray, np.ndarray]]

    @classmethod
    def build(
        cls, sets: Iterable[tuple[str, Iterable[str]]], ngram: int, min_words: int
    ) -> EvaluationIndex:
        """Index the examples of named sets.

        Raises:
            UserError: no example is long enough.
        """
        names, counts, short = [], [], []
        rows: dict[int, list[tuple[np.ndarray, int, int]]] = {}
        for number, (name, texts) in enumerate(sets):
            count = too_short = 0
            for text in texts:
                words = hash_words([text.encode()]).hashes
                size = min(ngram, len(words))
                if size < min_words:
                    too_short += 1
                else:
                    found = np.unique(hash_ngrams(words, size))
                    rows.setdefault(size, []).append((found, number, count))
                count += 1
            names.append(name)
            counts.append(count)
            short.append(too_short)
        if not rows:
            raise UserError(
                f"the evaluation sets hold no example of {min_words} words "
                f"({sum(counts)} examples read)",
                rule="shorter texts occur by chance",
                remedy="check --against and its text key, or lower --min-words",
            )
        sizes = {size: _sorted(found) for size, found in sorted(rows.items())}
        return cls(tuple(names), tuple(counts), tuple(short), sizes)

    def search(self, texts: list[bytes]) -> Iterator[Hit]:
        """The texts that share an n-gram with a set, in order."""
        words = hash_words(texts)
        places, entries, ends = [], [], []
        first_entry = 0
        for size, (known, _, _) in self.sizes.items():
            hashes, ngrams = known.ordered, hash_ngrams(words.hashes, size)
            at = known.positions(ngrams)
            owners = np.searchsorted(words.bounds, at, side="right") - 1
            at = at[at + size <= words.bounds[owners + 1]]  # not across the end of a text
            low = np.searchsorted(hashes, ngrams[at], side="left")
            high = np.searchsorted(hashes, ngrams[at], side="right")
            counts = high - low
            places.append(np.repeat(at, counts))
            ends.append(np.repeat(words.ends[at + size - 1], counts))
            offsets = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
            entries.append(np.repeat(low, counts) + offsets + first_entry)
            first_entry += len(hashes)
        begin = np.concatenate(places)
        order = np.argsort(begin, kind="stable")
        begin, end = begin[order], np.concatenate(ends)[order]
        entry = np.concatenate(entries)[order]
        owners = np.searchsorted(words.bounds, begin, side="right") - 1
        for text in np.unique(owners).tolist():
            own = owners == text
            spans = np.stack((words.begins[begin[own]], end[own]), axis=1)
            yield Hit(text, spans - words.text_begins[text], entry[own])

    def sets_and_examples(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(h,) number of the set and of the example of rows of the index."""
        sets = np.concatenate([rows[1] for rows in self.sizes.values()])
        examples = np.concatenate([rows[2] for rows in self.sizes.values()])
        return sets[entries], examples[entries]


def _sorted(
    found: list[tuple[np.ndarray, int, int]],
) -> tuple[KnownHashes, np.ndarray, np.ndarray]:
    counts = [len(hashes) for hashes, _, _ in found]
    hashes = np.concatenate([hashes for hashes, _, _ in found])
    sets = np.repeat(np.array([number for _, number, _ in found], dtype=np.int32), counts)
    examples = np.repeat(np.array([example for _, _, example in found], dtype=np.int64), counts)
    order = np.argsort(hashes, kind="stable")
    return KnownHashes(hashes[order]), sets[order], examples[order]
