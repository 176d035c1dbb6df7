"""The command line of data_prep."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from data_prep.commands.documents import with_document_commands
from data_prep.datasets.commands import with_dataset_commands
from data_prep.documents import DocumentUnit
from data_prep.encoders import Backend
from data_prep.input_shards import parse_size
from data_prep.skips import SkipReport
from data_prep.tokenize import RunOptions, TokenizeOptions, TokenizeSummary, tokenize
from data_prep.train_tokenizer import (
    SentencePieceModel,
    TokenizerKind,
    TrainTokenizerOptions,
    train_tokenizer,
)
from megascale.data.places import as_path
from megascale.errors import UserError

app = with_document_commands(
    with_dataset_commands(
        typer.Typer(
            name="data_prep",
            help="From raw text to a dataset that megascale trains on.",
            no_args_is_help=True,
            pretty_exceptions_enable=False,
            add_completion=False,
        )
    )
)

Inputs = Annotated[
    list[str],
    typer.Option(
        "--input",
        help="Text or .jsonl file (.gz, .zst, .bz2, .xz too), folder, quoted glob, fsspec URL, "
        "python-stdlib or python-stdlib-prose. May be given several times.",
    ),
]
Output = Annotated[
    Path, typer.Option("--output", parser=as_path, metavar="PATH", help="Folder to make.")
]
Documents = Annotated[
    DocumentUnit, typer.Option("--documents", help="What one document is in a text file.")
]
TextKey = Annotated[str, typer.Option("--text-key", help="Key of the text in a jsonl object.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier output of this command.")
]

Workers = Annotated[
    int | None, typer.Option("--workers", help="Processes; one a processor if not given.")
]


@app.command("train-tokenizer")
def train_tokenizer_command(
    inputs: Inputs,
    output: Output,
    vocab_size: Annotated[int, typer.Option("--vocab-size", help="Ids, special ones included.")],
    kind: Annotated[TokenizerKind, typer.Option("--kind")] = TokenizerKind.BPE,
    sentencepiece_model: Annotated[
        SentencePieceModel, typer.Option("--sentencepiece-model")
    ] = SentencePieceModel.BPE,
    seed: Annotated[int, typer.Option("--seed", help="For sampling of sentences.")] = 0,
    documents: Documents = DocumentUnit.FILE,
    text_key: TextKey = "text",
    bert: Annotated[
        bool,
        typer.Option("--bert", help="bpe: add [CLS], [SEP], [MASK], ...; wordpiece has them."),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a byte-level BPE, WordPiece or sentencepiece tokenizer on text."""
    options = TrainTokenizerOptions(
        vocab_size, kind, sentencepiece_model, seed, documents, text_key, bert
    )
    summary = train_tokenizer(inputs, output, options, overwrite)
    if summary.already_done:
        print(f"already done: {output} was trained on this input with these options")
        return
    _print_skips(summary.skips)
    found, fingerprint = summary.tokenizer.vocab_size, summary.tokenizer.fingerprint
    print(f"trained {output}: {kind.value}, {found} ids, fingerprint {fingerprint}")
    if found < vocab_size:
        print(f"note: the text has no more than {found} tokens to give, {vocab_size} were asked")


@app.command("tokenize")
def tokenize_command(
    inputs: Inputs,
    output: Output,
    tokenizer: Annotated[
        Path,
        typer.Option(
            "--tokenizer",
            parser=as_path,
            metavar="PATH",
            help="Tokenizer folder, tokenizer.json, or sentencepiece .model file.",
        ),
    ],
    documents: Documents = DocumentUnit.FILE,
    text_key: TextKey = "text",
    bert: Annotated[
        bool, typer.Option("--bert", help="For BERT: one sequence a sentence.")
    ] = False,
    max_sentence_tokens: Annotated[
        int | None,
        typer.Option("--max-sentence-tokens", help="Cut longer sentences; 256 with --bert."),
    ] = None,
    shard_size: Annotated[
        str | None,
        typer.Option("--shard-size", help="Input of a shard, like 500MB; 64MB if not given."),
    ] = None,
    backend: Annotated[
        Backend, typer.Option("--backend", help="What encodes; all give the same ids.")
    ] = Backend.AUTO,
    workers: Workers = None,
    overwrite: Overwrite = False,
) -> None:
    """Tokenise text into a dataset: Megatron-compatible .bin/.idx and a manifest.

    A run that was killed continues when it is started again. The result does not depend on the
    number of workers.
    """
    shard_bytes = None if shard_size is None else parse_size(shard_size)
    options = TokenizeOptions(documents, text_key, bert, max_sentence_tokens, shard_bytes)
    summary = tokenize(inputs, output, tokenizer, options, RunOptions(workers, backend, overwrite))
    if summary.already_prepared:
        print(f"already prepared: {output} holds this input, tokenizer and options")
        return
    _print_skips(summary.skips)
    _print_summary(output, summary)


def _print_summary(output: Path, summary: TokenizeSummary) -> None:
    shards = summary.manifest.shards
    documents = sum(shard.documents for shard in shards)
    tokens = sum(shard.tokens for shard in shards)
    utf8_bytes = sum(shard.utf8_bytes for shard in shards)
    rate = utf8_bytes / 1e6 / max(summary.seconds, 1e-9)
    print(
        f"prepared {output}: {documents} documents, {tokens} tokens, "
        f"{utf8_bytes / tokens:.3f} bytes/token, {summary.skips.total} skipped, "
        f"{rate:.2f} MB/s, fingerprint {summary.manifest.fingerprint}"
    )


def _print_skips(skips: SkipReport) -> None:
    for line in skips.lines():
        print(f"skipped {line}", file=sys.stderr)


def main() -> None:
    """Run the command line: exit code 2 and no traceback for a mistake of the user."""
    try:
        app(prog_name="python -m data_prep")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output went away; a flush at exit would only fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
