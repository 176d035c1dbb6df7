"""Altered copies of documents, for corpora that are too small."""

from __future__ import annotations

import functools
import random
import re
import string
from collections.abc import Iterator
from pathlib import Path

import xxhash
from pydantic import BaseModel, ConfigDict, Field

from data_prep.records import Document
from megascale.errors import UserError

_PIECES = re.compile(r"(\s+)")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Augment(BaseModel):
    """Copies with synonyms and noise, after Wei and Zou 2019 (arXiv:1901.11196).

    A copy is a function of (seed, id of the document, number of the copy) only. White space stays
    as it is. Copies have the id of their document with `#1`, `#2`, ... and follow it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    copies: int = Field(default=1, ge=1)
    seed: int = 0
    synonyms: str | None = Field(default=None, examples=["synonyms.txt"])
    """File with lines `word: synonym, synonym`."""
    synonym_rate: float = Field(default=0.1, ge=0, le=1)
    """Fraction of the words with synonyms that are replaced."""
    swap_rate: float = Field(default=0.0, ge=0, le=1)
    """Fraction of words that change places with the next."""
    drop_rate: float = Field(default=0.0, ge=0, le=1)
    """Fraction of words that are left out."""
    typo_rate: float = Field(default=0.0, ge=0, le=1)
    """Fraction of words in which one letter is replaced."""

    def check(self) -> None:
        """Refuse settings that change nothing, and a file of synonyms that cannot be read."""
        if self.synonyms is not None:
            _read_synonyms(self.synonyms)
        elif not (self.swap_rate or self.drop_rate or self.typo_rate):
            raise UserError(
                "augment has neither synonyms nor noise",
                rule="a copy must differ from its document",
                remedy="give synonyms, swap_rate, drop_rate or typo_rate, or leave augment out",
            )

    def copies_of(self, document: Document) -> Iterator[Document]:
        """The altered copies; those that came out equal to the document are left out."""
        for number in range(1, self.copies + 1):
            seed = xxhash.xxh3_64_intdigest(f"{self.seed}\n{document.id}\n{number}".encode())
            text = self._altered(document.text, random.Random(seed))
            if text != document.text and text.strip():
                meta = {**document.meta, "augmented": number}
                yield Document(text, f"{document.id}#{number}", document.source, meta)

    def _altered(self, text: str, chance: random.Random) -> str:
        pieces = _PIECES.split(text)  # words and white space in turn
        synonyms = _read_synonyms(self.synonyms) if self.synonyms else {}
        for index in range(0, len(pieces), 2):
            word = pieces[index]
            if not word:
                continue
            core = word.strip(string.punctuation)
            known = synonyms.get(core.lower())
            if known and core and chance.random() < self.synonym_rate:
                word = word.replace(core, _with_case_of(chance.choice(known), core), 1)
            if self.typo_rate and chance.random() < self.typo_rate:
                at = chance.randrange(len(word))
                word = word[:at] + chance.choice(_LETTERS) + word[at + 1 :]
            if self.drop_rate and chance.random() < self.drop_rate:
                word = ""
            pieces[index] = word
            if index >= 2 and self.swap_rate and chance.random() < self.swap_rate:
                pieces[index], pieces[index - 2] = pieces[index - 2], pieces[index]
        return "".join(pieces)


def _with_case_of(synonym: str, word: str) -> str:
    return synonym.capitalize() if word[:1].isupper() else synonym


@functools.cache
def _read_synonyms(file: str) -> dict[str, tuple[str, ...]]:
    found = {}
    try:
        for line in Path(file).read_text("utf-8").splitlines():
            word, colon, rest = line.partition(":")
            synonyms = tuple(part.strip() for part in rest.split(",") if part.strip())
            if line.strip() and not (colon and word.strip() and synonyms):
                raise ValueError(f"no `word: synonym, synonym` in {line[:50]!r}")
            if line.strip():
                found[word.strip().lower()] = synonyms
    except (OSError, ValueError) as error:
        raise UserError(
            f"the synonyms {file} cannot be read: {error}",
            rule="augment.synonyms is a UTF-8 text with lines `word: synonym, synonym`",
            remedy="check the file",
        ) from error
    return found
