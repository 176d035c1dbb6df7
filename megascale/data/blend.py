"""Datasets mixed by weight, in stages: which dataset a sample comes from is arithmetic.

A stage is a mix that holds from one sample number to the next stage's. Within a stage the mix is
exact in every block of 65,536 samples: each source has a fixed quota, so the number of samples that
it gave before any block is a product, and (source, index in the source) of a sample needs only its
own block. What each source gave in the stages before is a small table made at the start. Each
source's samples come in their own order, whatever the mix: none is skipped and none comes twice.

    from_sample  0             100,000                 140,000
                 a 0.7, b 0.3  a 0.2, c 0.8            b
    a gave       0             70,000                  78,000
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megascale.data.permutation import derive_key, permute
from megascale.data.protocol import TrainingSource
from megascale.errors import UserError

BLOCK_SIZE = 65_536


@dataclass(frozen=True)
class Stage:
    """One mix.

    Attributes:
        from_sample: the number of its first sample.
        sources: numbers of the datasets that it reads, each once.
        weights: their shares; only ratios matter.
    """

    from_sample: int
    sources: tuple[int, ...]
    weights: tuple[float, ...]


class Mixture:
    """The order of sources within a stage, a pure function of (weights, seed, number).

    Args:
        weights: one positive number a source; only their ratios matter.
        seed: any integer.

    Raises:
        UserError: see `block_quotas`.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.quotas = block_quotas(weights)
        self._seed = seed
        # Two blocks: a batch may lie across the border of two.
        self._block = functools.lru_cache(maxsize=2)(self._make_block)

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, rank among that source's samples) of each sample of the stage, int64."""
        if len(self.quotas) == 1:
            return np.zeros_like(numbers), numbers
        blocks, positions = np.divmod(numbers, BLOCK_SIZE)
        sources, ranks = np.empty_like(numbers), np.empty_like(numbers)
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            block_sources, block_ranks = self._block(block)
            sources[chosen] = block_sources[positions[chosen]]
            ranks[chosen] = block * self.quotas[sources[chosen]] + block_ranks[positions[chosen]]
        return sources, ranks

    def consumed(self, count: int) -> np.ndarray:
        """(sources,) int64: how many of the stage's first `count` samples each source gives."""
        block, rest = divmod(count, BLOCK_SIZE)
        given = block * self.quotas
        if rest and len(self.quotas) == 1:
            return given + rest
        if rest:
            given = given + np.bincount(self._block(block)[0][:rest], minlength=len(self.quotas))
        return given

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, rank among that source's samples of this block) of the block's positions."""
        in_order = np.repeat(np.arange(len(self.quotas)), self.quotas)
        places = np.arange(BLOCK_SIZE)
        sources = in_order[permute(places, BLOCK_SIZE, derive_key(self._seed, block))]
        by_source = np.argsort(sources, kind="stable")
        first = np.cumsum(self.quotas) - self.quotas
        ranks = np.empty(BLOCK_SIZE, dtype=np.int64)
        ranks[by_source] = places - first[in_order]
        return sources, ranks


class BlendedDataset:
    """An endless sequence of samples drawn from several datasets, the mix changing by stages.

    Sample n is a pure function of (the stages that begin at or before n, seed, n).

    Args:
        datasets: at least one, all of the same seq_length.
        stages: in ascending order of from_sample, the first from 0.
        seed: any integer.

    Raises:
        UserError: a weight is wrong or too small to give one sample in a block, or the lengths
            differ.
    """

    def __init__(
        self, datasets: Sequence[TrainingSource], stages: Sequence[Stage], seed: int
    ) -> None:
        assert datasets
        lengths = [dataset.seq_length for dataset in datasets]
        if len(set(lengths)) > 1:
            raise UserError(
                f"the blended datasets have the seq_lengths {lengths}",
                rule="all sources of a blend have one seq_length",
                remedy="give them the same seq_length",
            )
        self.datasets, self.seq_length = list(datasets), lengths[0]
        self.stages = tuple(stages)
        self._starts = np.array([stage.from_sample for stage in stages], dtype=np.int64)
        assert self._starts[0] == 0
        assert (np.diff(self._starts) > 0).all()
        self.mixtures = [Mixture(s.weights, _stage_seed(seed, s.from_sample)) for s in stages]
        self._sources = [np.array(stage.sources, dtype=np.int64) for stage in stages]
        self._given = self._table()

    def stage_of(self, indices: np.ndarray) -> np.ndarray:
        """Which stage each sample is in: int64, the shape of `indices`."""
        indices = np.asarray(indices, dtype=np.int64)
        return np.searchsorted(self._starts, indices, side="right") - 1

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(dataset, sample number in the dataset) of each sample: int64, the shape of `indices`."""
        indices = np.asarray(indices, dtype=np.int64)
        stages = self.stage_of(indices)
        sources, inner = np.empty_like(indices), np.empty_like(indices)
        for stage in np.unique(stages).tolist():
            chosen = stages == stage
            slots, ranks = self.mixtures[stage].locate(indices[chosen] - self._starts[stage])
            sources[chosen] = self._sources[stage][slots]
            inner[chosen] = ranks + self._given[stage][sources[chosen]]
        return sources, inner

    def consumed(self, count: int) -> np.ndarray:
        """(datasets,) int64: how many of the first `count` samples each dataset gives."""
        stage = int(self.stage_of(np.array(count)))
        given = self._given[stage].copy()
        given[self._sources[stage]] += self.mixtures[stage].consumed(
            count - int(self._starts[stage])
        )
        return given

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Samples by number, in the order asked for; see the sources' own `batch`."""
        sources, inner = self.locate(indices)
        present = np.unique(sources).tolist()
        if len(present) == 1:
            return self.datasets[present[0]].batch(inner)
        result: dict[str, np.ndarray] = {}
        for source in present:
            rows = np.flatnonzero(sources == source)
            for name, part in self.datasets[source].batch(inner[rows]).items():
                if name not in result:
                    result[name] = np.empty((len(sources), *part.shape[1:]), dtype=part.dtype)
                result[name][rows] = part
        return result

    def _table(self) -> list[np.ndarray]:
        """For each stage, (datasets,) int64: the samples that each dataset gave before it."""
        given = [np.zeros(len(self.datasets), dtype=np.int64)]
        for number in range(len(self.stages) - 1):
            length = int(self._starts[number + 1] - self._starts[number])
            after = given[-1].copy()
            after[self._sources[number]] += self.mixtures[number].consumed(length)
            given.append(after)
        return given


