"""What the trainer asks of an engine. Nothing outside this package knows which engine runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from megascale.parallel.fragment import Fragment
from megascale.parallel.tensor_parallel import Placement

if TYPE_CHECKING:
    from megascale.engine.pipeline import Pipeline

MicroBatch = Mapping[str, torch.Tensor]
SumOverShards = Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]


class OptimizerBuilder(Protocol):
    """Makes a torch optimizer from (name, tensor) pairs."""

    def __call__(
        self,
        named: Iterable[tuple[str, torch.Tensor]],
        sum_over_shards: SumOverShards | None = None,
    ) -> torch.optim.Optimizer:
        """Build it.

        Args:
            named: what the optimizer steps on: fp32 masters or their local shards (possibly
                empty), under the model's names, the same names in the same order on every rank.
            sum_over_shards: (values, tensors) -> values summed over the ranks that hold parts
                of these parameters; the last dim of `values` runs over `tensors`. None where
                the tensors are no shards of single parameters.
        """
        ...


@dataclass(frozen=True)
class OptimizerRecipe:
    """How an engine builds its optimizer over whatever tensors it decides to step.

    Attributes:
        build: makes the optimizer.
        state_keys: the optimizer's per-parameter tensor states, as a checkpoint names them.
        counts_steps: whether the optimizer keeps a "step" scalar per parameter.
        grad_clip: global gradient norm to clip to; 0 switches clipping off.
        state_shapes: for optimizers whose states are not all of the parameter's shape: (name,
            shape of the parameter) -> shapes of its states by key.
    """

    build: OptimizerBuilder
    state_keys: tuple[str, ...]
    counts_steps: bool
    grad_clip: float
    state_shapes: Callable[[str, tuple[int, ...]], dict[str, tuple[int, ...]]] | None = None

    def states_of(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shape of each state that the parameter `name` of (local) `shape` has."""
        if self.state_shapes is None:
            return dict.fromkeys(self.state_keys, shape)
        return self.state_shapes(name, shape)


@dataclass(frozen=True)
class StepOutcome:
    """Result of one optimizer step.

    Attributes:
        grad_norm: global L2 norm of the gradient before clipping; inf for a skipped step.
        skipped: the update was not applied (overflow under dynamic loss scaling).
        loss_scale: the scale that was in force (1.0 without loss scaling).
    """

    grad_norm: float
    skipped: bool
    loss_scale: float


class Evaluable(Protocol):
    """What an evaluation needs: an engine, or a model loaded from a checkpoint."""

    module: nn.Module

    def forward(self, micro_batches: Sequence[MicroBatch]) -> list[tuple[torch.Tensor, ...]]:
        """What the module returns for each in eval mode, without gradients.

        For a micro-batch with labels that is (loss sum, number of targets). Call it inside
        `evaluating()`, with several at once where there are: the ranks of a pipeline then work at
        the same time. Collective under ZeRO-3 and over a pipeline: every rank must call it with
        equally many.
        """
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """Context in which the module is in eval mode and records no gradients."""
        ...


class Engine(Evaluable, Protocol):
    """Owns the module's parameters, gradients and optimizer under one ZeRO stage.

    The module's forward is that of `Task`: sums of the loss over its targets, and their numbers.
    """

    placements: Mapping[str, Placement]

    @property
    def pipeline(self) -> Pipeline | None:
        """This rank's part of the pipeline; None without one."""
        ...

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], total_targets: torch.Tensor
    ) -> torch.Tensor:
        """Accumulate the gradient of the sum over objectives of (global loss sum / its targets).

        Args:
            micro_batches: this rank's micro-batches of the step.
            total_targets: (K,) float64, for each objective the number of its targets over all
                ranks and micro-batches, at least 1.

        Returns:
            (K,) fp32, detached: this rank's loss sums.
        """
        ...

    def step(self, lr: float) -> StepOutcome:
        """Clip, update with learning rate `lr`, clear gradients."""
        ...

    def fragments(self, kinds: Sequence[str], *, replicas: bool = False) -> Iterator[Fragment]:
        """Live views of what this rank must save, by kind ("master", "grad", state keys).

        Data that several ranks hold alike is yielded by one of them, or with `replicas` by all.
        "grad" is valid between `forward_backward` and `step` only.
        """
        ...

    def prepare_load(self, updates: int) -> Iterator[Fragment]:
        """Create the optimizer state and yield *every* fragment this rank needs, to be filled.

        Args:
            updates: number of optimizer updates that the loaded state has seen.
        """
        ...

    def finish_load(self) -> None:
        """Make the working weights follow the masters that were just written. Collective."""
        ...

    @property
    def state_kinds(self) -> tuple[str, ...]:
        """The kinds that a checkpoint of this engine holds."""
        ...

    def state_dict(self) -> dict[str, float]:
        """Counters and scaler fields that are the same on every rank (JSON numbers)."""
        ...

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Inverse of `state_dict`; unknown fields of another engine are ignored by rule."""
        ...

    def close(self) -> None:
        """Release hooks and buffers."""
        ...
