"""Several datasets mixed by weight, with the mix exact in every block of 65,536 samples.

Within a block each source has a fixed quota, so the number of samples that a source gave before
any block is a product, and (source, index in the source) of any sample needs only its own block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from megascale.data.permutation import derive_key, permute
from megascale.data.protocol import SampleSource
from megascale.errors import UserError

BLOCK_SIZE = 65_536


class BlendedDataset:
    """An endless sequence of samples drawn from several datasets.

    Sample n is a pure function of (weights, seed, n). Each source's samples come in their own
    order, none skipped and none twice.

    Args:
        datasets: at least one, all of the same seq_length.
        weights: one positive number a dataset; only their ratios matter.
        seed: any integer.

    Raises:
        UserError: a weight is wrong or too small to give one sample in a block, or the lengths
            differ.
    """

    def __init__(
        self, datasets: Sequence[SampleSource], weights: Sequence[float], seed: int
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
        self.quotas = block_quotas(weights, len(datasets))
        self._seed = seed
        # Two blocks: a batch may lie across the border of two.
        self._block = functools.lru_cache(maxsize=2)(self._make_block)

    def source_of(self, indices: np.ndarray) -> np.ndarray:
        """Which dataset each sample comes from: int64, the shape of `indices`."""
        return self._locate(np.asarray(indices, dtype=np.int64))[0]

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Samples by number, in the order asked for; see the sources' own `batch`."""
        sources, inner = self._locate(np.asarray(indices, dtype=np.int64))
        result: dict[str, np.ndarray] = {}
        for source in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == source)
            for name, part in self.datasets[source].batch(inner[rows]).items():
                if name not in result:
                    result[name] = np.empty((len(sources), *part.shape[1:]), dtype=part.dtype)
                result[name][rows] = part
        return result

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(dataset, index in the dataset) of each sample."""
        blocks, positions = np.divmod(indices, BLOCK_SIZE)
        sources, inner = np.empty_like(indices), np.empty_like(indices)
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            block_sources, ranks = self._block(block)
            sources[chosen] = block_sources[positions[chosen]]
            inner[chosen] = block * self.quotas[sources[chosen]] + ranks[positions[chosen]]
        return sources, inner

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


def block_quotas(weights: Sequence[float], sources: int) -> np.ndarray:
    """(sources,) int64: samples of each source in a block, by the method of the largest remainder.

    Raises:
        UserError: a weight is not a positive finite number, or earns no sample in a block.
    """
    if len(weights) != sources:
        raise UserError(
            f"{len(weights)} weights for {sources} sources",
            rule="each source of a blend has one weight",
            remedy="give as many weights as sources",
        )
    for number, weight in enumerate(weights):
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(
                f"weight {weight} of source {number}",
                rule="a weight is a positive finite number",
                remedy="leave the source out if it shall not be read",
            )
    exact = np.asarray(weights, dtype=np.float64) / math.fsum(weights) * BLOCK_SIZE
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
