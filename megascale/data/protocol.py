"""What the loaders ask of a dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

IGNORE_LABEL = -100
"""The label of a position that is left out of the loss (the default of torch's cross-entropy)."""

LABEL_NAMES = ("labels", "sentence_labels")
"""The targets that a batch may have, one tensor an objective, in the order of a module's losses."""


def label_names(batch: Mapping[str, Any]) -> list[str]:
    """Names of the targets of a batch, one for each objective; the first are the tokens'."""
    return [name for name in LABEL_NAMES if name in batch]


class SampleSource(Protocol):
    """An endless sequence of samples, each a pure function of its number."""

    seq_length: int

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The samples of these numbers, stacked: name -> (B, T) int64; (B,) where a sample has
        one number, such as `sentence_labels`."""
        ...


class TrainingSource(SampleSource, Protocol):
    """A sequence of samples over one corpus, epoch after epoch without end."""

    @property
    def samples_per_epoch(self) -> int:
        """Samples after which the text begins anew."""
        ...

    def count_tokens(self, first: int, count: int) -> int:
        """Tokens of the samples [first, first + count); padding is none."""
        ...

    def spans(self, index: int) -> list[tuple[int, int]]:
        """(start, length) of the pieces of the corpus's stream that a sample is made of."""
        ...


class FiniteSampleSource(SampleSource, Protocol):
    """A sequence of samples that ends."""

    def __len__(self) -> int:
        """How many samples there are."""
        ...
