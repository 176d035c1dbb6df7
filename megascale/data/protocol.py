"""What the loaders ask of a dataset."""

from __future__ import annotations

from typing import Protocol

import numpy as np

IGNORE_LABEL = -100
"""The label of a position that is left out of the loss (the default of torch's cross-entropy)."""


class SampleSource(Protocol):
    """An endless sequence of samples, each a pure function of its number."""

    seq_length: int

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The samples of these numbers, stacked: name -> (B, T) int64."""
        ...


class FiniteSampleSource(SampleSource, Protocol):
    """A sequence of samples that ends."""

    def __len__(self) -> int:
        """How many samples there are."""
        ...
