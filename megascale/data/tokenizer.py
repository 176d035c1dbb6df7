"""One interface to every local tokenizer: text to ids and back, and what each id weighs in bytes.

Text is always only text: a document that spells "<|endoftext|>" never becomes the control token,
and no special token is ever added.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megascale.data.places import as_path, get_file, is_remote, remote_errors
from megascale.errors import UserError

END_OF_DOCUMENT = "<|endoftext|>"
FAST_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
_SENTENCEPIECE_NAMES = (SENTENCEPIECE_FILE, "sentencepiece.model", "spiece.model")
# Of each column the names belong together: BERT's own, and those of RoBERTa and its kin.
_BERT_NAMES = {
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "pad": ("[PAD]", "<pad>"),
}
# Of each row the names belong together: prefix, suffix, middle.
_MIDDLE_NAMES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)
_WHAT_IS_READ = (
    "a tokenizer is a Hugging Face tokenizer folder, a tokenizer.json, "
    "or a sentencepiece .model file"
)


@dataclass(frozen=True)
class BertTokens:
    """The special tokens that a BERT's samples are made with.

    Attributes:
        names: role ("cls", "sep", "mask", "pad") -> the token.
        ids: role -> its id.
    """

    names: dict[str, str]
    ids: dict[str, int]


class Tokenizer(ABC):
    """What the rest of megascale knows of a tokenizer."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without special tokens."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens spelled out."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The largest id + 1, added tokens included."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """xxh3_128, in hex, of what decides the ids; the same after save and load."""

    @property
    @abstractmethod
    def round_trips(self) -> bool:
        """Whether `decode(encode(text)) == text` is promised for every text."""

    @abstractmethod
    def byte_lengths(self) -> np.ndarray:
        """(V,) int32: the UTF-8 bytes of text each id stands for; 0 for special tokens.

        Exact for byte-level BPE and for sentencepiece. A tokenizer that puts a space before a text
        counts it; one that normalises text counts the normalised form.
        """

    @abstractmethod
    def word_starts(self) -> np.ndarray:
        """(V,) bool: whether each id begins a word.

        WordPiece: what does not begin with ##. Byte-level BPE and sentencepiece: what begins with
        white space, so that the first token of a text begins a word whatever it says here.
        """

    @abstractmethod
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write what `load_tokenizer` needs into an existing folder."""

    @abstractmethod
    def _token_id(self, token: str) -> int | None:
        """The id of one token, or None."""

    @abstractmethod
    def _declared_eos(self) -> int | None:
        """The end-of-sequence id that the tokenizer's own files name, or None."""

    @functools.cached_property
    def bert_tokens(self) -> BertTokens | None:
        """The special tokens of a BERT, or None when the vocabulary has not all four."""
        for column in zip(*_BERT_NAMES.values(), strict=True):
            names = dict(zip(_BERT_NAMES, column, strict=True))
            found = {role: self._token_id(name) for role, name in names.items()}
            ids = {role: number for role, number in found.items() if number is not None}
            if len(ids) == len(names):
                return BertTokens(names, ids)
        return None

    def require_bert_tokens(self) -> BertTokens:
        """As `bert_tokens`.

        Raises:
            UserError: the vocabulary lacks one of them.
        """
        if self.bert_tokens is None:
            columns = [" ".join(column) for column in zip(*_BERT_NAMES.values(), strict=True)]
            raise UserError(
                f"the tokenizer (vocab_size {self.vocab_size}) has no tokens to mask and pad with",
                rule=f"a BERT needs {', or '.join(columns)} in the vocabulary",
                remedy="train one with `python -m data_prep train-tokenizer --kind wordpiece` "
                "(or `--kind bpe --bert`)",
            )
        return self.bert_tokens

    def require_middle_tokens(self) -> tuple[int, int, int]:
        """Ids of the prefix, suffix and middle tokens of fill-in-the-middle.

        Raises:
            UserError: the vocabulary has no such three.
        """
        for names in _MIDDLE_NAMES:
            prefix, suffix, middle = (self._token_id(name) for name in names)
            if prefix is not None and suffix is not None and middle is not None:
                return prefix, suffix, middle
        raise UserError(
            f"the tokenizer (vocab_size {self.vocab_size}) has no tokens for fill-in-the-middle",
            rule=f"data.fim_rate needs {', or '.join(' '.join(names) for names in _MIDDLE_NAMES)}",
            remedy="add them to the tokenizer's special tokens before tokenizing, or set "
            "data.fim_rate=0",
        )

    @functools.cached_property
    def eod_id(self) -> int:
        """The id put after each document: <|endoftext|>, else the declared eos, else </s>.

        Raises:
            UserError: the tokenizer has none of them.
        """
        candidates = (
            self._token_id(END_OF_DOCUMENT),
            self._declared_eos(),
            self._token_id("</s>"),
        )
        for candidate in candidates:
            if candidate is not None:
                return candidate
        raise UserError(
            f"the tokenizer has no end-of-document token (vocab_size {self.vocab_size})",
            rule=f"it needs {END_OF_DOCUMENT}, </s>, or an eos_token in tokenizer_config.json",
            remedy=f"add {END_OF_DOCUMENT} to its special tokens, train one with "
            "`python -m data_prep train-tokenizer --kind bpe`, or, for a BERT (WordPiece), "
            "tokenize with --bert",
        )


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer from files only.

    Args:
        path: a Hugging Face tokenizer folder, a `tokenizer.json`, or a sentencepiece `.model`; a
            local path, or a URL of fsspec.

    Raises:
        UserError: nothing there, or nothing that can be read as a tokenizer.
    """
    location = as_path(path)
    if is_remote(location):
        return _load_remote(location)
    if not location.exists():
        raise _not_found(location)
    try:
        return _load_existing(location)
    except UserError:
        raise
    except Exception as error:  # tokenizers and sentencepiece raise bare Exception on damaged files
        detail = str(error).strip().splitlines()
        raise UserError(
            f"{location} cannot be read as a tokenizer: {detail[0] if detail else repr(error)}",
            rule=_WHAT_IS_READ,
            remedy="check the path, copy the files again, or train one with "
            "`python -m data_prep train-tokenizer`",
        ) from error


def _load_remote(location: Path) -> Tokenizer:
    with remote_errors(location), tempfile.TemporaryDirectory(prefix="megascale-") as name:
        folder = Path(name)
        files = [location] if location.is_file() else []
        if not files and location.is_dir():
            files = [path for path in location.iterdir() if path.is_file()]
        for path in files:
            get_file(path, folder / path.name)
        if not files:
            raise _not_found(location)
        return load_tokenizer(folder / location.name if location.is_file() else folder)


def _load_existing(location: Path) -> Tokenizer:
    # The backends import what they need, so that only the one in use costs its import time.
    from megascale.data import tokenizer_backends as backends

    if location.is_file():
        if location.suffix == ".model":
            return backends.SentencePieceTokenizer(location.read_bytes())
        return backends.FastTokenizer.from_file(location, eos_token=None)
    if (location / FAST_FILE).is_file():
        eos_token = declared_eos_token(location)
        return backends.FastTokenizer.from_file(location / FAST_FILE, eos_token)
    if not (location / "tokenizer_config.json").is_file():
        # A Hugging Face folder may add tokens to the model; a bare model file says it all.
        for name in _SENTENCEPIECE_NAMES:
            if (location / name).is_file():
                return backends.SentencePieceTokenizer((location / name).read_bytes())
    return backends.load_with_transformers(location)


def declared_eos_token(folder: Path) -> str | None:
    """The eos_token of `tokenizer_config.json` or `special_tokens_map.json`, if any."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            token = json.loads((folder / name).read_bytes()).get("eos_token")
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str):
                return token
    return None


def _not_found(location: Path) -> UserError:
    siblings = [] if is_remote(location) else [e.name for e in location.parent.glob("*")]
    close = difflib.get_close_matches(location.name, siblings, n=1)
    return UserError(
        f"no tokenizer at {location}",
        rule=_WHAT_IS_READ,
        remedy=f"did you mean {location.parent / close[0]}?"
        if close
        else "give the path of its files; nothing is downloaded by name",
    )
