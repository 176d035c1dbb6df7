"""A small dataset of sentences with a WordPiece tokenizer, for the tests of BERT."""

from __future__ import annotations

from pathlib import Path

from data_prep.documents import DocumentUnit
from data_prep.tokenize import TokenizeOptions, tokenize
from data_prep.train_tokenizer import TokenizerKind, TrainTokenizerOptions, train_tokenizer

_SUBJECTS = ("The quick fox", "A lazy dog", "Nobody", "The unbelievable machine", "My friend")
_VERBS = ("jumps over", "sees", "undoes", "reconsiders", "wants")
_OBJECTS = ("the river", "twenty apples", "it", "another unbelievable machine", "what you said")


def sentences(document: int, count: int) -> list[str]:
    """Sentences that look alike within a document and differ between documents."""
    return [
        f"{_SUBJECTS[(document + i) % 5]} {_VERBS[(i * i + document) % 5]} "
        f"{_OBJECTS[(document // 5 + i) % 5]} {document * 7 + i}."
        for i in range(count)
    ]


def make_bert_dataset(
    folder: Path, *, documents: int = 60, kind: TokenizerKind = TokenizerKind.WORDPIECE
) -> Path:
    """A dataset of `documents` short documents in `folder`/data, its tokenizer beside it."""
    text = folder / "text.txt"
    lines = [" ".join(sentences(number, 2 + number % 7)) for number in range(documents)]
    text.write_text("\n".join(lines) + "\n")
    bert = kind is TokenizerKind.BPE
    options = TrainTokenizerOptions(280, kind, documents=DocumentUnit.LINE, bert=bert)
    train_tokenizer([str(text)], folder / "tokenizer", options)
    tokenize(
        [str(text)],
        folder / "data",
        folder / "tokenizer",
        TokenizeOptions(documents=DocumentUnit.LINE, bert=True),
    )
    return folder / "data"
