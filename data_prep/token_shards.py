"""One shard of a tokenised dataset: documents in, `NAME.bin` and `NAME.idx` out.

The memory of a worker is that of a batch of documents, or of its largest one, and 12 bytes for each
document of the shard.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_prep.documents import DocumentUnit, iterate_documents
from data_prep.encoder_checks import EncoderCheck
from data_prep.encoders import Backend, Encoder, make_encoder
from data_prep.progress import Advance
from data_prep.sentences import cut_pieces, split_sentences
from data_prep.shard_runner import ShardResult, ShardTask
from data_prep.skips import SkipReport
from megascale.data.token_file import TokenFileWriter, token_dtype
from megascale.data.tokenizer import Tokenizer, load_tokenizer
from megascale.errors import UserError

LONGEST_SENTENCE = 256  # two of them and three special tokens nearly fill a sample of 512
_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class TokenizeShard:
    """The work of one shard; loads its tokenizer once a process.

    Attributes:
        tokenizer_path: where the tokenizer is.
        fingerprint: what it was when the run began.
        backend: what encodes.
        documents, text_key: see `iterate_documents`.
        sentence_limit: for BERT, most tokens of a sentence; None for GPT.
    """

    tokenizer_path: Path
    fingerprint: str
    backend: Backend
    documents: DocumentUnit
    text_key: str
    sentence_limit: int | None = None

    def prime(self, tokenizer: Tokenizer, encoder: Encoder) -> None:
        """Give it what this process has loaded already; other processes load it themselves."""
        self.__dict__.update(_tokenizer=tokenizer, _encoder=encoder)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = load_tokenizer(self.tokenizer_path)
        if tokenizer.fingerprint != self.fingerprint:
            raise UserError(
                f"the tokenizer {self.tokenizer_path} has the fingerprint {tokenizer.fingerprint}",
                rule=f"it was {self.fingerprint} when the run began, and must not change",
                remedy="put the former tokenizer back, or begin anew with --overwrite",
            )
        return tokenizer

    @functools.cached_property
    def _encoder(self) -> Encoder:
        return make_encoder(self._tokenizer, self.backend)

    def __call__(self, task: ShardTask, folder: Path, advance: Advance) -> ShardResult:
        """Write the shard `task.name` into `folder`; no files where it has no document."""
        skips = SkipReport()
        texts = iterate_documents(task.content, self.documents, self.text_key, skips)
        check = EncoderCheck(self._encoder, self._tokenizer, task.name)
        layout: _Layout
        if self.sentence_limit is None:
            eod_id, vocab_size = self._tokenizer.eod_id, self._tokenizer.vocab_size
            layout = _Documents(self._encoder, check, eod_id, vocab_size)
        else:
            starts = self._tokenizer.word_starts()
            layout = _Sentences(self._encoder, check, starts, self.sentence_limit)
        dtype = token_dtype(self._tokenizer.vocab_size)
        counts = {"documents": 0, "tokens": 0, "utf8_bytes": 0}
        first = next(texts, None)
        if first is None:
            return ShardResult(counts, skips)
        with TokenFileWriter(folder / task.name, dtype) as writer:
            for batch in _batches(itertools.chain([first], texts)):
                self._write(batch, layout, writer, counts, skips, advance)
        if not counts["documents"]:
            for path in list(folder.iterdir()):
                path.unlink()
        return ShardResult(counts, skips)

    def _write(
        self,
        texts: list[str],
        layout: _Layout,
        writer: TokenFileWriter,
        counts: dict[str, int],
        skips: SkipReport,
        advance: Advance,
    ) -> None:
        tokens, lengths, sequences = layout(texts)
        empty = np.flatnonzero(sequences == 0).tolist()
        for number in empty:
            skips.add("document without tokens", repr(texts[number][:20]))
        writer.add_documents(tokens, lengths, sequences[sequences > 0])
        left_out = set(empty)
        kept = (text for number, text in enumerate(texts) if number not in left_out)
        utf8_bytes = sum(map(_utf8_length, kept))
        counts["documents"] += len(texts) - len(empty)
        counts["tokens"] += len(tokens)
        counts["utf8_bytes"] += utf8_bytes
        advance(utf8_bytes)


class _Layout(Protocol):
    """Texts -> (tokens (N,), lengths of sequences (S,), sequences of each text (len(texts),))."""

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


class _Documents:
    """A document is one sequence, with the end-of-document id at its end."""

    def __init__(self, encoder: Encoder, check: EncoderCheck, eod_id: int, vocab_size: int) -> None:
        self._encoder, self._check = encoder, check
        self._eod_id, self._vocab_size = eod_id, vocab_size
        self._dtype = token_dtype(vocab_size)

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids, lengths = self._encoder.encode(texts)
        self._check.sample(texts, ids, lengths)
        _check_vocabulary(ids, self._vocab_size)
        tokens = np.empty(len(ids) + len(texts), dtype=self._dtype)
        ends = np.cumsum(lengths)
        tokens[ends + np.arange(len(texts))] = self._eod_id
        begin = 0
        for number, end in enumerate(ends.tolist()):
            tokens[begin + number : end + number] = ids[begin:end]
            begin = end
        return tokens, lengths + 1, np.ones(len(texts), dtype=np.int64)


class _Sentences:
    """A document is one sequence a sentence; long ones in pieces, those without tokens left out."""

    def __init__(
        self, encoder: Encoder, check: EncoderCheck, word_starts: np.ndarray, limit: int
    ) -> None:
        self._encoder, self._check = encoder, check
        self._word_starts, self._limit = word_starts, limit

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        sentences = [split_sentences(text) for text in texts]
        flat = list(itertools.chain.from_iterable(sentences))
        ids, lengths = self._encoder.encode(flat)
        self._check.sample(flat, ids, lengths)
        _check_vocabulary(ids, len(self._word_starts))
        pieces: list[int] = []
        counts = np.zeros(len(texts), dtype=np.int64)
        owner = np.repeat(np.arange(len(texts)), [len(part) for part in sentences])
        ends = np.cumsum(lengths)
        for number, end, length in zip(
            owner.tolist(), ends.tolist(), lengths.tolist(), strict=True
        ):
            if length > self._limit:
                parts = cut_pieces(ids[end - length : end], self._word_starts, self._limit)
                pieces.extend(len(part) for part in parts)
                counts[number] += len(parts)
            elif length:
                pieces.append(length)
                counts[number] += 1
        return ids, np.array(pieces, dtype=np.int64), counts


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _check_vocabulary(tokens: np.ndarray, vocab_size: int) -> None:
    below = tokens.dtype.kind == "i" and tokens.size and int(tokens.min()) < 0
    if tokens.size and (below or int(tokens.max()) >= vocab_size):
        raise UserError(
            f"the tokenizer gave the id {int(tokens.max())}",
            rule=f"its vocabulary has {vocab_size} ids",
            remedy="the tokenizer's files do not belong together: copy or train it again",
        )
