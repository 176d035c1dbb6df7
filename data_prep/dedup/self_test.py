"""Precision and recall of the search on duplicates that are planted in a sample of the corpus.

The sample is freed of its own duplicates first, so that what is found was planted. A third of the
planted texts are exact copies, a third are altered a little (1 to 4 % of their words), a third are
decoys (20 to 60 % of their words). What is a duplicate is decided by the Jaccard index of the sets
of n-grams, counted word by word and not estimated.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from data_prep.dedup.join import KEPT, find_duplicates
from data_prep.dedup.signatures import DedupOptions, NearOptions, Signer
from data_prep.dedup.word_hashes import hash_words, ngrams_of_texts
from data_prep.records import SHARD_SUFFIX, Document, read_documents
from data_prep.step import Counts

_DOCUMENTS = 1500
_BYTES = 16 << 20
_FEWEST_WORDS = 50
_SLIGHT, _STRONG = (0.01, 0.04), (0.2, 0.6)


def self_test(folder: Path, names: Sequence[str], options: DedupOptions) -> Counts:
    """Plant, search, compare.

    Args:
        folder, names: the shards to take the sample from.
        options: with exact or near duplicates; lines are found by equality and not tested.

    Returns:
        Sizes of the sample, precision and recall (None where there is nothing to divide by).
    """
    searched = replace(options, lines=False)
    originals = _without_duplicates(_sample(folder, names), searched)
    planted, expected = _plant(originals, searched.near)
    documents = [*originals, *planted]
    fates = find_duplicates([Signer(searched).sign(documents)], searched).fates
    found = fates != KEPT
    wanted = np.concatenate((np.zeros(len(originals), dtype=bool), np.array(expected, dtype=bool)))
    hits = int((found & wanted).sum())
    return {
        "documents": len(documents),
        "planted_duplicates": int(wanted.sum()),
        "planted_decoys": len(planted) - int(wanted.sum()),
        "found": int(found.sum()),
        "precision": round(hits / int(found.sum()), 4) if found.any() else None,
        "recall": round(hits / int(wanted.sum()), 4) if wanted.any() else None,
    }


def _sample(folder: Path, names: Sequence[str]) -> list[Document]:
    """Documents of enough words, some of each shard until there are enough."""
    chosen: list[Document] = []
    size = 0
    most = -(-_DOCUMENTS // len(names))
    for name in names:
        taken = 0
        for _, document in read_documents(folder / f"{name}{SHARD_SUFFIX}"):
            if taken >= most or size >= _BYTES:
                break
            if len(document.text) <= _BYTES // 64 and len(document.text.split()) >= _FEWEST_WORDS:
                chosen.append(document)
                taken += 1
                size += len(document.text)
    return chosen


def _without_duplicates(documents: list[Document], options: DedupOptions) -> list[Document]:
    fates = find_duplicates([Signer(options).sign(documents)], options).fates
    return [document for document, fate in zip(documents, fates, strict=True) if fate == KEPT]


def _plant(
    originals: list[Document], near: NearOptions | None
) -> tuple[list[Document], list[bool]]:
    planted, expected = [], []
    for number, document in enumerate(originals):
        chance = random.Random(xxhash.xxh3_64_intdigest(document.text.encode()))
        kind = number % 3
        text = document.text
        if kind:
            text = _altered(text, chance.uniform(*(_SLIGHT if kind == 1 else _STRONG)), chance)
        planted.append(Document(text, f"{document.id}#planted", document.source))
        if near is None:
            expected.append(text == document.text)
        else:
            expected.append(_jaccard(document.text, text, near.ngram) >= near.threshold)
    return planted, expected


def _altered(text: str, rate: float, chance: random.Random) -> str:
    words = text.split()
    return " ".join(_altered_words(words, rate, chance))


def _altered_words(words: list[str], rate: float, chance: random.Random) -> Iterator[str]:
    """A word may be replaced, left out, or followed by another; others come from the same text."""
    for word in words:
        if chance.random() >= rate:
            yield word
            continue
        change = chance.randrange(3)
        if change == 0:
            yield chance.choice(words) + "x"
        elif change == 1:
            yield from (word, chance.choice(words))


def _jaccard(first: str, second: str, ngram: int) -> float:
    """Of the sets of n-grams, exactly (but for collisions of 64-bit hashes)."""
    texts = [first.encode(), second.encode()]
    hashes, owners = ngrams_of_texts(hash_words(texts), ngram)
    one, other = np.unique(hashes[owners == 0]), np.unique(hashes[owners == 1])
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / max(1, len(one) + len(other) - both)
