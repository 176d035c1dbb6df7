"""Documents cut into sentences, and sentences that are too long into pieces."""

from __future__ import annotations

import numpy as np

from megascale.errors import UserError


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, in order; white space between them goes, everything else stays.

    By nupunkt, a Punkt model (Kiss & Strunk 2006, https://doi.org/10.1162/coli.2006.32.4.485) that
    comes with its parameters. White space alone gives no sentence.

    Raises:
        UserError: nupunkt is not installed (it needs Python 3.11).
    """
    try:
        # imported here: its model is loaded with it
        import nupunkt
    except ImportError as error:
        raise UserError(
            "--bert needs the package nupunkt, which is not installed",
            rule="sentences are found by nupunkt, which runs on Python 3.11 or newer",
            remedy="prepare the data with Python >= 3.11 (`pip install nupunkt`); the dataset "
            "can be read by any",
        ) from error
    return [str(sentence) for sentence in nupunkt.sent_tokenize(text)]


def cut_pieces(tokens: np.ndarray, word_starts: np.ndarray, limit: int) -> list[np.ndarray]:
    """Cut a sentence into pieces of at most `limit` tokens; put together they are the sentence.

    A cut is at the last word that begins inside the limit, or anywhere when a single word is
    longer than that.

    Args:
        tokens: (n,) ids of the sentence.
        word_starts: (V,) bool, see `Tokenizer.word_starts`.
        limit: at least 1.
    """
    assert limit >= 1
    pieces = []
    begin = 0
    while len(tokens) - begin > limit:
        words = np.flatnonzero(word_starts[tokens[begin + 1 : begin + limit + 1]])
        end = begin + 1 + int(words[-1]) if words.size else begin + limit
        pieces.append(tokens[begin:end])
        begin = end
    if begin < len(tokens):
        pieces.append(tokens[begin:])
    return pieces
