"""The libraries behind `Tokenizer`: tokenizers, sentencepiece, and transformers as the last resort.

Each class imports its library when it is used: transformers alone takes seconds.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import xxhash

from megascale.data.atomic_files import write_file
from megascale.data.tokenizer import FAST_FILE, SENTENCEPIECE_FILE, Tokenizer
from megascale.errors import UserError

if TYPE_CHECKING:
    import tokenizers

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_WORD_MARKER = "▁"  # sentencepiece writes a space so
_BYTE_LEVEL_SPACES = ("Ġ", "Ċ", "ĉ", "č")  # space, \n, \t and \r in the byte-level alphabet


class FastTokenizer(Tokenizer):
    """A `tokenizer.json` run by the tokenizers library, the reference of every other path."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_token: str | None) -> None:
        # A tokenizer.json may carry truncation and padding, which would cut documents silently.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend, self._eos_token = backend, eos_token
        self._definition: dict[str, Any] = orjson.loads(backend.to_str())

    @classmethod
    def from_file(cls, path: Path, eos_token: str | None) -> FastTokenizer:
        """Load a tokenizer.json; `eos_token` is what the folder's config declares."""
        import tokenizers

        return cls(tokenizers.Tokenizer.from_file(str(path)), eos_token)

    @property
    def definition(self) -> dict[str, Any]:
        """What the tokenizer.json says."""
        return self._definition

    def to_json(self) -> str:
        """The tokenizer.json itself."""
        return str(self._backend.to_str())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)

    @functools.cached_property
    def _vocabulary(self) -> dict[str, int]:
        words = self._definition["model"]["vocab"]
        if not isinstance(words, dict):  # pieces with scores
            return self._backend.get_vocab(with_added_tokens=True)
        added = {token["content"]: token["id"] for token in self._definition["added_tokens"]}
        return {**words, **added}

    @functools.cached_property
    def vocab_size(self) -> int:
        return max(self._vocabulary.values()) + 1

    @functools.cached_property
    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(canonical_json(self._definition))

    @property
    def round_trips(self) -> bool:
        """Byte-level, with nothing around it that changes text."""
        prefix_space = any(
            part.get("add_prefix_space") or part.get("add_dummy_prefix")
            for part in _parts(self._definition["pre_tokenizer"])
        )
        added_strip = any(
            token["lstrip"] or token["rstrip"] for token in self._definition["added_tokens"]
        )
        plain = self._definition["normalizer"] is None and not prefix_space and not added_strip
        return self._is_byte_level and plain

    @property
    def _is_byte_level(self) -> bool:
        return any(part.get("type") == "ByteLevel" for part in _parts(self._definition["decoder"]))

    def byte_lengths(self) -> np.ndarray:
        """(V,) int32: see `Tokenizer.byte_lengths`."""
        added = {token["id"]: token for token in self._definition["added_tokens"]}
        measure = self._token_measure()
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for token, number in self._vocabulary.items():
            if number not in added:
                lengths[number] = measure(token, number)
            elif not added[number]["special"]:
                lengths[number] = _utf8_length(token)
        return lengths

    def _token_measure(self) -> Any:
        """The function (token, id) -> bytes for this kind of vocabulary."""
        decoder_types = {part.get("type") for part in _parts(self._definition["decoder"])}
        model = self._definition["model"]
        if self._is_byte_level:
            # Each character of the alphabet stands for one byte; others were added as text.
            alphabet = _byte_level_alphabet()
            return lambda token, number: (
                len(token) if alphabet.issuperset(token) else _utf8_length(token)
            )
        if decoder_types & {"Metaspace", "ByteFallback"} or model.get("byte_fallback"):
            return lambda token, number: _piece_length(token)
        if model.get("type") == "WordPiece":
            prefix = model.get("continuing_subword_prefix") or "##"
            return lambda token, number: _utf8_length(token.removeprefix(prefix))
        return lambda token, number: _utf8_length(self.decode([number]))

    def word_starts(self) -> np.ndarray:
        """(V,) bool: see `Tokenizer.word_starts`."""
        model = self._definition["model"]
        prefix = model.get("continuing_subword_prefix") or "##"
        wordpiece = model.get("type") == "WordPiece"
        return _word_starts(
            self._vocabulary,
            self.vocab_size,
            {token["id"] for token in self._definition["added_tokens"]},
            lambda token: not token.startswith(prefix) if wordpiece else _begins_with_space(token),
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json`, and the config from which transformers loads it."""
        write_file(Path(folder) / FAST_FILE, self._backend.to_str(pretty=True).encode())
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        if self._eos_token is not None:
            config["eos_token"] = self._eos_token
        if self.bert_tokens is not None:
            config |= {f"{role}_token": name for role, name in self.bert_tokens.names.items()}
            if self.bert_tokens.names["cls"] == "[CLS]":  # transformers leaves token types out
                config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
        unknown = self._definition["model"].get("unk_token")
        if unknown is not None:
            config["unk_token"] = unknown
        content = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        write_file(Path(folder) / "tokenizer_config.json", content.encode())

    def _token_id(self, token: str) -> int | None:
        return self._vocabulary.get(token)

    def _declared_eos(self) -> int | None:
        return None if self._eos_token is None else self._vocabulary.get(self._eos_token)


class SentencePieceTokenizer(Tokenizer):
    """A bare sentencepiece model.

    Args:
        model: the bytes of the `.model` file.
    """

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(ids))

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(self._model)

    @property
    def round_trips(self) -> bool:
        return False  # the model may normalise, and U+2581 always becomes a space

    def byte_lengths(self) -> np.ndarray:
        """(V,) int32: see `Tokenizer.byte_lengths`."""
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for number in range(self.vocab_size):
            special = self._processor.is_control(number) or self._processor.is_unknown(number)
            if not special and not self._processor.is_unused(number):
                lengths[number] = _piece_length(self._processor.id_to_piece(number))
        return lengths

    def word_starts(self) -> np.ndarray:
        """(V,) bool: see `Tokenizer.word_starts`."""
        pieces = {self._processor.id_to_piece(i): i for i in range(self.vocab_size)}
        special = {i for i in pieces.values() if self._processor.is_control(i)}
        return _word_starts(pieces, self.vocab_size, special, _begins_with_space)

    def save(self, folder: str | os.PathLike[str]) -> None:
        write_file(Path(folder) / SENTENCEPIECE_FILE, self._model)

    def _token_id(self, token: str) -> int | None:
        number = self._processor.piece_to_id(token)
        return None if self._processor.is_unknown(number) else number

    def _declared_eos(self) -> int | None:
        number = self._processor.eos_id()
        return number if number >= 0 else None


class TransformersTokenizer(Tokenizer):
    """A tokenizer that only transformers itself can run (a slow one, written in Python).

    Args:
        backend: what `AutoTokenizer.from_pretrained` returned.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._vocabulary: dict[str, int] = backend.get_vocab()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return [self._backend.encode(text, **options) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), clean_up_tokenization_spaces=False)

    @property
    def vocab_size(self) -> int:
        return max(self._vocabulary.values()) + 1

    @property
    def fingerprint(self) -> str:
        """Over the class, its vocabulary and special tokens, and a sentencepiece model."""
        special = {name: str(token) for name, token in self._backend.special_tokens_map.items()}
        content = [type(self._backend).__name__, sorted(self._vocabulary.items()), special]
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=False)
        digest = xxhash.xxh3_128(canonical.encode("utf-8", "surrogatepass"))
        model_file = getattr(self._backend, "vocab_file", None)
        if model_file and str(model_file).endswith(".model"):
            digest.update(Path(model_file).read_bytes())
        return digest.hexdigest()

    @property
    def round_trips(self) -> bool:
        return False

    def byte_lengths(self) -> np.ndarray:
        """(V,) int32: see `Tokenizer.byte_lengths`."""
        special = set(self._backend.all_special_ids)
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for token, number in self._vocabulary.items():
            if number in special:
                continue
            sentencepiece_like = _WORD_MARKER in token or _BYTE_PIECE.fullmatch(token)
            measured = _piece_length(token) if sentencepiece_like else None
            lengths[number] = measured or _utf8_length(self.decode([number]))
        return lengths

    def word_starts(self) -> np.ndarray:
        """(V,) bool: see `Tokenizer.word_starts`."""
        wordpiece = any(token.startswith("##") for token in self._vocabulary)
        return _word_starts(
            self._vocabulary,
            self.vocab_size,
            set(self._backend.all_special_ids),
            lambda token: not token.startswith("##") if wordpiece else _begins_with_space(token),
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        self._backend.save_pretrained(os.fspath(folder))

    def _token_id(self, token: str) -> int | None:
        return self._vocabulary.get(token)

    def _declared_eos(self) -> int | None:
        return self._backend.eos_token_id


def load_with_transformers(folder: Path) -> Tokenizer:
    """Load a folder with AutoTokenizer, offline; a fast tokenizer is unwrapped to its backend."""
    files = {entry.name for entry in folder.iterdir()}
    known = {"tokenizer_config.json", "config.json", "vocab.json", "vocab.txt", "merges.txt"}
    if not files & known:
        raise UserError(
            f"{folder} holds no tokenizer, only {', '.join(sorted(files)[:8]) or 'nothing'}",
            rule="a tokenizer folder holds tokenizer.json, a sentencepiece model, or the files "
            "that transformers' AutoTokenizer loads",
            remedy="give the folder that holds tokenizer.json",
        )
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(os.fspath(folder), local_files_only=True)
    if getattr(loaded, "is_fast", False):
        eos_token = loaded.eos_token
        return FastTokenizer(loaded.backend_tokenizer, eos_token)
    return TransformersTokenizer(loaded)


def canonical_json(value: Any) -> bytes:
    """UTF-8 of `json.dumps(value, sort_keys=True, ensure_ascii=False)`, for what orjson has read.

    Vocabularies and merges, which are nearly all of a tokenizer, take a tenth of json's time.
    """
    if _is_plain(value):
        # Strings hold no line break of their own here, so each one stands between two values.
        content = orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2)
        for indent in (b"\n    ", b"\n  ", b"\n"):
            content = content.replace(b"," + indent, b", ").replace(indent, b"")
        return content
    if isinstance(value, dict):
        members = (
            canonical_json(key) + b": " + canonical_json(value[key]) for key in sorted(value)
        )
        return b"{" + b", ".join(members) + b"}"
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode()


def _is_plain(value: Any) -> bool:
    """Whether it is {string: whole number}, [string] or [[string]]: neither deeper, nor with
    numbers that json and orjson write in different ways."""
    if isinstance(value, dict):
        return set(map(type, value.values())) <= {int}
    if not isinstance(value, list):
        return False
    kinds = set(map(type, value))
    nested = kinds == {list}
    return (set(map(type, itertools.chain.from_iterable(value))) if nested else kinds) <= {str}


def _parts(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A pre-tokenizer or decoder and, if it is a sequence, everything in it."""
    if component is None:
        return
    yield component
    for key in ("pretokenizers", "decoders"):
        for part in component.get(key, ()):
            yield from _parts(part)


def _word_starts(
    vocabulary: dict[str, int], size: int, special: set[int], begins: Callable[[str], bool]
) -> np.ndarray:
    starts = np.zeros(size, dtype=bool)
    for token, number in vocabulary.items():
        starts[number] = number in special or begins(token)
    return starts


def _begins_with_space(token: str) -> bool:
    return token.startswith((_WORD_MARKER, *_BYTE_LEVEL_SPACES))


def _byte_level_alphabet() -> set[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet())


def _piece_length(piece: str) -> int:
    if _BYTE_PIECE.fullmatch(piece):
        return 1
    return _utf8_length(piece.replace(_WORD_MARKER, " "))


def _utf8_length(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
