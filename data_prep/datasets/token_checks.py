"""Whether the ids of a shard can be what its tokenizer made."""

from __future__ import annotations

import numpy as np

from megascale.data.manifest import TokenizerRecord
from megascale.data.token_file import TokenFile, token_dtype

_CHUNK_TOKENS = 1 << 22


def shard_problems(shard: TokenFile, record: TokenizerRecord) -> list[str]:
    """What is wrong with the ids, one sentence each: dtype, range, and in GPT datasets the ends.

    A document of a GPT dataset ends with the end-of-document id and has it nowhere else.
    """
    problems = []
    wanted = token_dtype(record.vocab_size)
    if shard.dtype.itemsize < wanted.itemsize:
        problems.append(f"stored as {shard.dtype}, a vocabulary of {record.vocab_size} needs more")
    largest, smallest, ends = _scan(shard, record.eod_id)
    if largest >= record.vocab_size or smallest < 0:
        wrong = largest if largest >= record.vocab_size else smallest
        problems.append(f"id {wrong} in a vocabulary of {record.vocab_size}")
    if record.eod_id is None:
        return problems
    starts = np.append(shard.document_starts(), shard.num_tokens)
    empty = int((np.diff(starts) == 0).sum())
    if empty:
        problems.append(f"{empty} documents are empty")
    missing = np.setdiff1d(starts[1:] - 1, ends)
    if missing.size:
        document = int(np.searchsorted(starts, missing[0], side="right")) - 1
        problems.append(
            f"{missing.size} documents do not end with id {record.eod_id}, first document "
            f"{document}"
        )
    inside = np.setdiff1d(ends, starts[1:] - 1)
    if inside.size:
        document = int(np.searchsorted(starts, inside[0], side="right")) - 1
        problems.append(
            f"id {record.eod_id} stands {inside.size} times inside documents, first in document "
            f"{document}"
        )
    return problems


def _scan(shard: TokenFile, eod_id: int | None) -> tuple[int, int, np.ndarray]:
    """(largest id, smallest id, positions of `eod_id`)."""
    largest, smallest = -1, 0
    ends = [np.empty(0, dtype=np.int64)]
    for begin in range(0, shard.num_tokens, _CHUNK_TOKENS):
        chunk = shard.tokens[begin : begin + _CHUNK_TOKENS]
        largest, smallest = max(largest, int(chunk.max())), min(smallest, int(chunk.min()))
        if eod_id is not None:
            ends.append(np.flatnonzero(chunk == eod_id) + begin)
    return largest, smallest, np.concatenate(ends)
