"""Proof, while tokenising, that a fast back end gives the ids of the reference.

A fixed set of hostile strings is compared before anything is written, and a seeded sample of the
documents while they are encoded. Any difference ends the run.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Sequence

import numpy as np
import xxhash

from data_prep.encoders import (
    Backend,
    Encoder,
    ReferenceEncoder,
    automatic_encoders,
    make_encoder,
)
from megascale.data.tokenizer import Tokenizer
from megascale.errors import UserError

_ONE_DOCUMENT_IN = 1024  # on average; the reference is up to 60 times as slow
_LONGEST_EXCERPT = 4_096  # characters
_RANDOM_STRINGS = 800
_SHOWN = 40
_SURROGATES = range(0xD800, 0xE000)

# White space, controls, marks, joiners, digits and letters of many scripts and Unicode versions.
_PIECES = (
    *(" ", "  ", "\t", "\n", "\r\n", "\r", "\n\n", "\x0b", "\x0c", "\x00", "\x1b", "\x7f", "\x85"),
    *("\xa0", "\u1680", "\u180e", "\u2000", "\u2009", "\u200b", "\u200d", "\u2028", "\u2029"),
    *("\u202e", "\u202f", "\u205f", "\u2060", "\u3000", "\ufeff", "\ufffd", "\uffff", "\U0010ffff"),
    *("a", "Z", "ß", "İ", "ı", "ſ", "ŉ", "ﬁ", "é", "e\u0301", "a\u0308\u0323", "Å", "\u212b"),
    *("中文", "東京", "한국", "가", "ไทย", "हिन्दी", "नि", "العربية", "עברית", "ελ", "Я"),
    *("\U0001e4d0", "\U00010d40", "\U00016d40", "\U0002ebf0", "\U000323b0", "\U0001f6dc", "\u1c89"),
    *("0", "12345", "٣", "५", "Ⅷ", "½", "²", "①", "\U0001d7d8", "\U00011950"),
    *("'s", "'S", "'ll", "'LL", "'Re", "’s", "'", "''", "'d've", "don't", "I'M"),
    *("!", "...", "—", "--", "#", "$", "_", "__init__", "\\n", "<|endoftext|>", "</s>", "[MASK]"),
    *("👍", "👍🏽", "👨‍👩‍👧‍👦", "🇩🇪", "🏳️‍🌈", "\U000e0041", "\ufe0f", "\u20e3"),
    *("==", "->", "{}", "://", "\u2581", "Ġ", "Ċ", "##a", "<0x0A>", "�"),
)  # fmt: skip


@functools.cache
def hostile_strings() -> tuple[str, ...]:
    """The fixed set: each piece alone and doubled, their random chains, and random code points."""
    chance = random.Random(7)
    found = ["", *_PIECES, *(piece * 2 for piece in _PIECES), *(f"a{p}b" for p in _PIECES)]
    for _ in range(_RANDOM_STRINGS):
        found.append("".join(chance.choices(_PIECES, k=chance.randint(2, 12))))
        found.append("".join(_code_point(chance) for _ in range(chance.randint(1, 12))))
    found += [piece * 700 for piece in ("a", " ", "\n", " \n", "!", "1", "é", "中", "\u0301", "'")]
    return tuple(found)


def _code_point(chance: random.Random) -> str:
    while True:
        number = chance.randrange(chance.choice((0x80, 0x3000, 0x20000, 0x110000)))
        if number not in _SURROGATES:
            return chr(number)


def checked_encoder(tokenizer: Tokenizer, backend: Backend) -> Encoder:
    """The encoder asked for, or for auto the fastest, which agrees on the hostile strings.

    Raises:
        UserError: the one asked for cannot run this tokenizer, or gives other ids.
    """
    if backend is not Backend.AUTO:
        encoder = make_encoder(tokenizer, backend)
        EncoderCheck(encoder, tokenizer, "").hostile()
        return encoder
    for encoder in automatic_encoders(tokenizer):
        try:
            EncoderCheck(encoder, tokenizer, "").hostile()
        except UserError as error:
            print(f"note: {encoder.name} is not used: {error.what}", file=sys.stderr)
            continue
        return encoder
    raise AssertionError("the reference agrees with itself")


class EncoderCheck:
    """Compares an encoder with the reference, and decoded ids with the text where that is exact.

    Args:
        encoder: what runs.
        tokenizer: the reference.
        seed: with the number of a document it decides whether that one is compared.
    """

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer, seed: str) -> None:
        self._encoder, self._tokenizer, self._seed = encoder, tokenizer, seed
        self._reference = ReferenceEncoder(tokenizer)
        self._is_reference = isinstance(encoder, ReferenceEncoder)
        self._seen = self._next = 0  # documents so far; number of the next one to compare

    def hostile(self) -> None:
        """Compare the fixed set.

        Raises:
            UserError: at the first difference, with the string and both ids.
        """
        if not self._is_reference:
            self._compare(hostile_strings(), *self._encoder.encode(hostile_strings()))

    def sample(self, texts: Sequence[str], ids: np.ndarray, lengths: np.ndarray) -> None:
        """Compare some of the texts, whose ids the encoder gave; excerpts of long ones.

        Raises:
            UserError: at the first difference.
        """
        begin = self._seen
        self._seen += len(texts)
        if self._next >= self._seen:
            return
        ends = np.cumsum(lengths)
        while self._next < self._seen:
            i, chance = self._next - begin, self._hash(self._next)
            self._next += 1 + chance % (2 * _ONE_DOCUMENT_IN - 1)
            self._compare_one(texts[i], ids[ends[i] - lengths[i] : ends[i]], chance)

    def _compare_one(self, text: str, found: np.ndarray, chance: int) -> None:
        if len(text) > _LONGEST_EXCERPT:
            start = chance % (len(text) - _LONGEST_EXCERPT)
            text = text[start : start + _LONGEST_EXCERPT]
            found = self._encoder.encode([text])[0]
        if not self._is_reference:
            self._compare([text], found, np.array([len(found)]))
        self._round_trip(text, found)

    def _hash(self, number: int) -> int:
        return xxhash.xxh3_64_intdigest(f"{self._seed} {number}".encode())

    def _compare(self, texts: Sequence[str], ids: np.ndarray, lengths: np.ndarray) -> None:
        wanted, wanted_lengths = self._reference.encode(texts)
        if np.array_equal(ids, wanted) and np.array_equal(lengths, wanted_lengths):
            return
        for text in texts:  # which one it is
            theirs, ours = self._reference.encode([text])[0], self._encoder.encode([text])[0]
            if not np.array_equal(theirs, ours):
                raise _different(self._encoder.name, self._reference.name, text, ours, theirs)
        raise RuntimeError(f"{self._encoder.name} depends on what it encodes together")

    def _round_trip(self, text: str, ids: np.ndarray) -> None:
        if not self._tokenizer.round_trips:
            return
        decoded = self._tokenizer.decode(ids.tolist())
        if decoded != text:
            pairs = enumerate(zip(decoded, text, strict=False))
            same = next((i for i, (a, b) in pairs if a != b), min(len(decoded), len(text)))
            raise UserError(
                f"the tokenizer does not give back a text after character {same}: "
                f"{text[same : same + 20]!r} became {decoded[same : same + 20]!r}",
                rule="a byte-level tokenizer restores every text exactly",
                remedy="its vocabulary lacks some of the 256 bytes: train it again",
            )


def _different(
    name: str, reference: str, text: str, ours: np.ndarray, theirs: np.ndarray
) -> UserError:
    shared = min(len(ours), len(theirs))
    unequal = np.flatnonzero(ours[:shared] != theirs[:shared])
    first = int(unequal[0]) if unequal.size else shared
    part = slice(max(0, first - 2), first + 8)
    return UserError(
        f"{name} encodes {_escaped(text)} in another way from token {first} on: "
        f"...{ours[part].tolist()}..., {reference} gives ...{theirs[part].tolist()}...",
        rule=f"a fast back end gives exactly the ids of {reference}",
        remedy=f"use --backend {reference}, and report it with this text",
    )


def _escaped(text: str) -> str:
    shown = ascii(text[:_SHOWN])
    return shown if len(text) <= _SHOWN else f"{shown}... ({len(text)} characters)"