def _stage_seed(seed: int, from_sample: int) -> int:
    """Of a stage's own place only, so that stages before or after do not change its order."""
    return derive_key(seed, from_sample) if from_sample else seed


def block_quotas(weights: Sequence[float]) -> np.ndarray:
    """(sources,) int64: samples of each source in a block, by the method of the largest remainder.

    Raises:
        UserError: a weight is not a positive finite number, or earns no sample in a block.
    """
    for number, weight in enumerate(weights):
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(
                f"weight {weight} of source {number}",
                rule="a weight is a positive finite number",
                remedy="leave the source out if it shall not be read",
            )
    # Scaled by a power of two first, which is exact: the sum of finite numbers may be infinite.
    scaled = np.ldexp(np.asarray(weights, dtype=np.float64), -math.frexp(max(weights))[1])
    exact = scaled / math.fsum(scaled) * BLOCK_SIZE
    quotas = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(-(exact - quotas), kind="stable")
    quotas[by_remainder[: BLOCK_SIZE - int(quotas.sum())]] += 1
    if (quotas == 0).any():
        number = int(np.flatnonzero(quotas == 0)[0])
        raise UserError(
            f"weight {weights[number]} of source {number} is {exact[number]:.2g} of "
            f"{BLOCK_SIZE} samples",
            rule=f"each source gives at least one sample in a block of {BLOCK_SIZE}",
            remedy=f"raise its share above {1 / BLOCK_SIZE:.1e}, or leave the source out",
        )
    return quotas
