"""A contiguous part of a model, as a pipeline stage runs it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a config is checked, and a schedule drawn, without waiting for torch
    from torch import nn


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


def keep_layers(layers: nn.ModuleDict, chunks: Iterable[Chunk]) -> None:
    """Delete the layers, keyed by global index, that are in none of `chunks`."""
    kept = list(chunks)
    for index in list(layers):
        if not any(int(index) in chunk for chunk in kept):
            del layers[index]


def keep_tokens_only(embedding: nn.Module) -> None:
    """Delete all of an embedding but its token table, which a tied head elsewhere reads."""
    for name, _ in list(embedding.named_children()):
        if name != "tokens":
            delattr(embedding, name)
