"""The seam between a kind of model and the trainer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from torch import nn

from megascale.config.schema import Config
from megascale.data.corpus import TokenCorpus
from megascale.data.loader import EvaluationLoader
from megascale.data.protocol import FiniteSampleSource
from megascale.models.chunk import Chunk
from megascale.parallel.context_parallel import ContextGroup
from megascale.parallel.fragment import Fragment
from megascale.parallel.pipeline import SCHEDULES, StageCosts
from megascale.parallel.tensor_parallel import Placement, TensorGroup
from megascale.training.datasets import Corpora, RunData


def performance_choices(config: Config) -> dict[str, Any]:
    """Fields of a model's config that the section `performance` sets."""
    parallel, recompute = config.parallel, config.performance.recompute_activation
    is_split = SCHEDULES[parallel.pipeline_schedule].splits_backward
    if recompute == "auto" and parallel.pipeline_parallel_size > 1 and is_split:
        recompute = (
            "never"  # gradients of inputs and of weights are computed apart: it would be twice
        )
    return {
        "attention_kernel": config.performance.attention,
        "recompute_activation": recompute,
    }


class Task(Protocol):
    """One kind of pretraining (a model family with its head, loss and samples).

    Its module has `objectives`, a tuple of K names, the tokens' first. Its forward takes a
    micro-batch's tensors as keywords and returns, each of shape (K,) (a scalar will do for K = 1):

        loss sums   over the targets of each objective, nats;
        targets     their numbers: what `data.protocol.label_names` finds in the batch;
        correct     in eval mode, if the task measures it: how many have the largest logit.

    The loss is the sum over the objectives of (loss sum / targets), over the global batch.

    With the keywords `hidden` and `chunk` it runs a part of itself: from what the chunk before
    returned, (B, T, D), to the same for the next one; the last chunk returns the above.
    """

    def build_module(self) -> nn.Module:
        """The whole module with head and loss; may be called under the meta device."""
        ...

    def blocks(self, module: nn.Module) -> Sequence[nn.Module]:
        """The repeated layers: what ZeRO-3 gathers and a pipeline cuts one by one."""
        ...

    def keep_chunks(self, module: nn.Module, chunks: Sequence[Chunk]) -> None:
        """Delete from the whole module what none of `chunks` needs; names do not change."""
        ...

    def tied_weight(self) -> str | None:
        """The parameter that both the first and the last chunk need; None for none."""
        ...

    def stage_costs(self) -> StageCosts:
        """What layers and ends cost, to balance pipeline stages."""
        ...

    def parallelize(self, module: nn.Module, tensor: TensorGroup) -> dict[str, Placement]:
        """Cut the module over a tensor-parallel group; returns where each parameter lies."""
        ...

    def parallelize_context(self, module: nn.Module, context: ContextGroup) -> None:
        """Make the module work on a part of each sample's tokens; after `parallelize`."""
        ...

    def fill_initial(self, fragment: Fragment) -> None:
        """Set a part of a parameter to its initial value, a function of (seed, its name)."""
        ...

    def open_data(self, corpora: Corpora) -> RunData:
        """Samples over the opened corpora: training stream, validation and test sets."""
        ...

    def evaluation_set(
        self, corpora: Corpora, corpus: TokenCorpus, part: tuple[int, int]
    ) -> FiniteSampleSource:
        """Every sample of a part of a corpus once, as validation reads it."""
        ...

    def byte_lengths(self, corpora: Corpora) -> np.ndarray | None:
        """(V,) UTF-8 bytes that each target stands for; None where bits per byte mean nothing."""
        ...

    def baselines(self, corpora: Corpora, held_out: Iterable[EvaluationLoader]) -> dict[str, float]:
        """What a model must beat, from counts over the first corpus's training part."""
        ...

    def flops_per_sample(self) -> float:
        """Model FLOPs of forward and backward for one sample."""
        ...
