"""Train a WordPiece vocabulary in the way of BERT's uncased tokenizer."""

from __future__ import annotations

import string
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CONTINUES = "##"
_ALPHABET_LIMIT = 1000  # rarer characters become [UNK], as in BERT


def train_wordpiece(
    documents: Iterable[str], again: Iterable[str], vocab_size: int, folder: Path
) -> None:
    """Write a lower-casing WordPiece tokenizer; the same text gives the same vocabulary.

    The trainer gives a continuing character ("##a") its id when it first meets it, in an order
    that differs between runs, and breaks ties by id. So these ids are fixed before: the characters
    are counted in a pass of their own, and reserved like special tokens.

    Args:
        documents, again: the same texts, to be read twice.
        vocab_size: ids, special ones included.
        folder: where the tokenizer is saved.
    """
    from tokenizers import models, trainers

    from megascale.data.tokenizer_backends import FastTokenizer

    learning = _bert_pipeline(models.WordPiece(unk_token="[UNK]"))
    alphabet = _alphabet(documents, learning, (vocab_size - len(BERT_TOKENS)) // 2)
    continuing = [_CONTINUES + letter for letter in alphabet if not _stands_alone(letter)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*BERT_TOKENS, *continuing],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=_CONTINUES,
        show_progress=False,
    )
    learning.train_from_iterator(again, trainer)
    # A new one with the vocabulary: in the trained one "##a" would be a special token.
    vocabulary = learning.get_vocab(with_added_tokens=True)
    backend: tokenizers.Tokenizer = _bert_pipeline(
        models.WordPiece(vocab=vocabulary, unk_token="[UNK]", continuing_subword_prefix=_CONTINUES)
    )
    add_bert_tokens(backend)
    FastTokenizer(backend, None).save(folder)


def add_bert_tokens(backend: tokenizers.Tokenizer) -> None:
    """Declare BERT's special tokens, which the vocabulary holds, and how a text is framed."""
    from tokenizers import processors

    backend.add_special_tokens(list(BERT_TOKENS))
    frame = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    # What transformers puts around a text; our own samples are framed by the dataset.
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=frame
    )


def _bert_pipeline(model: tokenizers.models.WordPiece) -> tokenizers.Tokenizer:
    """BERT's normalisation (lower case, no accents) and its split at spaces and punctuation."""
    import tokenizers
    from tokenizers import decoders, normalizers, pre_tokenizers

    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix=_CONTINUES)
    return backend


def _alphabet(documents: Iterable[str], backend: tokenizers.Tokenizer, most: int) -> list[str]:
    """The most frequent characters of the normalised texts, in code-point order."""
    counts: Counter[str] = Counter()
    for text in documents:
        counts.update(backend.normalizer.normalize_str(text))
    letters = [letter for letter in counts if not letter.isspace()]
    letters.sort(key=lambda letter: (-counts[letter], letter))
    return sorted(letters[: min(_ALPHABET_LIMIT, most)])


def _stands_alone(letter: str) -> bool:
    """Whether BERT's split makes a word of this character alone: punctuation."""
    return letter in string.punctuation or unicodedata.category(letter).startswith("P")
