"""The seam between a kind of model and the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import nn

from megascale.parallel.tensor_parallel import Placement, TensorGroup
from megascale.training.datasets import Corpora, RunData


class Task(Protocol):
    """One kind of pretraining (a model family with its head, loss and samples).

    Its module's forward takes a micro-batch's tensors as keywords and returns
    (sum of the loss over the targets, number of targets), both scalars.
    """

    def build_module(self) -> nn.Module:
        """The whole module with head and loss; may be called under the meta device."""
        ...

    def blocks(self, module: nn.Module) -> Sequence[nn.Module]:
        """The repeated layers: what ZeRO-3 gathers and a pipeline cuts one by one."""
        ...

    def parallelize(self, module: nn.Module, tensor: TensorGroup) -> dict[str, Placement]:
        """Cut the module over a tensor-parallel group; returns where each parameter lies."""
        ...

    def initialize(self, module: nn.Module, placements: Mapping[str, Placement]) -> None:
        """Give every parameter its initial value, a function of (seed, parameter name)."""
        ...

    def open_data(self, corpora: Corpora) -> RunData:
        """Samples over the opened corpora: training stream, validation and test sets."""
        ...

    def flops_per_sample(self) -> float:
        """Model FLOPs of forward and backward for one sample."""
        ...

    def tokens_per_sample(self) -> int:
        """Tokens that one sample counts in tokens_seen."""
        ...
