"""How predictable a token stream is without a model: the yardsticks a language model must beat."""

from __future__ import annotations

import numpy as np

from megascale.data.corpus import TokenCorpus

_CHUNK_TOKENS = 1 << 22
_GROUP_PAIRS = 1 << 24


def ngram_entropy(
    corpus: TokenCorpus, token_range: tuple[int, int], group_pairs: int = _GROUP_PAIRS
) -> tuple[float, float]:
    """Plug-in entropies of the stream, (H(x_t), H(x_t | x_{t-1})), in nats a token.

    H(x_t | x_{t-1}) = -sum over pairs (a, b) of p(a, b) log p(b | a), from the pairs that occur.
    Both are what the best unigram and bigram tables *fitted to these very tokens* would reach, so
    on few tokens the second is far below what any model reaches on unseen text.

    Memory is bounded: pairs are counted in groups of first tokens with about `group_pairs` pairs
    each, one pass over the stream a group (17 M tokens are 2 passes).

    Args:
        corpus: where the tokens are.
        token_range: (start, stop); at least 2 tokens.
        group_pairs: pairs held in memory at once.
    """
    start, stop = token_range
    assert stop - start >= 2, f"{token_range} holds no pair of tokens"
    counts = unigram_counts(corpus, start, stop)
    # The last token is the first of no pair.
    first_counts = counts.copy()
    first_counts[corpus.read(stop - 1, 1)[0]] -= 1
    joint_log_sum = 0.0
    for low, high in _groups(first_counts, group_pairs):
        pair_counts = _pair_counts(corpus, start, stop, low, high, group_pairs)
        joint_log_sum += _sum_n_log_n(pair_counts)
    pairs = stop - start - 1
    unigram = np.log(stop - start) - _sum_n_log_n(counts) / (stop - start)
    conditional = (_sum_n_log_n(first_counts) - joint_log_sum) / pairs
    return max(float(unigram), 0.0), max(float(conditional), 0.0)


def most_frequent_token(corpus: TokenCorpus, token_range: tuple[int, int]) -> int:
    """The token that occurs most often in [start, stop); the smallest id of several."""
    return int(np.argmax(unigram_counts(corpus, *token_range)))


def unigram_counts(corpus: TokenCorpus, start: int, stop: int) -> np.ndarray:
    """int64: how often each id occurs in [start, stop), up to the largest that does."""
    counts = np.zeros(0, dtype=np.int64)
    for begin in range(start, stop, _CHUNK_TOKENS):
        chunk = np.bincount(corpus.read(begin, min(_CHUNK_TOKENS, stop - begin)))
        longer, shorter = (chunk, counts) if len(chunk) > len(counts) else (counts, chunk)
        longer[: len(shorter)] += shorter
        counts = longer
    return counts


def _groups(first_counts: np.ndarray, group_pairs: int) -> list[tuple[int, int]]:
    """Ranges [low, high) of first tokens with about `group_pairs` pairs each."""
    totals = np.cumsum(first_counts)
    groups, low = [], 0
    while low < len(first_counts):
        done = int(totals[low - 1]) if low else 0
        high = max(int(np.searchsorted(totals, done + group_pairs, side="right")), low + 1)
        groups.append((low, high))
        low = high
    return groups


def _pair_counts(
    corpus: TokenCorpus, start: int, stop: int, low: int, high: int, group_pairs: int
) -> np.ndarray:
    """How often each pair with its first token in [low, high) occurs; which pair is not told."""
    codes, counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    waiting: list[np.ndarray] = []
    for begin in range(start, stop - 1, _CHUNK_TOKENS):
        tokens = corpus.read(begin, min(_CHUNK_TOKENS + 1, stop - begin))
        first, second = tokens[:-1], tokens[1:]
        chosen = (first >= low) & (first < high)
        waiting.append((first[chosen] << 32) | second[chosen])
        # A single frequent token may have more pairs than a group holds; few are distinct.
        if sum(map(len, waiting)) > group_pairs:
            codes, counts = _merge(codes, counts, waiting)
            waiting = []
    return _merge(codes, counts, waiting)[1]


def _merge(
    codes: np.ndarray, counts: np.ndarray, waiting: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    new_codes, new_counts = np.unique(np.concatenate([*waiting, codes[:0]]), return_counts=True)
    merged, places = np.unique(np.concatenate([codes, new_codes]), return_inverse=True)
    totals = np.zeros(len(merged), dtype=np.int64)
    np.add.at(totals, places, np.concatenate([counts, new_counts]))
    return merged, totals


def _sum_n_log_n(counts: np.ndarray) -> float:
    occurring = counts[counts > 0].astype(np.float64)
    return float(np.sum(occurring * np.log(occurring)))
