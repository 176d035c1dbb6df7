"""A corpus of sentences cut into runs: as many whole sentences of one document as fit a sample.

    document      s0 s0 s0 | s1 s1 | s2 s2 s2 s2 || s3 ...     capacity 6
    runs         [s0 s0 s0   s1 s1] [s2 s2 s2 s2]  [s3 ...

Runs lie one after the other without a gap, so each is known by its first token; a sentence that is
longer than a run is cut into nearly equal pieces, and nothing is ever left out.
"""

from __future__ import annotations

import numpy as np

from megascale.data.corpus import TokenCorpus

_DOCUMENTS_AT_ONCE = 65_536


def run_starts(corpus: TokenCorpus, token_range: tuple[int, int], capacity: int) -> np.ndarray:
    """(runs + 1,) int64: the position of each run's first token, and the part's end.

    Built in numpy, some thousand documents at a time: the memory is 8 bytes a run, and for one
    block of documents some arrays with an entry a sentence.

    Args:
        corpus: a sequence of it is a sentence.
        token_range: (start, stop), cut between documents.
        capacity: largest number of tokens of a run.
    """
    start, stop = token_range
    assert capacity >= 1
    documents = np.unique(corpus.boundaries(start, stop - start))
    if not documents.size or documents[0] != start:
        documents = np.append(start, documents)
    parts = []
    for first in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        block = documents[first : first + _DOCUMENTS_AT_ONCE]
        following = first + _DOCUMENTS_AT_ONCE
        end = int(documents[following]) if following < len(documents) else stop
        parts.append(_block_runs(corpus, block, end, capacity))
    return np.append(np.concatenate(parts), stop)


def _block_runs(corpus: TokenCorpus, documents: np.ndarray, end: int, capacity: int) -> np.ndarray:
    """First tokens of the runs of consecutive documents, of which the last ends at `end`."""
    sentences = corpus.sequence_starts(int(documents[0]), end)
    pieces = _cut_long(np.union1d(sentences, documents), end, capacity)
    ends = np.append(pieces[1:], end)
    # The first piece of each document, and one past its last.
    first = np.searchsorted(pieces, documents)
    last = np.append(first[1:], len(pieces))
    # For each piece: the piece after the longest run that begins with it.
    fitting = np.searchsorted(ends, pieces + capacity, side="right")
    following = np.minimum(fitting, np.repeat(last, last - first))
    begun = []
    while first.size:  # one run further in every document at once
        begun.append(first)
        first = following[first]
        unfinished = first < last
        first, last = first[unfinished], last[unfinished]
    return pieces[np.sort(np.concatenate(begun))]


def _cut_long(starts: np.ndarray, end: int, capacity: int) -> np.ndarray:
    """Starts of sentences, with further ones inside those that are longer than `capacity`."""
    lengths = np.diff(starts, append=end)
    counts = -(-lengths // capacity)
    if counts.max(initial=1) == 1:
        return starts
    sizes = -(-lengths // counts)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(starts, counts) + number * np.repeat(sizes, counts)
