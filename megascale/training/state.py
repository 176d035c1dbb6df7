"""What a run knows about itself: its position, and what one step and one validation gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megascale.data.ledger import SourceCount


@dataclass
class TrainState:
    """Position of a run; everything else (data, lr, dropout) is a function of it.

    Attributes:
        step: optimizer steps done, skipped ones included.
        updates: steps that changed the weights.
        samples_seen: samples consumed over all ranks: the position in the data.
        tokens_seen: tokens consumed over all ranks; the padding of packed documents is none.
    """

    step: int = 0
    updates: int = 0
    samples_seen: int = 0
    tokens_seen: int = 0

    def state_dict(self) -> dict[str, int]:
        """JSON values for the checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """Inverse of `state_dict`."""
        return cls(**{key: int(value) for key, value in values.items()})


@dataclass(frozen=True)
class StepResult:
    """One line of metrics.jsonl: what one optimizer step gave, over all ranks.

    Attributes:
        loss: mean over the targets of the global batch, nats; what is minimised, so with label
            smoothing and z-loss where the run has them.
        grad_norm: global L2 norm before clipping; inf for a skipped step.
        global_batch_size: samples of this step.
        loss_scale: the factor of the loss in this step. skipped: its gradient overflowed, so the
            weights were not changed; data and learning rate move on.
        step_time_s: wall-clock time of the step, seconds.
        checkpoint_s: seconds that training stood still for a checkpoint, in this step or at the end
            of the one before.
        mfu: model FLOPs per second over the measured or published peak, 0..1; None if unknown.
        sources: what was read of each dataset up to this step.
        memory_bytes: resident set of this process on CPU, peak allocated on GPU.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    global_batch_size: int
    samples_seen: int
    tokens_seen: int
    step_time_s: float
    tokens_per_second: float
    loss_scale: float
    skipped: bool
    mfu: float | None = None
    memory_bytes: int | None = None
    checkpoint_s: float = 0.0
    sources: Mapping[str, SourceCount] = field(default_factory=dict)
