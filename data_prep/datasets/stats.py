"""Statistics of a dataset: lengths of documents, use of the vocabulary, shards; JSON or a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_prep.datasets.opening import open_corpus
from megascale.data.corpus import TokenCorpus
from megascale.data.statistics import unigram_counts

_QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
_MOST_FREQUENT = 50


def dataset_stats(path: Path) -> dict[str, Any]:
    """Figures of a dataset or a Megatron prefix; reads every token once.

    Raises:
        UserError: it cannot be opened.
    """
    corpus = open_corpus(path)
    lengths = document_lengths(corpus)
    counts = unigram_counts(corpus, 0, corpus.num_tokens)
    size = corpus.vocab_size or len(counts)
    counts = np.pad(counts, (0, max(0, size - len(counts))))
    used = int((counts > 0).sum())
    shares = counts[counts > 0] / max(corpus.num_tokens, 1)
    quantiles = np.percentile(lengths, _QUANTILES, method="lower").tolist() if len(lengths) else []
    return {
        "path": str(path),
        "fingerprint": corpus.fingerprint,
        "documents": corpus.num_documents,
        "tokens": corpus.num_tokens,
        "utf8_bytes": corpus.utf8_bytes,
        "document_tokens": {
            "mean": round(float(lengths.mean()), 3) if len(lengths) else 0.0,
            "quantiles": dict(zip(map(str, _QUANTILES), quantiles, strict=False)),
            "histogram": _log_histogram(lengths),
        },
        "vocabulary": {
            "size": size,
            "used": used,
            "unused": size - used,
            "entropy_bits": round(float(-(shares * np.log2(shares)).sum()), 4),
            "most_frequent": _most_frequent(corpus, counts),
            "by_rank": _by_rank(counts),
        },
        "shards": [
            {
                "name": Path(shard.prefix).name,
                "documents": shard.num_documents,
                "tokens": shard.num_tokens,
            }
            for shard in corpus.token_files
        ],
        "skipped": corpus.manifest.skipped if corpus.manifest else {},
    }


def document_lengths(corpus: TokenCorpus) -> np.ndarray:
    """(documents,) int64: tokens of each."""
    return np.diff(np.append(corpus.document_starts, corpus.num_tokens))


def _log_histogram(lengths: np.ndarray) -> list[list[int]]:
    """[lowest length, documents] for the lengths [2^k, 2^(k+1)), and 0 alone."""
    if not len(lengths):
        return []
    kinds = np.zeros(len(lengths), dtype=np.int64)
    kinds[lengths > 0] = 1 + np.log2(lengths[lengths > 0]).astype(np.int64)
    found = np.bincount(kinds)
    return [[0 if kind == 0 else 1 << (kind - 1), int(n)] for kind, n in enumerate(found)]


def _most_frequent(corpus: TokenCorpus, counts: np.ndarray) -> list[dict[str, Any]]:
    ids = np.argsort(-counts, kind="stable")[:_MOST_FREQUENT]
    return [
        {
            "id": number,
            "count": int(counts[number]),
            "text": corpus.tokenizer.decode([number]) if corpus.tokenizer else "",
        }
        for number in ids.tolist()
        if counts[number]
    ]


def _by_rank(counts: np.ndarray) -> list[list[int]]:
    """[rank, count] at the ranks 1, 2, 4, ... and the last that occurs."""
    ordered = -np.sort(-counts)
    ordered = ordered[ordered > 0]
    ranks = sorted({*(2**k for k in range(len(ordered).bit_length())), len(ordered)} - {0})
    return [[rank, int(ordered[rank - 1])] for rank in ranks if rank <= len(ordered)]
