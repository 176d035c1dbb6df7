"""A pipeline schedule of torch.distributed.pipelining over the one module that an engine owns.

A rank holds one module with the layers of all its stages. Each stage is a thin view that calls the
module with its chunk: no second definition of the model, and parameters keep their names. Stages
are called with the number of a micro-batch and look its tensors up, so only hidden states travel.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, schedules

from megascale.engine.protocol import MicroBatch
from megascale.models.chunk import Chunk
from megascale.parallel.mesh import ParallelMesh
from megascale.parallel.pipeline import SCHEDULES, Action, PipelineLayout
from megascale.wide import widen


class Pipeline:
    """This rank's part of a pipeline.

    Args:
        module: the engine's (wrapped) module, with this rank's layers only; its forward takes
            `hidden` and `chunk` as described in `Task`.
        layout: which layers are where.
        mesh: who is where.
        dtype: of the hidden states.
    """

    def __init__(
        self, module: nn.Module, layout: PipelineLayout, mesh: ParallelMesh, dtype: torch.dtype
    ) -> None:
        self._module, self._layout, self._mesh, self._dtype = module, layout, mesh, dtype
        self._device = next(module.parameters()).device
        self._rank, self._group = mesh.pp_rank, mesh.pp_group
        self._stages = layout.stages_of(self._rank)
        self._built: dict[tuple[int, ...], Any] = {}
        self._batches: Sequence[MicroBatch] = ()
        self._scale = self._sums = torch.zeros(1)
        self._after_backward: Callable[[], None] | None = None
        self.trace: list[Action] = []

    def run(
        self,
        micro_batches: Sequence[MicroBatch],
        scale: torch.Tensor,
        after_backward: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """Forward and backward of a step's micro-batches. Collective over pp.

        Args:
            micro_batches: the same on every rank of the pipeline.
            scale: (K,) factors of the loss sums in what is differentiated.
            after_backward: called after each backward that added to gradients of weights.

        Returns:
            (K,) fp32: the loss sums, on every rank.
        """
        self._batches, self._scale, self._after_backward = micro_batches, scale, after_backward
        self._sums = torch.zeros_like(scale)
        self.trace = []
        index = torch.arange(len(micro_batches), device=self._device)
        owns_first, owns_last = self._rank == 0, self._rank == self._layout.last_rank
        schedule = self._schedule(len(micro_batches), micro_batches[0]["input_ids"].shape)
        schedule.step(
            *((index,) if owns_first else ()),
            target=index if owns_last else None,
            return_outputs=False,
            index=index,
        )
        self._batches, self._after_backward = (), None
        dist.all_reduce(self._sums, group=self._group)
        return self._sums

    def forward(self, micro_batches: Sequence[MicroBatch]) -> list[tuple[torch.Tensor, ...]]:
        """What the last stage returns for each micro-batch, on every rank. Collective over pp.

        Stage s takes micro-batch m when m + s waves have gone by, so all ranks work once the first
        micro-batches have come to them; any number and any schedule's stages will do. Every rank
        goes through its waves in order and no stage waits for a later wave: no two ranks can wait
        for each other.
        """
        count, layout = len(micro_batches), self._layout
        waves = sorted((m + stage, stage, m) for stage in self._stages for m in range(count))
        hidden: dict[tuple[int, int], torch.Tensor] = {}  # (stage, micro-batch) -> its input
        outputs: list[tuple[torch.Tensor, ...]] = [()] * count
        sends: deque[tuple[dist.Work, torch.Tensor]] = deque()
        for _, stage, index in waves:
            chunk, micro_batch = layout.chunks[stage], micro_batches[index]
            if stage and layout.rank_of(stage - 1) != self._rank:
                received = self._hidden(micro_batch["input_ids"].shape)
                dist.recv(received, group=self._group, group_src=layout.rank_of(stage - 1))
                hidden[stage, index] = received
            result = self._module(
                **micro_batch, hidden=hidden.pop((stage, index), None), chunk=chunk
            )
            if chunk.is_last:
                outputs[index] = result
            elif layout.rank_of(stage + 1) == self._rank:
                hidden[stage + 1, index] = result
            else:
                sends.append(self._send(result.contiguous(), layout.rank_of(stage + 1)))
            while len(sends) > len(layout.chunks):  # what was sent so long ago is wanted by now
                sends.popleft()[0].wait()
        for work, _ in sends:
            work.wait()
        return self._from_last(outputs)

    def _send(self, tensor: torch.Tensor, rank: int) -> tuple[dist.Work, torch.Tensor]:
        """Start to send; the tensor must live until the work is done."""
        work = dist.isend(tensor, group=self._group, group_dst=rank)
        assert work is not None
        return work, tensor

    def is_copy(self, name: str) -> bool:
        """Whether this rank's `name` is the last stage's copy of a tied weight."""
        return name == self._layout.copied_weight and self._rank != 0

    def tied_here(self) -> str | None:
        """The tied weight, where it has copies on two ranks and this one holds one of them."""
        holds = self._rank in (0, self._layout.last_rank)
        return self._layout.copied_weight if holds else None

    def sum_copies(self, gradient: torch.Tensor) -> None:
        """Add the other copy's gradient to this one's, in place; called by both holders."""
        peer = self._layout.last_rank if self._rank == 0 else 0
        mine, other = gradient.contiguous(), torch.empty_like(gradient)
        operations = [
            dist.P2POp(dist.isend, mine, group=self._group, group_peer=peer),
            dist.P2POp(dist.irecv, other, group=self._group, group_peer=peer),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        gradient.add_(other)  # a + b here, b + a there: the same bits

    def compute(self, chunk: Chunk, received: torch.Tensor, index: int) -> torch.Tensor:
        """One stage's forward: hidden states, of the last stage the scaled loss (a scalar)."""
        hidden = None if chunk.is_first else received
        outputs = self._module(**self._batches[index], hidden=hidden, chunk=chunk)
        if not chunk.is_last:
            return outputs.contiguous()  # sent as it is; a sequence-parallel sum is transposed
        sums = outputs[0]
        self._sums += widen(sums.detach())
        return (sums * self._scale).sum()

    def did(self, action: Action) -> None:
        """Note an action of the schedule, and tell who waits for gradients."""
        self.trace.append(action)
        if action.kind in "BW" and self._after_backward is not None:
            self._after_backward()

    def _schedule(self, num_micro_batches: int, shape: torch.Size) -> Any:
        key = (num_micro_batches, *shape)
        if key not in self._built:
            kind = SCHEDULES[self._layout.schedule]
            stages = [self._stage(stage, shape) for stage in self._stages]
            self._built[key] = getattr(schedules, kind.torch_class)(
                stages if kind.stages_per_rank != (1, 1) else stages[0],
                n_microbatches=num_micro_batches,
                loss_fn=_output_is_loss,
                scale_grads=False,  # the loss is scaled by the number of targets
            )
        return self._built[key]

    def _stage(self, stage: int, shape: torch.Size) -> PipelineStage:
        chunk = self._layout.chunks[stage]
        index, loss = torch.zeros(1, dtype=torch.long), torch.zeros((), requires_grad=True)
        hidden = self._hidden(shape, "meta").requires_grad_()
        return _Stage(
            _StageModule(self._module, self, chunk),
            stage,
            len(self._layout.chunks),
            self._device,
            input_args=index if chunk.is_first else hidden,
            output_args=loss if chunk.is_last else hidden,
            group=self._group,
        )

    def _hidden(self, shape: torch.Size, device: str | None = None) -> torch.Tensor:
        """An empty (B, T_local, D) for micro-batches of ids (B, T)."""
        batch, length = shape
        size = (batch, length // self._layout.sequence_shards, self._layout.hidden_size)
        return torch.empty(size, dtype=self._dtype, device=device or self._device)

    def _from_last(self, outputs: list[tuple[torch.Tensor, ...]]) -> list[tuple[torch.Tensor, ...]]:
        """The last stage's outputs, on every rank: one message for each place of the tuples."""
        source = self._layout.last_rank
        kinds: list[Any] = [[[(tuple(o.shape), o.dtype) for o in out] for out in outputs]]
        dist.broadcast_object_list(kinds, group=self._group, group_src=source, device=self._device)
        columns = []
        for place in range(len(kinds[0][0]) if kinds[0] else 0):
            shapes, dtypes = zip(*(kind[place] for kind in kinds[0]), strict=True)
            sizes = [math.prod(shape) for shape in shapes]
            if self._rank == source:
                flat = torch.cat([out[place].reshape(-1) for out in outputs])
            else:
                flat = torch.empty(sum(sizes), dtype=dtypes[0], device=self._device)
            dist.broadcast(flat, group=self._group, group_src=source)
            parts = zip(flat.split(sizes), shapes, strict=True)
            columns.append([part.view(shape) for part, shape in parts])
        return list(zip(*columns, strict=True))


class _StageModule(nn.Module):
    """What torch's stage calls; lists the parameters of the whole local module."""

    def __init__(self, module: nn.Module, pipeline: Pipeline, chunk: Chunk) -> None:
        super().__init__()
        self.module = module
        self._pipeline, self._chunk = pipeline, chunk

    def forward(self, received: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """See `Pipeline.compute`; `index` (1,)."""
        return self._pipeline.compute(self._chunk, received, int(index))


class _Stage(PipelineStage):
    """torch's stage, which tells the pipeline what it did."""

    submod: _StageModule

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """See PipelineStage."""
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        self._did("F", fwd_chunk_id)
        return output

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Any = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        """See PipelineStage."""
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        self._did("B" if full_backward else "I", bwd_chunk_id)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """See PipelineStage."""
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self._did("W", bwd_chunk_id)

    def _did(self, kind: str, micro_batch: int) -> None:
        self.submod._pipeline.did(Action(kind, self.stage_index, micro_batch))


def _output_is_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    del target  # the last stage looks its labels up with the other tensors of the micro-batch
    return output
