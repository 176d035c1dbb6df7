"""A contiguous part of a model, as a pipeline stage runs it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Chunk:
    """Layers [begin, end) of a model of `num_layers`, with the ends of the model that adjoin them.

    Attributes:
        begin, end: global layer indices; a chunk has at least one layer.
        num_layers: L, layers of the whole model.
    """

    begin: int
    end: int
    num_layers: int

    def __post_init__(self) -> None:
        assert 0 <= self.begin < self.end <= self.num_layers, self

    def __contains__(self, layer: int) -> bool:
        return self.begin <= layer < self.end

    @property
    def is_first(self) -> bool:
        """Whether the embedding belongs to it."""
        return self.begin == 0

    @property
    def is_last(self) -> bool:
        """Whether the final norm and the heads belong to it."""
        return self.end == self.num_layers


def keep_chunks(model: Any, chunks: Iterable[Chunk], *, tied: bool) -> bool:
    """Delete from a model's `layers` and `embedding` what none of `chunks` needs.

    Args:
        model: has `layers`, keyed by global index, and `embedding`.
        tied: whether what follows the last layer reads the token table.

    Returns:
        whether the last chunk, with what follows it, is among `chunks`.
    """
    kept = list(chunks)
    for index in list(model.layers):
        if not any(int(index) in chunk for chunk in kept):
            del model.layers[index]
    has_last = any(chunk.is_last for chunk in kept)
    if not any(chunk.is_first for chunk in kept):
        if has_last and tied:
            for name, _ in list(model.embedding.named_children()):
                if name != "tokens":
                    delattr(model.embedding, name)
        else:
            model.embedding = None
    return has_last
