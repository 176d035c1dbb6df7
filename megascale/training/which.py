"""What a step of a run reads, past or future: arithmetic over the config and the data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megascale.checkpoint.manager import CheckpointFolder
from megascale.checkpoint.reader import CheckpointReader
from megascale.config.checks import DEFAULT_CHECKS
from megascale.config.load import load_config
from megascale.config.schema import Config
from megascale.data.batch_size import batch_size_schedule
from megascale.data.corpus import DocumentPart
from megascale.data.loader import rank_share
from megascale.errors import UserError
from megascale.training.datasets import Corpora, RunData, open_corpora, resolve_vocab_size
from megascale.training.resume import require_same_data
from megascale.training.state import TrainState
from megascale.training.tasks.registry import build_task


@dataclass(frozen=True)
class SampleRead:
    """One sample of a step.

    Attributes:
        sample: its number in the run. stage: of the mixes, from 0.
        source: path of its dataset. source_sample: its number there. epoch: of the dataset, from 0.
        documents: that it is made of, in order.
        tokens: that are no padding.
        text: what the model reads; None without a tokenizer.
    """

    sample: int
    stage: int
    source: str
    source_sample: int
    epoch: int
    documents: list[DocumentPart]
    tokens: int
    text: str | None


class RunSamples:
    """The samples of a run by step.

    Args:
        run: a run's folder, a checkpoint's, or a config file.

    Raises:
        UserError: no config there, data that cannot be opened, or that is not what the run's
            newest checkpoint was trained on.
    """

    def __init__(self, run: str) -> None:
        path = Path(run)
        if not path.exists():
            raise UserError(
                f"no file or folder {run}",
                rule="RUN is a run's folder (run.output_dir), a checkpoint's, or a config file",
                remedy="check the path",
            )
        self._metrics = path / "metrics.jsonl"
        config = load_config(path / "config.yaml" if path.is_dir() else path, checks=DEFAULT_CHECKS)
        self._corpora: Corpora = open_corpora(config)
        self.config: Config = resolve_vocab_size(config, self._corpora)
        self._checkpoint = _newest_checkpoint(path, config)
        if self._checkpoint is not None:
            require_same_data(self._checkpoint, self.config, self._corpora)
        self._data: RunData = build_task(self.config).open_data(self._corpora)

    def of_step(
        self, step: int, rank: int | None = None, world_size: int | None = None
    ) -> list[SampleRead]:
        """The samples of a step, counted from 1 as in metrics.jsonl; of one rank, if given.

        Args:
            world_size: number of ranks; None: that of the newest checkpoint.

        Raises:
            UserError: the number of ranks is not known or does not fit, or there is no such rank.
        """
        first, size = self._range_of(step)
        numbers = np.arange(first, first + size, dtype=np.int64)
        if rank is not None:
            numbers = self._of_rank(numbers, rank, world_size)
        return self._read(numbers)

    def _range_of(self, step: int) -> tuple[int, int]:
        """(first sample, samples) of a step.

        As it was, where metrics.jsonl tells; else counted from the newest checkpoint before it, or
        from the start: a resumed run may have another batch size.
        """
        for line in self._metrics.read_bytes().splitlines() if self._metrics.is_file() else ():
            if line.startswith(b'{"step": %d,' % step):
                done = json.loads(line)
                return done["samples_seen"] - done["global_batch_size"], done["global_batch_size"]
        schedule = batch_size_schedule(self.config.train)
        state = TrainState()
        if self._checkpoint is not None and self._checkpoint.manifest.step < step:
            state = TrainState.from_dict(self._checkpoint.manifest.state["train"])
        first = schedule.samples_after(step - 1 - state.step, state.samples_seen)
        return first, schedule.at(first)

    def _of_rank(self, numbers: np.ndarray, rank: int, world_size: int | None) -> np.ndarray:
        if world_size is None and self._checkpoint is not None:
            world_size = self._checkpoint.manifest.world_size
        parallel = self.config.parallel
        size = (world_size or 0) // parallel.model_parallel_size
        if not size or (world_size or 0) % parallel.model_parallel_size:
            raise UserError(
                f"rank {rank} of {world_size or 'an unknown number of'} ranks",
                rule="the samples of a rank depend on the number of ranks, a multiple of "
                f"tensor * pipeline * context parallel size = {parallel.model_parallel_size}",
                remedy=f"for example --world-size {parallel.model_parallel_size * 2}",
            )
        if not 0 <= rank < size * parallel.model_parallel_size:
            raise UserError(
                f"--rank {rank}",
                rule=f"a run on {world_size} ranks has ranks 0..{(world_size or 1) - 1}",
                remedy="give one of them, or another --world-size",
            )
        inside = parallel.tensor_parallel_size * parallel.context_parallel_size
        return rank_share(numbers, self.config.train.micro_batch_size, rank // inside % size, size)

    def _read(self, numbers: np.ndarray) -> list[SampleRead]:
        blend, tokenizer = self._data.train, self._corpora.tokenizer
        stages, places = blend.stage_of(numbers), blend.locate(numbers)
        batch = blend.batch(numbers)
        found = []
        for row, (number, source, inner) in enumerate(
            zip(numbers.tolist(), *(place.tolist() for place in places), strict=True)
        ):
            dataset, corpus = blend.datasets[source], self._corpora.corpora[source]
            tokens = dataset.count_tokens(inner, 1)
            if "attention_mask" in batch:  # of a bert, where padding counts
                tokens = int(batch["attention_mask"][row].sum())
            ids = batch["input_ids"][row][:tokens].tolist()
            found.append(
                SampleRead(
                    sample=number,
                    stage=int(stages[row]),
                    source=self.config.data.source_paths[source],
                    source_sample=inner,
                    epoch=inner // dataset.samples_per_epoch,
                    documents=[
                        part for span in dataset.spans(inner) for part in corpus.documents_in(*span)
                    ],
                    tokens=tokens,
                    text=None if tokenizer is None else tokenizer.decode(ids),
                )
            )
        return found


def _newest_checkpoint(run: Path, config: Config) -> CheckpointReader | None:
    """That of the run, or the checkpoint itself; None before the first."""
    if (run / "manifest.json").is_file():
        return CheckpointReader(str(run))
    output = run if run.is_dir() else Path(config.run.output_dir)
    folder = CheckpointFolder(config.checkpoint.folder or str(output / "checkpoints"))
    steps = folder.steps()
    return CheckpointReader(folder.path(steps[-1])) if steps else None
