"""Text to ids in bulk: the reference of each tokenizer, and faster libraries with the same ids.

Ids come as one flat array for a batch of texts: a Python object for each token would cost more
than the encoding itself.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any, Protocol

import numpy as np

from data_prep.tiktoken_plan import (
    is_installed,
    runs_on_tiktoken,
    splits_before_words,
    tiktoken_plan,
)
from megascale.data.tokenizer import Tokenizer
from megascale.data.tokenizer_backends import FastTokenizer, SentencePieceTokenizer
from megascale.errors import UserError

_LONGEST_PIECE = 1 << 20  # characters that the reference gets at once
_BETWEEN_WORDS = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")


class Backend(str, Enum):
    """What encodes; all give the ids of the reference."""

    AUTO = "auto"
    TOKENIZERS = "tokenizers"
    TIKTOKEN = "tiktoken"
    FASTOKENS = "fastokens"
    SENTENCEPIECE = "sentencepiece"


class Encoder(Protocol):
    """What turns texts into ids.

    Attributes:
        name: of the library.
    """

    name: str

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids (N,) of all texts back to back, lengths (len(texts),) int64)."""


class ReferenceEncoder:
    """The library that defines the tokenizer.

    A long text goes to a byte-level tokenizer in pieces, cut before a space between two ASCII
    letters, where its split always cuts too: so the memory does not grow with the text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.name = reference_name(tokenizer)
        self._in_pieces = isinstance(tokenizer, FastTokenizer) and splits_before_words(
            tokenizer.definition
        )

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `Encoder.encode`."""
        if not self._in_pieces or all(len(text) <= _LONGEST_PIECE for text in texts):
            return _flat(self._tokenizer.encode_batch(texts))
        parts = [self._encode_long(text) for text in texts]
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        return np.concatenate(parts), lengths

    def _encode_long(self, text: str) -> np.ndarray:
        pieces = (self._tokenizer.encode_batch([piece])[0] for piece in cut_between_words(text))
        return np.concatenate([np.array(ids, dtype=np.uint32) for ids in pieces])


class TiktokenEncoder:
    """Byte-level BPE by tiktoken; what its regular expressions refuse goes to the reference.

    Args:
        tokenizer: the reference.

    Raises:
        UserError: the tokenizer is none that tiktoken can run with the same ids, or tiktoken is
            not installed.
    """

    name = "tiktoken"

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not isinstance(tokenizer, FastTokenizer):
            raise _wrong_backend(self.name, tokenizer)
        tiktoken = _require("tiktoken")
        plan = tiktoken_plan(tokenizer.definition)
        encoding = tiktoken.Encoding(
            "megascale", pat_str=plan.pattern, mergeable_ranks=plan.ranks, special_tokens={}
        )
        self._encode = encoding.encode_to_numpy
        self._ids = None if np.array_equal(plan.ids, np.arange(len(plan.ids))) else plan.ids
        self._reference = ReferenceEncoder(tokenizer)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `Encoder.encode`."""
        parts = [self._one(text) for text in texts]
        lengths = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
        return np.concatenate(parts) if parts else np.empty(0, np.uint32), lengths

    def _one(self, text: str) -> np.ndarray:
        try:
            ranks: np.ndarray = self._encode(text, disallowed_special=())
        except ValueError:  # a pattern of the tokenizer's own needs too deep a stack
            return self._reference.encode([text])[0]
        return ranks if self._ids is None else self._ids[ranks]


class FastokensEncoder:
    """Any tokenizer.json that fastokens reads.

    Args:
        tokenizer: the reference.

    Raises:
        UserError: it cannot read it, or it is not installed.
    """

    name = "fastokens"

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not isinstance(tokenizer, FastTokenizer):
            raise _wrong_backend(self.name, tokenizer)
        fastokens = _require("fastokens")
        try:
            backend = fastokens.Tokenizer.from_json_str(tokenizer.to_json())
        except Exception as error:
            raise UserError(
                f"--backend fastokens: it cannot read this tokenizer: {error}",
                rule="fastokens reads a part of what a tokenizer.json can say",
                remedy="use --backend auto",
            ) from error
        self._encode = backend.encode_batch_flat

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `Encoder.encode`."""
        ids, offsets = self._encode(list(texts), split_special_tokens=True)
        return np.frombuffer(ids, "<u4"), np.diff(np.frombuffer(offsets, "<u8").astype(np.int64))


_FAST: dict[Backend, Callable[[Tokenizer], Encoder]] = {  # fastest first
    Backend.FASTOKENS: FastokensEncoder,
    Backend.TIKTOKEN: TiktokenEncoder,
}


def automatic_encoders(tokenizer: Tokenizer) -> Iterator[Encoder]:
    """What `auto` may take, fastest first: what is installed and fits; the reference last.

    Only for byte-level BPE, of which tiktoken's rules are a definition, are others than the
    reference tried: there both were found exact.
    """
    if isinstance(tokenizer, FastTokenizer) and runs_on_tiktoken(tokenizer.definition):
        for backend, make in _FAST.items():
            if is_installed(backend.value):
                try:
                    yield make(tokenizer)
                except UserError:  # it cannot read this tokenizer
                    continue
    yield ReferenceEncoder(tokenizer)


def make_encoder(tokenizer: Tokenizer, backend: Backend) -> Encoder:
    """The encoder asked for; auto: the first of `automatic_encoders`.

    Raises:
        UserError: that library cannot run this tokenizer, or is not installed.
    """
    if backend is Backend.AUTO:
        return next(automatic_encoders(tokenizer))
    if backend in _FAST:
        return _FAST[backend](tokenizer)
    if reference_name(tokenizer) != backend.value:
        raise _wrong_backend(backend.value, tokenizer)
    return ReferenceEncoder(tokenizer)


def backend_of(encoder: Encoder) -> Backend:
    """What makes this encoder again; auto for transformers' own, beside which there is no other."""
    names = {backend.value: backend for backend in Backend}
    return names.get(encoder.name, Backend.AUTO)


def reference_name(tokenizer: Tokenizer) -> str:
    """The library that defines a tokenizer's ids."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return "sentencepiece"
    return "tokenizers" if isinstance(tokenizer, FastTokenizer) else "transformers"


def cut_between_words(text: str, longest: int = _LONGEST_PIECE) -> Iterator[str]:
    """Pieces of a text, of at most `longest` characters unless no word ends in them."""
    begin = 0
    while len(text) - begin > longest:
        cut = _last_cut(text, begin, begin + longest)
        if cut is None:  # no space between letters: take more
            found = _BETWEEN_WORDS.search(text, begin + longest)
            cut = found.start() if found else len(text)
        yield text[begin:cut]
        begin = cut
    if begin < len(text) or not text:
        yield text[begin:]


def _last_cut(text: str, begin: int, end: int) -> int | None:
    while (space := text.rfind(" ", begin + 1, end)) > begin:
        if _BETWEEN_WORDS.match(text, space):
            return space
        end = space
    return None


def _require(package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"--backend {package}: it is not installed",
            rule=f"this back end is the package {package}",
            remedy=f"`pip install {package}`, or use --backend auto",
        ) from error


def _wrong_backend(name: str, tokenizer: Tokenizer) -> UserError:
    return UserError(
        f"--backend {name} with a tokenizer of {reference_name(tokenizer)}",
        rule="a tokenizer.json is run by tokenizers, tiktoken or fastokens, a .model file by "
        "sentencepiece",
        remedy="use --backend auto",
    )


def _flat(encoded: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    ids = itertools.chain.from_iterable(encoded)
    return np.fromiter(ids, dtype=np.uint32, count=int(lengths.sum())), lengths
