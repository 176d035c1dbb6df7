"""Text to token ids: a dataset folder of `.bin/.idx`, tokenizer and manifest.

The folder is made beside its final name and renamed when it is complete, so a killed run leaves
nothing that looks like a dataset.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.documents import DocumentUnit, first_document_or_refuse, iterate_documents
from data_prep.outputs import check_output_folder, may_replace
from data_prep.progress import Advance, progress_of_bytes
from data_prep.sentences import cut_pieces, split_sentences
from data_prep.skips import SkipReport
from data_prep.sources import describe_source, find_inputs
from megascale.data.atomic_files import new_folder
from megascale.data.manifest import MANIFEST_NAME, DatasetManifest, ShardRecord, TokenizerRecord
from megascale.data.token_file import TokenFileWriter, token_dtype
from megascale.data.tokenizer import Tokenizer, load_tokenizer
from megascale.errors import UserError

_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 1 << 20
_ROUND_TRIP_EVERY = 256
_SHARD = "shard_00000"
_LONGEST_SENTENCE = 256  # two of them and three special tokens nearly fill a sample of 512


@dataclass(frozen=True)
class TokenizeOptions:
    """What decides the content of a tokenised dataset, beside input and tokenizer.

    Args:
        documents, text_key: see `iterate_documents`.
        bert: one sequence a sentence, instead of one a document with the end-of-document id.
        max_sentence_tokens: with `bert`, cut longer sentences into pieces; None: 256.

    Raises:
        UserError: max_sentence_tokens without bert, or not positive.
    """

    documents: DocumentUnit = DocumentUnit.FILE
    text_key: str = "text"
    bert: bool = False
    max_sentence_tokens: int | None = None

    def __post_init__(self) -> None:
        limit = self.max_sentence_tokens
        if limit is not None and not (self.bert and limit >= 1):
            raise UserError(
                f"--max-sentence-tokens {limit}{'' if self.bert else ' without --bert'}",
                rule="it is at least 1, and only datasets for BERT are cut into sentences",
                remedy="leave it out, or add --bert",
            )

    @property
    def sentence_limit(self) -> int:
        """Largest number of tokens of a sentence."""
        return self.max_sentence_tokens or _LONGEST_SENTENCE

    def recipe(self) -> dict[str, Any]:
        """As the manifest keeps it."""
        common = {
            "step": "tokenize",
            "documents": self.documents.value,
            "text_key": self.text_key,
            "append_eod": not self.bert,
        }
        if not self.bert:
            return common
        return {**common, "sentences": "nupunkt", "max_sentence_tokens": self.sentence_limit}


@dataclass
class TokenizeSummary:
    """What a run did; `already_prepared` when there was nothing to do."""

    manifest: DatasetManifest
    skips: SkipReport
    seconds: float = 0.0
    already_prepared: bool = False


@dataclass
class _Counts:
    documents: int = 0
    tokens: int = 0
    utf8_bytes: int = 0


def tokenize(
    inputs: Sequence[str],
    output: Path,
    tokenizer_path: Path,
    options: TokenizeOptions,
    overwrite: bool = False,
) -> TokenizeSummary:
    """Write the dataset `output`, one sequence a document with the end-of-document id appended,
    or, for BERT, one sequence a sentence.

    A dataset of the same source, tokenizer and options that is already there is left as it is.

    Raises:
        UserError: input, tokenizer or output cannot be used, or the disk is full.
    """
    started = time.monotonic()
    tokenizer = load_tokenizer(tokenizer_path)
    record = TokenizerRecord(
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod_id=None if options.bert else tokenizer.eod_id,
        special_ids=tokenizer.require_bert_tokens().ids if options.bert else {},
    )
    files = find_inputs(inputs)
    source = describe_source(inputs, files)
    finished = _finished_before(output, source, record, options, overwrite)
    if finished is not None:
        return TokenizeSummary(finished, SkipReport(finished.skipped), already_prepared=True)
    check_output_folder(output, MANIFEST_NAME, overwrite)

    skips = SkipReport()
    documents = iterate_documents(files, options.documents, options.text_key, skips)
    # A look at the first document before anything is written.
    documents = itertools.chain([first_document_or_refuse(documents, skips)], documents)
    with new_folder(output, lambda path: overwrite and may_replace(path, MANIFEST_NAME)) as folder:
        with progress_of_bytes("tokenize", source["bytes"]) as advance:
            encoder = (
                SentenceEncoder(tokenizer, options.sentence_limit)
                if options.bert
                else (DocumentEncoder(tokenizer))
            )
            counts = _write_shard(folder / _SHARD, documents, encoder, skips, advance)
        tokenizer_folder = folder / record.folder
        tokenizer_folder.mkdir()
        tokenizer.save(tokenizer_folder)
        manifest = DatasetManifest(
            mode="bert" if options.bert else "gpt",
            tokenizer=record,
            shards=[
                ShardRecord.of_files(
                    folder, _SHARD, counts.documents, counts.tokens, counts.utf8_bytes
                )
            ],
            source=source,
            recipe=options.recipe(),
            skipped=skips.counts,
        )
        manifest.save(folder)
    return TokenizeSummary(manifest, skips, time.monotonic() - started)


def _finished_before(
    output: Path,
    source: dict[str, Any],
    tokenizer: TokenizerRecord,
    options: TokenizeOptions,
    overwrite: bool,
) -> DatasetManifest | None:
    """The manifest of an identical, complete dataset at `output`, or None."""
    if not may_replace(output, MANIFEST_NAME):
        return None
    try:
        manifest = DatasetManifest.load(output)
    except UserError:
        if overwrite:
            return None  # it is damaged, and is to be replaced
        raise
    same_source = manifest.source.get("fingerprint") == source["fingerprint"]
    same_way = manifest.tokenizer == tokenizer and manifest.recipe == options.recipe()
    return manifest if same_source and same_way else None


class DocumentEncoder:
    """A document as one sequence that ends with the end-of-document id."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._seen = 0

    def __call__(self, texts: Sequence[str]) -> list[list[np.ndarray]]:
        """The sequences of each document."""
        return [[self._with_eod(ids)] for ids in self._encode(texts)]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; some of them are decoded again to see that nothing was lost."""
        encoded = self.tokenizer.encode_batch(texts)
        for text, ids in zip(texts, encoded, strict=True):
            if self._seen % _ROUND_TRIP_EVERY == 0:
                _check_round_trip(self.tokenizer, text, ids)
            self._seen += 1
        return encoded

    def _with_eod(self, ids: list[int]) -> np.ndarray:
        return np.array([*ids, self.tokenizer.eod_id], dtype=np.int64)


class SentenceEncoder(DocumentEncoder):
    """A document as one sequence a sentence; long sentences in pieces, empty ones left out.

    Args:
        tokenizer: one without normalisation that could lose a text.
        limit: largest number of tokens of a sequence.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int) -> None:
        super().__init__(tokenizer)
        self._limit, self._word_starts = limit, tokenizer.word_starts()

    def __call__(self, texts: Sequence[str]) -> list[list[np.ndarray]]:
        """The sequences of each document."""
        sentences = [split_sentences(text) for text in texts]
        encoded = iter(self._encode(list(itertools.chain.from_iterable(sentences))))
        return [
            [piece for ids in itertools.islice(encoded, len(part)) for piece in self._pieces(ids)]
            for part in sentences
        ]

    def _pieces(self, ids: list[int]) -> list[np.ndarray]:
        tokens = np.array(ids, dtype=np.int64)
        _check_vocabulary(tokens, len(self._word_starts))
        return cut_pieces(tokens, self._word_starts, self._limit)


