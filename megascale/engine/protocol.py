"""What the trainer asks of an engine. Nothing outside this package knows which engine runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from megascale.parallel.fragment import Fragment
from megascale.parallel.tensor_parallel import Placement

MicroBatch = Mapping[str, torch.Tensor]
OptimizerBuilder = Callable[[Iterable[tuple[str, torch.Tensor]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class OptimizerRecipe:
    """How an engine builds its optimizer over whatever tensors it decides to step.

    Attributes:
        build: makes a torch optimizer from (name, tensor) pairs; the tensors may be fp32 masters
            or local shards, their names are the model's.
        state_keys: the optimizer's per-parameter tensor states, as a checkpoint names them.
        counts_steps: whether the optimizer keeps a "step" scalar per parameter.
        grad_clip: global gradient norm to clip to; 0 switches clipping off.
    """

    build: OptimizerBuilder
    state_keys: tuple[str, ...]
    counts_steps: bool
    grad_clip: float


@dataclass(frozen=True)
class StepOutcome:
    """Result of one optimizer step.

    Attributes:
        grad_norm: global L2 norm of the gradient before clipping.
        skipped: the update was not applied (overflow under dynamic loss scaling).
        loss_scale: the scale that was in force (1.0 without loss scaling).
    """

    grad_norm: float
    skipped: bool
    loss_scale: float


class Evaluable(Protocol):
    """What an evaluation needs: an engine, or a model loaded from a checkpoint."""

    module: nn.Module

    def forward(self, micro_batch: MicroBatch) -> tuple[torch.Tensor, ...]:
        """What the module returns in eval mode, without gradients; call inside `evaluating()`.

        Collective under ZeRO-3: every rank must call it equally often.
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
