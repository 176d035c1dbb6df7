"""Text to token ids: a dataset folder of `.bin/.idx` shards, tokenizer and manifest.

Shards are made side by side by `shard_runner`, which gives the folder its final name when it is
complete: a killed run leaves nothing that looks like a dataset, and continues when it is started
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.datasets.copying import save_tokenizer, shard_records
from data_prep.documents import DocumentUnit, first_document_or_refuse, iterate_documents
from data_prep.encoder_checks import checked_encoder
from data_prep.encoders import Backend, backend_of
from data_prep.input_shards import cut_inputs, default_shard_bytes
from data_prep.outputs import may_replace
from data_prep.shard_runner import Share, check_workers, open_run, tidy_output
from data_prep.skips import SkipReport
from data_prep.sources import describe_source, find_inputs
from data_prep.token_shards import LONGEST_SENTENCE, TokenizeShard
from data_prep.worker_pool import available_cpus
from megascale.data.manifest import MANIFEST_NAME, DatasetManifest, TokenizerRecord
from megascale.data.tokenizer import Tokenizer, load_tokenizer
from megascale.errors import UserError


@dataclass(frozen=True)
class TokenizeOptions:
    """What decides the content of a tokenised dataset, beside input and tokenizer.

    Args:
        documents, text_key: see `iterate_documents`.
        bert: one sequence a sentence, instead of one a document with the end-of-document id.
        max_sentence_tokens: with `bert`, cut longer sentences into pieces; None: 256.
        shard_bytes: bytes of input a shard; None: see `default_shard_bytes`.

    Raises:
        UserError: max_sentence_tokens without bert, or not positive.
    """

    documents: DocumentUnit = DocumentUnit.FILE
    text_key: str = "text"
    bert: bool = False
    max_sentence_tokens: int | None = None
    shard_bytes: int | None = None

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
        return self.max_sentence_tokens or LONGEST_SENTENCE

    def recipe(self) -> dict[str, Any]:
        """As the manifest keeps it."""
        common: dict[str, Any] = {
            "step": "tokenize",
            "documents": self.documents.value,
            "text_key": self.text_key,
            "append_eod": not self.bert,
        }
        if self.shard_bytes is not None:
            common["shard_bytes"] = self.shard_bytes
        if not self.bert:
            return common
        return {**common, "sentences": "nupunkt", "max_sentence_tokens": self.sentence_limit}


@dataclass(frozen=True)
class RunOptions:
    """How a run is done; none of it changes the content.

    Attributes:
        workers: processes; None: one a processor.
        backend: what encodes.
        overwrite: replace another finished output, drop another unfinished one.
        share: see `open_run`.
    """

    workers: int | None = None
    backend: Backend = Backend.AUTO
    overwrite: bool = False
    share: Share | None = None


@dataclass
class TokenizeSummary:
    """What a run did; `already_prepared` when there was nothing to do."""

    manifest: DatasetManifest
    skips: SkipReport
    seconds: float = 0.0
    already_prepared: bool = False
    backend: str = ""


def tokenize(
    inputs: Sequence[str],
    output: Path,
    tokenizer_path: Path,
    options: TokenizeOptions,
    run_options: RunOptions = RunOptions(),
) -> TokenizeSummary:
    """Write the dataset `output`, one sequence a document with the end-of-document id appended,
    or, for BERT, one sequence a sentence.

    The content depends on input, tokenizer and options only. A dataset of the same ones that is
    already there is left as it is; an unfinished one is continued.

    Raises:
        UserError: input, tokenizer or output cannot be used, a back end gives other ids than the
            reference, a worker was killed, or the disk is full.
    """
    workers = available_cpus() if run_options.workers is None else run_options.workers
    check_workers(workers)
    tokenizer = load_tokenizer(tokenizer_path)
    record = _tokenizer_record(tokenizer, options)
    files = find_inputs(inputs)
    source = describe_source(inputs, files)
    finished = _finished_before(output, source, record, options, run_options.overwrite)
    if finished is not None:
        tidy_output(output)
        return TokenizeSummary(finished, SkipReport(finished.skipped), already_prepared=True)
    encoder = checked_encoder(tokenizer, run_options.backend)
    identity = {
        "source": {name: source[name] for name in ("fingerprint", "files", "bytes")},
        "tokenizer": record.model_dump(),
        "options": options.recipe(),
    }
    overwrite, share = run_options.overwrite, run_options.share
    with open_run(output, "tokenize", identity, MANIFEST_NAME, overwrite, share) as run:
        # A look at the first document before anything is written.
        skips = SkipReport()
        documents = iterate_documents(files, options.documents, options.text_key, skips)
        first_document_or_refuse(documents, skips)
        shard_bytes = options.shard_bytes or default_shard_bytes(source["bytes"])
        tasks = cut_inputs(files, options.documents, shard_bytes)
        work = TokenizeShard(
            tokenizer_path=tokenizer_path,
            fingerprint=record.fingerprint,
            backend=backend_of(encoder),
            documents=options.documents,
            text_key=options.text_key,
            sentence_limit=options.sentence_limit if options.bert else None,
        )
        work.prime(tokenizer, encoder)
        outcome = run.run(tasks, work, workers)
        manifest = DatasetManifest(
            mode="bert" if options.bert else "gpt",
            tokenizer=record,
            shards=shard_records(outcome.results),
            source=source,
            recipe=options.recipe(),
            skipped=outcome.skips.counts,
        )
        save_tokenizer(tokenizer, run.folder / record.folder)
        manifest.save(run.folder)
        run.finish(outcome, {"backend": encoder.name, "fingerprint": manifest.fingerprint})
        return TokenizeSummary(manifest, outcome.skips, run.seconds, backend=encoder.name)


def _tokenizer_record(tokenizer: Tokenizer, options: TokenizeOptions) -> TokenizerRecord:
    return TokenizerRecord(
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod_id=None if options.bert else tokenizer.eod_id,
        special_ids=tokenizer.require_bert_tokens().ids if options.bert else {},
    )


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
