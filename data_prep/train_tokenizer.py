"""Train a tokenizer on text: byte-level BPE, WordPiece (tokenizers) or sentencepiece."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.documents import DocumentUnit, first_document_or_refuse, iterate_documents
from data_prep.outputs import check_output_folder, may_replace
from data_prep.skips import SkipReport
from data_prep.sources import InputFile, describe_source, find_inputs
from data_prep.wordpiece import BERT_TOKENS, add_bert_tokens, train_wordpiece
from data_prep.workplace import new_output
from megascale.data.atomic_files import write_file
from megascale.data.places import open_binary, remote_errors
from megascale.data.tokenizer import END_OF_DOCUMENT, SENTENCEPIECE_FILE, Tokenizer, load_tokenizer
from megascale.errors import UserError

RECIPE_NAME = "recipe.json"
_BYTES = 256
_SENTENCEPIECE_SPECIALS = 3  # <unk>, <s>, </s>
_SENTENCEPIECE_THREADS = 4  # fixed: the sums of unigram training depend on how work is divided
_SENTENCEPIECE_SENTENCES = 2_000_000
_LONGEST_SENTENCE_BYTES = 1 << 16


class TokenizerKind(str, Enum):
    """What to train."""

    BPE = "bpe"
    WORDPIECE = "wordpiece"
    SENTENCEPIECE = "sentencepiece"


class SentencePieceModel(str, Enum):
    """How sentencepiece chooses its pieces."""

    BPE = "bpe"
    UNIGRAM = "unigram"


@dataclass(frozen=True)
class TrainTokenizerOptions:
    """What decides the tokenizer, beside the input."""

    vocab_size: int
    kind: TokenizerKind = TokenizerKind.BPE
    sentencepiece_model: SentencePieceModel = SentencePieceModel.BPE
    seed: int = 0
    documents: DocumentUnit = DocumentUnit.FILE
    text_key: str = "text"
    bert: bool = False
    """bpe: add the special tokens of a BERT; WordPiece has them always."""

    def __post_init__(self) -> None:
        if self.bert and self.kind is TokenizerKind.SENTENCEPIECE:
            raise UserError(
                "--bert with --kind sentencepiece",
                rule="[CLS], [SEP], [MASK] and [PAD] are added to wordpiece and bpe vocabularies",
                remedy="use --kind wordpiece, or --kind bpe --bert",
            )
        specials = {
            TokenizerKind.BPE: 1 + (len(BERT_TOKENS) if self.bert else 0),
            TokenizerKind.WORDPIECE: len(BERT_TOKENS),
            TokenizerKind.SENTENCEPIECE: _SENTENCEPIECE_SPECIALS,
        }[self.kind]
        if self.vocab_size < _BYTES + specials:
            raise UserError(
                f"--vocab-size {self.vocab_size}",
                rule=f"{self.kind.value} holds {_BYTES} bytes and {specials} special tokens "
                f"at the least: {_BYTES + specials}",
                remedy="raise --vocab-size, for example to 8192",
            )


@dataclass
class TrainTokenizerSummary:
    """What a run did; `already_done` when there was nothing to do."""

    tokenizer: Tokenizer
    skips: SkipReport
    already_done: bool = False


def train_tokenizer(
    inputs: Sequence[str], output: Path, options: TrainTokenizerOptions, overwrite: bool = False
) -> TrainTokenizerSummary:
    """Write a tokenizer folder that `load_tokenizer` and transformers read.

    The same input and options give the same tokenizer. One that is already there is left.

    Raises:
        UserError: input or output cannot be used, or the text is too little for the vocabulary.
    """
    files = find_inputs(inputs)
    recipe = _recipe(options, describe_source(inputs, files))
    if _finished_before(output, recipe):
        return TrainTokenizerSummary(load_tokenizer(output), SkipReport(), already_done=True)
    check_output_folder(output, RECIPE_NAME, overwrite)
    skips = SkipReport()
    documents = iterate_documents(files, options.documents, options.text_key, skips)
    documents = itertools.chain([first_document_or_refuse(documents, skips)], documents)
    with new_output(
        output, RECIPE_NAME, lambda path: overwrite and may_replace(path, RECIPE_NAME)
    ) as folder:
        trainers: dict[TokenizerKind, Callable[..., None]] = {
            TokenizerKind.BPE: _train_bpe,
            TokenizerKind.WORDPIECE: partial(_train_wordpiece, files=files),
            TokenizerKind.SENTENCEPIECE: _train_sentencepiece,
        }
        trainers[options.kind](documents, options, folder)
        content = json.dumps(recipe, indent=2, ensure_ascii=False) + "\n"
        write_file(folder / RECIPE_NAME, content.encode())
    return TrainTokenizerSummary(load_tokenizer(output), skips)


def _recipe(options: TrainTokenizerOptions, source: dict[str, Any]) -> dict[str, Any]:
    chosen = {
        name: value.value if isinstance(value, Enum) else value
        for name, value in asdict(options).items()
    }
    if options.kind is not TokenizerKind.SENTENCEPIECE:
        chosen["sentencepiece_model"] = None  # without effect, so no reason to train again
    if not (options.bert and options.kind is TokenizerKind.BPE):
        del chosen["bert"]
    return {"format": "megascale-tokenizer", "version": 1, "options": chosen, "source": source}


def _finished_before(output: Path, recipe: dict[str, Any]) -> bool:
    try:
        with remote_errors(output), open_binary(output / RECIPE_NAME) as file:
            previous = json.loads(file.read())
    except (OSError, ValueError):
        return False
    if not isinstance(previous, dict) or not isinstance(previous.get("source"), dict):
        return False
    same_source = previous["source"].get("fingerprint") == recipe["source"]["fingerprint"]
    return same_source and previous.get("options") == recipe["options"]


def _train_bpe(documents: Iterator[str], options: TrainTokenizerOptions, folder: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from megascale.data.tokenizer_backends import FastTokenizer

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_DOCUMENT, *(BERT_TOKENS if options.bert else ())],
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    if options.bert:
        add_bert_tokens(backend)
    FastTokenizer(backend, END_OF_DOCUMENT).save(folder)


def _train_wordpiece(
    documents: Iterator[str],
    options: TrainTokenizerOptions,
    folder: Path,
    files: Sequence[InputFile],
) -> None:
    # What is skipped was told in the first pass.
    again = iterate_documents(files, options.documents, options.text_key, SkipReport())
    train_wordpiece(documents, again, options.vocab_size, folder)


def _train_sentencepiece(
    documents: Iterator[str], options: TrainTokenizerOptions, folder: Path
) -> None:
    """Lossless settings: no normalisation, no added space, bytes for what has no piece."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(options.seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(documents),
            model_writer=model,
            vocab_size=options.vocab_size,
            model_type=options.sentencepiece_model.value,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            input_sentence_size=_SENTENCEPIECE_SENTENCES,
            shuffle_input_sentence=True,
            max_sentence_length=_LONGEST_SENTENCE_BYTES,
            num_threads=_SENTENCEPIECE_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"sentencepiece cannot train --vocab-size {options.vocab_size}: "
            f"{str(error).strip().splitlines()[-1]}",
            rule="the text must hold enough different words for the vocabulary",
            remedy="lower --vocab-size, or give more text",
        ) from error
    write_file(folder / SENTENCEPIECE_FILE, model.getvalue())


def _sentences(documents: Iterator[str]) -> Iterator[str]:
    """Lines, cut to a length that sentencepiece takes: it would skip longer ones silently."""
    longest = _LONGEST_SENTENCE_BYTES // 4  # a character has at most 4 bytes
    for document in documents:
        for line in document.splitlines():
            for begin in range(0, len(line), longest):
                yield line[begin : begin + longest]
