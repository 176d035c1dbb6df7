"""Which tokenizer.json tiktoken can run with the same ids, and with which tables.

tiktoken merges the pair of neighbours whose union has the lowest rank; a BPE of tokenizers merges
the pair that comes first in its list of merges. For a vocabulary that training made they are the
same, and `encoder_checks` compares them on real text.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megascale.errors import UserError

# GPT-2's split, as tokenizers' ByteLevel does it (https://github.com/openai/gpt-2, encoder.py).
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class TiktokenPlan:
    """What tiktoken is made with.

    tiktoken's ranks are priorities and ids in one. Here they are priorities only, since a
    vocabulary may begin with its special tokens; the id is looked up afterwards.

    Attributes:
        pattern: splits the text.
        ranks: bytes of a token -> its rank: the 256 bytes, then what each merge makes.
        ids: (R,) uint32, rank -> id.
    """

    pattern: str
    ranks: dict[bytes, int]
    ids: np.ndarray


def tiktoken_plan(definition: dict[str, Any]) -> TiktokenPlan:
    """The tables for a tokenizer.json.

    Raises:
        UserError: tiktoken cannot run it; says why.
    """
    pattern, tokens = _pattern_and_tokens(definition)
    vocabulary = definition["model"]["vocab"]
    ids = np.fromiter(map(vocabulary.__getitem__, tokens), dtype=np.uint32, count=len(tokens))
    return TiktokenPlan(pattern, {token: i for i, token in enumerate(_as_bytes(tokens))}, ids)


def _pattern_and_tokens(definition: dict[str, Any]) -> tuple[str, list[str]]:
    """What splits the text, and the tokens in the order of their ranks."""
    model = definition["model"]
    if model.get("type") != "BPE":
        raise _unfit(f"the model is {model.get('type')}, not BPE")
    if definition["normalizer"] is not None:
        raise _unfit("the tokenizer normalises text")
    if any(not token["special"] for token in definition["added_tokens"]):
        raise _unfit("text tokens were added to the vocabulary")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise _unfit(f"the model has {name}")
    pattern = _split_pattern(definition["pre_tokenizer"])
    if pattern is None:
        raise _unfit("text is not split by one regular expression")
    return pattern, _tokens_by_rank(model)


def runs_on_tiktoken(definition: dict[str, Any]) -> bool:
    """Whether `tiktoken_plan` has one for this tokenizer.json."""
    try:
        _pattern_and_tokens(definition)
    except UserError:
        return False
    return True


def splits_before_words(definition: dict[str, Any]) -> bool:
    """Whether text is always cut before a space between two ASCII letters, whatever is around."""
    plain = definition["normalizer"] is None and all(
        token["special"] for token in definition["added_tokens"]
    )
    parts = _sequence(definition["pre_tokenizer"])
    return plain and len(parts) == 1 and _is_gpt2_split(parts[0])


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def _split_pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    parts = _sequence(pre_tokenizer)
    if len(parts) == 1 and _is_gpt2_split(parts[0]):
        return _gpt2_pattern()
    if [part.get("type") for part in parts] != ["Split", "ByteLevel"]:
        return None
    split, bytes_only = parts
    as_it_is = split.get("behavior") == "Isolated" and not split.get("invert")
    no_more = not bytes_only.get("use_regex", True) and not bytes_only.get("add_prefix_space")
    return split["pattern"].get("Regex") if as_it_is and no_more else None


def _is_gpt2_split(part: dict[str, Any]) -> bool:
    plain = part.get("use_regex", True) and not part.get("add_prefix_space")
    return part.get("type") == "ByteLevel" and bool(plain)


def _gpt2_pattern() -> str:
    """GPT-2's split in the form that tiktoken runs fastest and without a deep stack."""
    if not is_installed("tiktoken_ext"):
        return _GPT2_PATTERN
    from tiktoken_ext import openai_public

    return str(getattr(openai_public, "r50k_pat_str", _GPT2_PATTERN))


def _sequence(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer.get("type") == "Sequence":
        return list(pre_tokenizer["pretokenizers"])
    return [pre_tokenizer]


def _tokens_by_rank(model: dict[str, Any]) -> list[str]:
    letters = _byte_of_letter()
    merged = ["".join(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    tokens = [*letters, *merged]
    if not all(map(model["vocab"].__contains__, tokens)):
        raise _unfit("a byte, or what a merge makes, is not in the vocabulary")
    if not set("".join(merged)) <= letters.keys():
        raise _unfit("a merge holds what is no byte")
    if len(set(tokens)) != len(tokens):
        raise _unfit("two merges make the same token")
    return tokens


def _as_bytes(tokens: list[str]) -> Iterator[bytes]:
    """The bytes that tokens of the byte-level alphabet stand for, one letter each; all at once."""
    letters = {ord(letter): byte for letter, byte in _byte_of_letter().items()}
    content = "".join(tokens).translate(letters).encode("latin-1")
    begin = 0
    for token in tokens:
        yield content[begin : begin + len(token)]
        begin += len(token)


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """The byte-level alphabet: printable bytes are themselves, the others follow U+0100 on."""
    printable = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
    others = (byte for byte in range(256) if byte not in printable)
    own = {chr(byte): byte for byte in printable}
    return own | {chr(0x100 + number): byte for number, byte in enumerate(others)}


def _unfit(why: str) -> UserError:
    return UserError(
        f"--backend tiktoken: {why}",
        rule="tiktoken runs byte-level BPE without normalisation and added text tokens",
        remedy="use --backend tokenizers, or auto",
    )
