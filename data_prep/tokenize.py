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


@dataclass(frozen=True)
class TokenizeOptions:
    """What decides the content of a tokenised dataset, beside input and tokenizer."""

    documents: DocumentUnit = DocumentUnit.FILE
    text_key: str = "text"

    def recipe(self) -> dict[str, Any]:
        """As the manifest keeps it."""
        return {
            "step": "tokenize",
            "documents": self.documents.value,
            "text_key": self.text_key,
            "append_eod": True,
        }


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
    """Write the dataset `output`, one sequence a document with the end-of-document id appended.

    A dataset of the same source, tokenizer and options that is already there is left as it is.

    Raises:
        UserError: input, tokenizer or output cannot be used, or the disk is full.
    """
    started = time.monotonic()
    tokenizer = load_tokenizer(tokenizer_path)
    record = TokenizerRecord(
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
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
            counts = _write_shard(folder / _SHARD, documents, tokenizer, advance)
        tokenizer_folder = folder / record.folder
        tokenizer_folder.mkdir()
        tokenizer.save(tokenizer_folder)
        manifest = DatasetManifest(
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


def _write_shard(
    prefix: Path, documents: Iterator[str], tokenizer: Tokenizer, advance: Advance
) -> _Counts:
    counts = _Counts()
    eod = [tokenizer.eod_id]
    with TokenFileWriter(prefix, token_dtype(tokenizer.vocab_size)) as writer:
        for texts in _batches(documents):
            batch_bytes = 0
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                if counts.documents % _ROUND_TRIP_EVERY == 0:
                    _check_round_trip(tokenizer, text, ids)
                tokens = np.array(ids + eod, dtype=np.int64)
                _check_vocabulary(tokens, tokenizer.vocab_size)
                writer.add_document([tokens])
                counts.documents += 1
                counts.tokens += len(tokens)
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
