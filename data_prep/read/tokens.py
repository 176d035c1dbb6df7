"""Reader of Megatron's .bin/.idx token files: ids back to text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from data_prep.local_copies import local_pair
from data_prep.read.options import FormatOptions, Item
from data_prep.skips import SkipReport
from data_prep.sources import InputFile
from megascale.data.places import as_path
from megascale.data.token_file import TokenFile
from megascale.data.tokenizer import Tokenizer, load_tokenizer
from megascale.errors import UserError

_TOKENIZER_FOLDER = "tokenizer"  # inside our own datasets


def read_tokens(file: InputFile, options: FormatOptions, skips: SkipReport) -> Iterator[Item]:
    """The documents of a pair of token files; sentences of one document joined by a space.

    The end-of-document id goes. Text comes back exactly when the tokenizer is byte-level.

    Raises:
        UserError: no tokenizer is known, it does not fit the ids, or the files are damaged.
    """
    prefix = as_path(file.filesystem.unstrip_protocol(file.path)).with_suffix("")
    tokenizer = load_tokenizer(options.tokenizer or _tokenizer_beside(prefix))
    with local_pair(prefix) as near:
        yield from _texts(TokenFile(near), tokenizer, file, skips)


def _texts(
    tokens: TokenFile, tokenizer: Tokenizer, file: InputFile, skips: SkipReport
) -> Iterator[Item]:
    tokens.check_index()
    end = _end_id(tokenizer)
    bounds = [int(index) for index in tokens.document_indices]
    for number, (first, stop) in enumerate(itertools.pairwise(bounds), start=1):
        parts = [_sequence(tokens, index, end, tokenizer) for index in range(first, stop)]
        text = " ".join(part for part in parts if part)
        if text.strip():
            yield Item(text, number)
        else:
            skips.add("empty document", f"{file.name}:{number}")


def _sequence(tokens: TokenFile, index: int, end: int | None, tokenizer: Tokenizer) -> str:
    begin = int(tokens.sequence_pointers[index]) // tokens.dtype.itemsize
    ids = tokens.tokens[begin : begin + int(tokens.sequence_lengths[index])].tolist()
    if ids and max(ids) >= tokenizer.vocab_size:
        raise UserError(
            f"{tokens.bin_path} holds the id {max(ids)}",
            rule=f"the tokenizer given has {tokenizer.vocab_size} ids",
            remedy="give the tokenizer that the file was made with",
        )
    return tokenizer.decode(ids[:-1] if ids and ids[-1] == end else ids)


def _end_id(tokenizer: Tokenizer) -> int | None:
    try:
        return tokenizer.eod_id
    except UserError:  # a BERT tokenizer has none
        return None


def _tokenizer_beside(prefix: Path) -> Path:
    folder = prefix.parent / _TOKENIZER_FOLDER
    if folder.is_dir():
        return folder
    raise UserError(
        f"{prefix}.bin holds ids, and no tokenizer is given",
        rule="token files are read back to text with the tokenizer they were made with",
        remedy="give --tokenizer",
    )
