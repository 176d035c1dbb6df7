"""One optimizer step, the whole of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megascale.data.ledger import Ledger
from megascale.data.loader import BatchLoader
from megascale.data.protocol import IGNORE_LABEL, label_names
from megascale.engine.protocol import Engine
from megascale.errors import NumericalError, PeerError, UserError
from megascale.optim.schedule import LearningRateSchedule
from megascale.parallel.context_parallel import own_tokens
from megascale.parallel.mesh import ParallelMesh
from megascale.training.state import StepResult, TrainState


@dataclass(frozen=True)
class StepParts:
    """What a step works with; fixed for the run."""

    engine: Engine
    loader: BatchLoader
    schedule: LearningRateSchedule
    mesh: ParallelMesh
    device: torch.device
    ledger: Ledger


def _go_on() -> None:
    """The usual `before_update`: nothing waits."""


def train_step(
    parts: StepParts, state: TrainState, before_update: Callable[[], None] = _go_on
) -> StepResult:
    """Run one step and advance `state`. Collective.

    The gradient is that of the mean over all targets of the global batch (with several objectives:
    of the sum of their means), so it does not depend on how the batch is cut into ranks and
    micro-batches, nor on how masks fall.

    Args:
        before_update: called when gradients are there and no weight has changed yet.

    Raises:
        UserError: the loss is not finite (before any weight is changed).
    """
    started = time.perf_counter()
    batch_size = parts.loader.batch_size.at(state.samples_seen)
    micro_batches = [
        prepare(batch, parts.mesh, parts.device) for batch in parts.loader.load(state.samples_seen)
    ]
    targets = parts.mesh.sum_over_data(_count_targets(micro_batches)).clamp(min=1.0)

    loss_sums = parts.engine.forward_backward(micro_batches, targets)
    loss = (parts.mesh.sum_over_data(loss_sums.double()) / targets).sum().item()
    if not math.isfinite(loss):
        raise _diverged(state.step + 1, loss, own=not loss_sums.isfinite().all())
    lr = parts.schedule.lr_at(state.step)
    before_update()
    outcome = parts.engine.step(lr)

    state.step += 1
    state.updates += not outcome.skipped
    state.samples_seen += batch_size
    sources = parts.ledger.at(state.samples_seen)
    tokens_before, state.tokens_seen = state.tokens_seen, sum(s.tokens for s in sources.values())
    elapsed = time.perf_counter() - started
    return StepResult(
        step=state.step,
        loss=loss,
        lr=lr,
        grad_norm=outcome.grad_norm,
        global_batch_size=batch_size,
        samples_seen=state.samples_seen,
        tokens_seen=state.tokens_seen,
        step_time_s=elapsed,
        tokens_per_second=(state.tokens_seen - tokens_before) / elapsed,
        loss_scale=outcome.loss_scale,
        skipped=outcome.skipped,
        sources=sources,
    )


def prepare(
    batch: Mapping[str, torch.Tensor], mesh: ParallelMesh, device: torch.device
) -> dict[str, torch.Tensor]:
    """This rank's tokens of a micro-batch, on its device."""
    own = own_tokens(batch, mesh.cp_rank, mesh.cp_size)
    return {name: tensor.to(device, non_blocking=True) for name, tensor in own.items()}


def _count_targets(micro_batches: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """(K,) float64: the targets of each objective in this rank's micro-batches."""
    names = label_names(micro_batches[0])
    counts = [
        torch.stack([(batch[name] != IGNORE_LABEL).sum() for name in names])
        for batch in micro_batches
    ]
    return torch.stack(counts).sum(dim=0).double()


def _diverged(step: int, loss: float, own: bool) -> UserError:
    kind, whose = (NumericalError, "this rank's") if own else (PeerError, "another rank's")
    return kind(
        f"the loss of step {step} is {loss}, from {whose} samples",
        rule="the loss must be finite; the weights were not changed by this step",
        remedy="resume from the last checkpoint with a lower optimizer.lr or a longer "
        "schedule.warmup_steps, or use precision.dtype=fp32",
    )
