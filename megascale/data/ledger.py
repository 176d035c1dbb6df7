"""What a run has read of each source: samples, tokens, epochs; a function of the samples seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megascale.data.blend import BlendedDataset


@dataclass(frozen=True)
class SourceCount:
    """What was read of one source.

    Attributes:
        samples: of this source. tokens: in them, without padding.
        epochs: samples over those of one pass.
    """

    samples: int
    tokens: int
    epochs: float


class Ledger:
    """Counts of every source of a blend after any number of samples.

    They follow from the number alone. What was counted last is kept, so that moving on by one step
    costs one step; any other number is counted from the start.

    Args:
        blend: what is trained on.
        names: of its datasets, each different.
    """

    def __init__(self, blend: BlendedDataset, names: Sequence[str]) -> None:
        assert len(names) == len(set(names)) == len(blend.datasets)
        self.names = tuple(names)
        self._blend = blend
        self._samples = [0] * len(names)
        self._tokens = [0] * len(names)

    def at(self, samples_seen: int) -> dict[str, SourceCount]:
        """The counts of the first `samples_seen` samples, by source; those read so far only."""
        samples = self._blend.consumed(samples_seen).tolist()
        for source, dataset in enumerate(self._blend.datasets):
            before, after = self._samples[source], samples[source]
            if after < before:
                before, self._tokens[source] = 0, 0
            self._tokens[source] += dataset.count_tokens(before, after - before)
        self._samples = samples
        return {
            name: SourceCount(count, tokens, count / dataset.samples_per_epoch)
            for name, count, tokens, dataset in zip(
                self.names, samples, self._tokens, self._blend.datasets, strict=True
            )
            if count
        }

    def tokens(self, samples_seen: int) -> int:
        """Tokens of the first `samples_seen` samples, over all sources."""
        return sum(count.tokens for count in self.at(samples_seen).values())

    def record(self, samples_seen: int) -> dict[str, dict[str, float]]:
        """`at` as JSON values."""
        return {name: asdict(count) for name, count in self.at(samples_seen).items()}
