"""Batches as torch tensors: which samples of a step belong to which rank and micro-batch.

With G = global_batch_size, D = dp_size and m = micro_batch_size, the step that begins at sample s
trains on samples s .. s + G - 1. Rank r takes the contiguous slice from s + r G / D on and cuts it
into G / (D m) micro-batches. The samples of a step are thus the same for every D and m.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from megascale.data.batch_size import BatchSizeSchedule
from megascale.data.protocol import (
    IGNORE_LABEL,
    FiniteSampleSource,
    SampleSource,
    label_names,
)
from megascale.errors import UserError

MicroBatch = dict[str, torch.Tensor]
PADDING_SAMPLE_ID = -1


class BatchLoader:
    """The micro-batches of one rank, as a pure function of the samples consumed before the step.

    Args:
        dataset: where samples come from.
        global_batch_size: in samples; a schedule when it grows over the run.
        micro_batch_size: in samples.
        dp_rank, dp_size: this rank's place among the data-parallel ranks.
        prefetch: prepare the next step in a background thread; changes no result.
        vocab_size: ids that the model knows; None: they are not looked at.

    Raises:
        UserError: the batch sizes do not divide; from `load`: an id that the model does not know.
    """

    def __init__(
        self,
        dataset: SampleSource,
        global_batch_size: int | BatchSizeSchedule,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        prefetch: bool = True,
        vocab_size: int | None = None,
    ) -> None:
        assert 0 <= dp_rank < dp_size
        if isinstance(global_batch_size, int):
            global_batch_size = BatchSizeSchedule(global_batch_size)
        self.batch_size = global_batch_size
        count_microbatches(self.batch_size.final, micro_batch_size, dp_size)
        self._dataset, self._micro_batch_size = dataset, micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._vocab_size = vocab_size
        self._executor = ThreadPoolExecutor(1, "batch-prefetch") if prefetch else None
        self._pending: tuple[int, Future[list[MicroBatch]]] | None = None

    def load(self, samples_seen: int) -> list[MicroBatch]:
        """This rank's micro-batches of the step that begins at sample `samples_seen`.

        Each holds (B, T) int64 tensors of the dataset and `sample_ids` (B,) int64, the samples'
        global numbers. An error of the background thread is raised here.
        """
        pending, self._pending = self._pending, None
        if pending is not None and pending[0] == samples_seen:
            loaded = pending[1].result()
        else:
            loaded = self._load(samples_seen)
        if self._executor is not None:
            following = samples_seen + self.batch_size.at(samples_seen)
            self._pending = (following, self._executor.submit(self._load, following))
        return loaded

    def close(self) -> None:
        """Stop the background thread; `load` may not be called again."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def _load(self, samples_seen: int) -> list[MicroBatch]:
        size = self._micro_batch_size
        total = self.batch_size.at(samples_seen)
        numbers = np.arange(samples_seen, samples_seen + total, dtype=np.int64)
        # One read for the whole step, then views: fewer, larger numpy calls.
        ids = rank_share(numbers, size, self._dp_rank, self._dp_size)
        arrays = self._dataset.batch(ids)
        if self._vocab_size is not None:
            _require_known_ids(arrays, ids, self._vocab_size)
        whole = _to_tensors(arrays, ids)
        return [
            {name: tensor[begin : begin + size] for name, tensor in whole.items()}
            for begin in range(0, len(ids), size)
        ]


class EvaluationLoader:
    """A finite dataset dealt out to ranks in micro-batches; every rank gets the same number.

    With ZeRO-3 a forward pass is collective, so a rank without samples still has to take part: it
    gets rows whose labels are all -100 and whose `sample_ids` are -1.

    Args:
        dataset: the samples, each given to exactly one rank.
        micro_batch_size: rows of each batch.
        dp_rank, dp_size: this rank's place among the data-parallel ranks.
        max_samples: take only so many samples, spread evenly over the dataset; None for all.
    """

    def __init__(
        self,
        dataset: FiniteSampleSource,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        max_samples: int | None = None,
    ) -> None:
        assert 0 <= dp_rank < dp_size
        assert micro_batch_size >= 1
        self._dataset, self._micro_batch_size = dataset, micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self.num_samples = len(dataset) if max_samples is None else min(len(dataset), max_samples)

    def __len__(self) -> int:
        return -(-self.num_samples // (self._micro_batch_size * self._dp_size))

    def __iter__(self) -> Iterator[MicroBatch]:
        size = self._micro_batch_size
        for number in range(len(self)):
            first = (number * self._dp_size + self._dp_rank) * size
            ids = np.arange(first, first + size, dtype=np.int64)
            padding = ids >= self.num_samples
            # Padding rows repeat sample 0 for its valid ids and shapes. A part of the samples is
            # spread evenly over all: neighbours come from few documents.
            spread = ids * len(self._dataset) // self.num_samples
            arrays = self._dataset.batch(np.where(padding, 0, spread))
            for name in label_names(arrays):
                arrays[name][padding] = IGNORE_LABEL
            yield _to_tensors(arrays, np.where(padding, PADDING_SAMPLE_ID, spread))


def rank_share(
    numbers: np.ndarray, micro_batch_size: int, dp_rank: int, dp_size: int
) -> np.ndarray:
    """The samples of a step that one data-parallel rank takes, out of all of them in order.

    Raises:
        UserError: see `count_microbatches`.
    """
    count_microbatches(len(numbers), micro_batch_size, dp_size)
    share = len(numbers) // dp_size
    return numbers[dp_rank * share : (dp_rank + 1) * share]


def count_microbatches(global_batch_size: int, micro_batch_size: int, dp_size: int) -> int:
    """Micro-batches a rank runs each step: global_batch_size / (micro_batch_size x dp_size).

    Raises:
        UserError: it is not a whole number of at least 1.
    """
    a_round = micro_batch_size * dp_size
    if a_round <= 0 or global_batch_size <= 0 or global_batch_size % a_round:
        multiple = max(1, round(global_batch_size / a_round)) * a_round if a_round > 0 else 0
        raise UserError(
            f"train.global_batch_size {global_batch_size} = train.micro_batch_size "
            f"{micro_batch_size} x data_parallel_size {dp_size} x "
            f"{global_batch_size / a_round if a_round else float('nan'):g} micro-batches",
            rule="the number of micro-batches is a whole number of at least 1",
            remedy=f"for example train.global_batch_size={multiple}"
            if multiple > 0
            else "give positive batch sizes",
        )
    return global_batch_size // a_round


def _require_known_ids(arrays: dict[str, np.ndarray], ids: np.ndarray, vocab_size: int) -> None:
    """Refuse tokens that no embedding stands for: on a GPU they would end the process."""
    for name in ("input_ids", "labels"):
        lowest, highest = int(arrays[name].min()), int(arrays[name].max())
        if highest >= vocab_size or (lowest < 0 and name == "input_ids"):
            wrong = (arrays[name] >= vocab_size) | ((arrays[name] < 0) & (name == "input_ids"))
            row = int(np.flatnonzero(wrong.any(axis=1))[0])
            raise UserError(
                f"sample {ids[row]} holds the token id {arrays[name][row][wrong[row]][0]}",
                rule=f"ids lie in 0..{vocab_size - 1}: model.vocab_size is {vocab_size}",
                remedy="set model.vocab_size to that of the tokenizer that made the data",
            )


def _to_tensors(arrays: dict[str, np.ndarray], sample_ids: np.ndarray) -> MicroBatch:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    tensors["sample_ids"] = torch.from_numpy(sample_ids)
    return tensors
