"""Where two datasets differ: tokenizer, shards, documents, and the first different token."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_prep.datasets.opening import open_corpus
from megascale.data.corpus import TokenCorpus

_SHOWN_TOKENS = 12


def diff(first: Path, second: Path) -> dict[str, Any]:
    """Compare two datasets, or Megatron prefixes.

    Returns:
        "same": whether the token streams and documents are equal; "differences": in words;
        "documents": how many are in both, and in one only, wherever they stand; "first": the first
        document that differs, with the tokens around.

    Raises:
        UserError: one cannot be opened.
    """
    ours, theirs = open_corpus(first), open_corpus(second)
    differences = _kinds(ours, theirs)
    hashes = [_document_hashes(corpus) for corpus in (ours, theirs)]
    result: dict[str, Any] = {"same": False, "differences": differences}
    result["documents"] = _shared(*hashes)
    shared = min(map(len, hashes))
    unequal = np.flatnonzero(hashes[0][:shared] != hashes[1][:shared])
    if unequal.size or len(hashes[0]) != len(hashes[1]):
        number = int(unequal[0]) if unequal.size else shared
        result["first"] = _first_difference(ours, theirs, number)
    else:
        result["same"] = not any(kind in ("tokenizer", "mode") for kind in differences)
    return result


def _kinds(ours: TokenCorpus, theirs: TokenCorpus) -> dict[str, list[Any]]:
    """What differs as a whole: name -> [one, other]."""
    facts: dict[str, list[Any]] = {
        "documents": [ours.num_documents, theirs.num_documents],
        "tokens": [ours.num_tokens, theirs.num_tokens],
        "shards": [len(ours.token_files), len(theirs.token_files)],
        "dtype": [c.token_files[0].dtype.name for c in (ours, theirs)],
        "mode": [ours.mode, theirs.mode],
    }
    if ours.manifest and theirs.manifest:
        both = (ours.manifest, theirs.manifest)
        facts["tokenizer"] = [m.tokenizer.fingerprint for m in both]
        facts["source"] = [m.source.get("fingerprint") for m in both]
        facts["recipe"] = [m.recipe for m in both]
        facts["skipped"] = [m.skipped for m in both]
    return {name: pair for name, pair in facts.items() if pair[0] != pair[1]}


def _document_hashes(corpus: TokenCorpus) -> np.ndarray:
    """(documents,) uint64: xxh3 of the ids of each, the same whatever they are stored as."""
    found = np.empty(corpus.num_documents, dtype=np.uint64)
    at = 0
    for shard in corpus.token_files:
        starts = np.append(shard.document_starts(), shard.num_tokens).tolist()
        for begin, end in itertools.pairwise(starts):
            ids = np.ascontiguousarray(shard.tokens[begin:end], dtype="<i8")
            found[at] = xxhash.xxh3_64_intdigest(ids.tobytes())
            at += 1
    return found


def _shared(ours: np.ndarray, theirs: np.ndarray) -> dict[str, int]:
    """Documents of both as multisets."""
    values, places = np.unique(np.concatenate([ours, theirs]), return_inverse=True)
    one = np.bincount(places[: len(ours)], minlength=len(values))
    other = np.bincount(places[len(ours) :], minlength=len(values))
    both = int(np.minimum(one, other).sum())
    return {"in_both": both, "only_first": len(ours) - both, "only_second": len(theirs) - both}


def _first_difference(ours: TokenCorpus, theirs: TokenCorpus, number: int) -> dict[str, Any]:
    documents = [_document(corpus, number) for corpus in (ours, theirs)]
    found: dict[str, Any] = {"document": number}
    if any(ids is None for ids in documents):
        found["missing_in"] = "first" if documents[0] is None else "second"
        return found
    one, other = (np.asarray(ids) for ids in documents)
    shared = min(len(one), len(other))
    unequal = np.flatnonzero(one[:shared] != other[:shared])
    token = int(unequal[0]) if unequal.size else shared
    part = slice(max(0, token - _SHOWN_TOKENS // 2), token + _SHOWN_TOKENS // 2)
    found["token"] = token
    for name, corpus, ids in (("first", ours, one), ("second", theirs, other)):
        found[f"{name}_ids"] = ids[part].tolist()
        if corpus.tokenizer is not None:
            found[f"{name}_text"] = corpus.tokenizer.decode(ids[part].tolist())
    return found


def _document(corpus: TokenCorpus, number: int) -> np.ndarray | None:
    if number >= corpus.num_documents:
        return None
    starts = corpus.document_starts
    stop = int(starts[number + 1]) if number + 1 < len(starts) else corpus.num_tokens
    return corpus.read(int(starts[number]), stop - int(starts[number]))