def _write_shard(
    prefix: Path,
    documents: Iterator[str],
    encoder: DocumentEncoder,
    skips: SkipReport,
    advance: Advance,
) -> _Counts:
    counts = _Counts()
    vocab_size = encoder.tokenizer.vocab_size
    with TokenFileWriter(prefix, token_dtype(vocab_size)) as writer:
        for texts in _batches(documents):
            batch_bytes = 0
            for text, sequences in zip(texts, encoder(texts), strict=True):
                if not sequences:
                    skips.add("document without tokens", repr(text[:20]))
                    continue
                for tokens in sequences:
                    _check_vocabulary(tokens, vocab_size)
                    counts.tokens += len(tokens)
                writer.add_document(sequences)
                counts.documents += 1
                batch_bytes += len(text.encode())
            counts.utf8_bytes += batch_bytes
            advance(batch_bytes)
    return counts


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
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


def _check_vocabulary(tokens: np.ndarray, vocab_size: int) -> None:
    if tokens.size == 0:
        return
    if tokens.max() >= vocab_size or tokens.min() < 0:
        raise UserError(
            f"the tokenizer gave the id {int(tokens.max())}",
            rule=f"its vocabulary has {vocab_size} ids",
            remedy="the tokenizer's files do not belong together: copy or train it again",
        )


def _check_round_trip(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    if not tokenizer.round_trips:
        return
    decoded = tokenizer.decode(ids)
    if decoded != text:
        pairs = enumerate(zip(decoded, text, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(decoded), len(text)))
        raise UserError(
            f"the tokenizer does not give back a text after character {same}: "
            f"{text[same : same + 20]!r} became {decoded[same : same + 20]!r}",
            rule="a byte-level tokenizer restores every text exactly",
            remedy="its vocabulary lacks some of the 256 bytes: train it again",
        )
