"""Words of many texts and hashes of their n-grams, in whole arrays instead of word by word.

A word is a run of ASCII letters and digits or of bytes over 0x7F; ASCII letters are lower-cased,
every other byte separates. Chinese, Japanese and Korean characters and those beyond U+FFFF begin
words of their own, and so need no word breaker. The typographic punctuation of U+2000 to U+203F,
the no-break space and the ideographic space, comma and full stop separate too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_WORD = 8  # bytes that are hashed at once
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MOST_TABLE_BITS, _TABLE_BITS_MORE = 22, 4
_MASKS = np.array([(1 << 8 * length) - 1 for length in range(_WORD + 1)], dtype=np.uint64)


def _table(is_word: bool) -> np.ndarray:
    """(256,) what a byte becomes: lower case, and 0 for a separator; or whether it is no 0."""
    table = np.zeros(256, dtype=np.uint8)
    for byte in range(256):
        if byte >= 0x80 or chr(byte).isalnum():
            table[byte] = ord(chr(byte).lower()) if byte < 0x80 else byte
    return table != 0 if is_word else table


_LOWER = _table(is_word=False)


@dataclass(frozen=True)
class Words:
    """The words of n texts.

    Attributes:
        hashes: (W,) uint64, of all texts one after the other.
        begins, ends: (W,) positions in the bytes of the texts joined by one newline each.
        bounds: (n + 1,) words of text i are `bounds[i]:bounds[i + 1]`.
        text_begins: (n,) where each text begins in the joined bytes.
    """

    hashes: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    bounds: np.ndarray
    text_begins: np.ndarray


def hash_words(texts: Sequence[bytes]) -> Words:
    """Find and hash the words of UTF-8 texts; equal words (but for case) have equal hashes."""
    lengths = np.fromiter((len(text) + 1 for text in texts), dtype=np.int64, count=len(texts))
    stops = np.cumsum(lengths)
    text_begins = stops - lengths
    joined = b"\n".join([*texts, bytes(2 * _WORD)])
    content = _LOWER[np.frombuffer(joined, dtype=np.uint8)]
    begins, ends = _find_words(content)
    bounds = np.concatenate(([0], np.searchsorted(begins, stops)))
    return Words(_hash_spans(content, begins, ends), begins, ends, bounds, text_begins)


def _find_words(content: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Begins and ends of the words; sets separators of several bytes to 0 in `content`."""
    starts_alone = None
    if content.max(initial=0) >= 0x80:
        _blank_wide_separators(content)
        # lead bytes of U+3000 to U+D7FF and from U+10000 on
        starts_alone = ((content >= 0xE3) & (content <= 0xED)) | (content >= 0xF0)
    inside = content != 0
    begin = inside.copy()
    begin[1:] &= ~inside[:-1]
    if starts_alone is not None:
        begin |= starts_alone
    # the last bytes are separators, so no word reaches the end
    end = inside[:-1] & (~inside[1:] | begin[1:])
    return np.flatnonzero(begin), np.flatnonzero(end) + 1


def _blank_wide_separators(content: np.ndarray) -> None:
    first, second, third = content[:-2], content[1:-1], content[2:]
    spaces = (first == 0xC2) & (second == 0xA0)
    general = (first == 0xE2) & (second == 0x80)
    ideographic = (first == 0xE3) & (second == 0x80) & (third >= 0x80) & (third <= 0x82)
    wide = np.flatnonzero(general | ideographic)
    narrow = np.flatnonzero(spaces)
    for found, size in ((wide, 3), (narrow, 2)):
        for offset in range(size):
            content[found + offset] = 0


def _hash_spans(content: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(W,) hashes of `content[begin:end]`, eight bytes at a time over all words together."""
    # A view of the eight bytes from every position on; the padding keeps the last ones inside.
    view = np.ndarray(
        shape=(max(0, len(content) - _WORD),), dtype="<u8", buffer=content, strides=(1,)
    )
    lengths = ends - begins
    hashes = mix(view[begins] & _MASKS[np.minimum(lengths, _WORD)])
    rest = np.flatnonzero(lengths > _WORD)
    offset = _WORD
    while rest.size:
        part = view[begins[rest] + offset] & _MASKS[np.minimum(lengths[rest] - offset, _WORD)]
        hashes[rest] = mix(hashes[rest] * MULTIPLIER + part)
        offset += _WORD
        rest = rest[lengths[rest] > offset]
    return hashes


def mix(values: np.ndarray) -> np.ndarray:
    """Spread uint64 values over all bits, one to one (the finaliser of splitmix64:
    Steele, Lea, Flood 2014, https://doi.org/10.1145/2660193.2660195)."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values ^= values >> np.uint64(27)
    values *= _MIX_2
    values ^= values >> np.uint64(31)
    return values


def hash_ngrams(words: np.ndarray, size: int) -> np.ndarray:
    """(W - size + 1,) hashes of each `size` consecutive words, across the ends of texts too."""
    count = max(0, len(words) - size + 1)
    result = words[:count].copy()
    for offset in range(1, size):
        result *= MULTIPLIER
        result += words[offset : offset + count]
    return mix(result)


def ngrams_of_texts(words: Words, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of the n-grams that lie in one text, and the number of the text of each.

    A text with fewer words than `size`, and at least one, has one: that of all its words.

    Returns:
        (G,) uint64 and (G,) int64, in the order of the texts.
    """
    counts = np.diff(words.bounds)
    padded = np.concatenate((words.hashes, np.zeros(size - 1, dtype=np.uint64)))
    hashes = hash_ngrams(padded, size)
    owners = np.repeat(np.arange(len(counts)), counts)
    # position of each word from the end of its text: the last size - 1 begin no whole n-gram
    left = words.bounds[1:][owners] - np.arange(len(owners))
    short = np.flatnonzero((counts > 0) & (counts < size))
    for text in short.tolist():
        begin, stop = words.bounds[text], words.bounds[text + 1]
        own = np.zeros(size, dtype=np.uint64)
        own[: stop - begin] = words.hashes[begin:stop]
        hashes[begin] = hash_ngrams(own, size)[0]
        left[begin] = size
    whole = left >= size
    return hashes[whole], owners[whole]


class KnownHashes:
    """Sorted uint64 hashes, not none, to find others among.

    A table over the high bits, small enough for the cache, rules out nearly all that are not here.
    """

    def __init__(self, ordered: np.ndarray) -> None:
        self.ordered = ordered
        bits = min(_MOST_TABLE_BITS, len(ordered).bit_length() + _TABLE_BITS_MORE)
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, dtype=bool)
        self._table[ordered >> self._shift] = True

    def positions(self, values: np.ndarray) -> np.ndarray:
        """(p,) positions of the values that are known, ascending."""
        possible = np.flatnonzero(self._table[values >> self._shift])
        places = np.searchsorted(self.ordered, values[possible])
        places = np.minimum(places, len(self.ordered) - 1)
        return possible[self.ordered[places] == values[possible]]
