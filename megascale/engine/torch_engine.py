"""torch's own engines: replicated (one process, data parallel) and sharded (FSDP2, ZeRO 1-3).

The replicated engine on one process is the reference of every parity test, so it is written to
be read: fp32 masters, fp32 main gradients, one optimizer, nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megascale.engine.fsdp_reduction import accumulate, reduce_now
from megascale.engine.loss_scaler import LossScaler, LossScaling
from megascale.engine.one_pass import OnePassAdamW
from megascale.engine.pipeline import Pipeline
from megascale.engine.protocol import MicroBatch, OptimizerRecipe, StepOutcome
from megascale.kernels.library import LIBRARY
from megascale.models.embedding import TokenEmbedding
from megascale.models.gradient_sink import attach_sink, detach_sink
from megascale.models.linear import Linear
from megascale.parallel.fragment import Fragment, whole_box
from megascale.parallel.gradient_norm import clip_, clip_factor, global_norm
from megascale.parallel.gradient_reducer import GradientReducer, ReducerSink
from megascale.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megascale.parallel.mesh import ParallelMesh
from megascale.parallel.pipeline import PipelineLayout
from megascale.parallel.tensor_parallel import Placement
from megascale.wide import wide_dtype, widen


class TorchEngine:
    """What both torch engines share: masters by name, the step, state in and out.

    Subclasses take the module from the meta device to the run's, fill `_masters` (the fp32 tensors
    that the optimizer steps on) and say where a master lies in its parameter.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        recipe: OptimizerRecipe,
        mesh: ParallelMesh,
        placements: Mapping[str, Placement],
        scaling: LossScaling,
    ) -> None:
        self.module = module
        self.placements = placements
        self._recipe = recipe
        self._mesh = mesh
        self._scaler = LossScaler(scaling)
        self._device = device
        self._sum_dtype = next(module.parameters()).dtype
        self._pipeline: Pipeline | None = None
        self._masters: dict[str, torch.Tensor] = {}
        self._optimizer: torch.optim.Optimizer

    def _build_optimizer(self) -> None:
        self._optimizer = self._recipe.build(list(self._masters.items()), self._sum_over_shards)

    def _unscale(self) -> None:
        """Divide the finished fp32 gradients by the loss scale."""
        if self._scaler.scale != 1.0:
            torch._foreach_mul_(list(self._gradients().values()), 1.0 / self._scaler.scale)

    def step(self, lr: float) -> StepOutcome:
        """See `Engine.step`. A non-finite gradient is never applied: the step is skipped.

        The norm is summed over all ranks, so that they find an overflow anywhere alike.
        """
        gradients = self._gradients()
        counted = [grad for name, grad in gradients.items() if self._is_counted(name)]
        norm = global_norm(counted, self._device, self._norm_groups())
        scale = self._scaler.scale
        finite = math.isfinite(norm)
        if finite:
            for group in self._optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            self._update(gradients, norm)
        self._clear_gradients()
        self._scaler.update(overflow=not finite)
        return StepOutcome(norm if finite else math.inf, skipped=not finite, loss_scale=scale)

    def _update(self, gradients: Mapping[str, torch.Tensor], norm: float) -> None:
        clip_(list(gradients.values()), norm, self._recipe.grad_clip)
        for name, master in self._masters.items():
            master.grad = gradients[name]
        self._optimizer.step()
        self._after_update()

    def forward(self, micro_batches: Sequence[MicroBatch]) -> list[tuple[torch.Tensor, ...]]:
        """See `Engine.forward`."""
        if self._pipeline is not None:
            return self._pipeline.forward(micro_batches)
        return [self.module(**micro_batch) for micro_batch in micro_batches]

    @property
    def pipeline(self) -> Pipeline | None:
        """This rank's part of the pipeline; None without one."""
        return self._pipeline

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """See `Engine.evaluating`."""
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train()

    @property
    def state_kinds(self) -> tuple[str, ...]:
        """See `Engine.state_kinds`."""
        return ("master", *self._recipe.state_keys)

    def prepare_load(self, updates: int) -> Iterator[Fragment]:
        """See `Engine.prepare_load`."""
        for name, master in self._masters.items():
            state = self._optimizer.state[master]
            if self._recipe.counts_steps:
                state["step"] = torch.tensor(float(updates))
            for key, shape in self._recipe.states_of(name, tuple(master.shape)).items():
                state[key] = master.new_zeros(shape)
        return self._all_fragments(self.state_kinds)

    def finish_load(self) -> None:
        """See `Engine.finish_load`."""
        self._after_update()

    def state_dict(self) -> dict[str, float]:
        """See `Engine.state_dict`: the loss scaler's state."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """See `Engine.load_state_dict`."""
        self._scaler.load_state_dict(state)

    def fragments(self, kinds: Sequence[str], *, replicas: bool = False) -> Iterator[Fragment]:
        """See `Engine.fragments`."""
        for fragment in self._all_fragments(kinds):
            if replicas or (self._is_owner() and self._is_counted(fragment.name)):
                yield fragment

    def _is_counted(self, name: str) -> bool:
        """Whether this rank speaks for a parameter: copies over tp and pp are counted once."""
        if self._pipeline is not None and self._pipeline.is_copy(name):
            return False
        return self._is_counted_over_tp(name)

    def _is_counted_over_tp(self, name: str) -> bool:
        return self.placements[name].counts_on(self._mesh.tp_rank)

    def _sum_copies(self) -> None:
        """Sum the gradients of a tied weight that two pipeline stages hold."""
        tied = self._pipeline.tied_here() if self._pipeline is not None else None
        if self._pipeline is not None and tied is not None:
            self._pipeline.sum_copies(self._gradients()[tied])

    def _all_fragments(self, kinds: Sequence[str]) -> Iterator[Fragment]:
        gradients = self._gradients() if "grad" in kinds else {}
        for name, master in self._masters.items():
            placement, start = self.placements[name], self._start(name)
            if not master.numel():
                continue  # this rank holds nothing of the parameter
            for kind in kinds:
                box = placement.box
                if kind == "master":
                    tensor = master
                elif kind == "grad":
                    tensor = gradients[name]
                elif kind in self._optimizer.state[master]:
                    tensor = self._optimizer.state[master][kind]
                    if tensor.shape != master.shape:  # a factored state, of whole tensors only
                        box = whole_box(tuple(tensor.shape))
                else:
                    # before the first update the optimizer has no state, later some parameters
                    # have not this one (Adafactor's vectors, Muon's embeddings)
                    continue
                flat = tensor.detach().view(-1)
                yield Fragment(name, kind, placement.global_shape, box, start, flat)

    def _gradients(self) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def _shard_groups(self) -> list[dist.ProcessGroup]:
        """The axes over which parts of one parameter lie."""
        return [self._mesh.tp_group] if self._mesh.tp_size > 1 else []

    def _norm_groups(self) -> list[dist.ProcessGroup]:
        """The axes over which parts of the gradient lie."""
        return self._shard_groups() + ([self._mesh.pp_group] if self._mesh.pp_size > 1 else [])

    def _sum_over_shards(
        self, values: torch.Tensor, tensors: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Sum values (..., one for each of `tensors`) over the ranks that hold parts of them."""
        names = {id(master): name for name, master in self._masters.items()}
        counted = [self._is_counted_over_tp(names[id(tensor)]) for tensor in tensors]
        total = values * torch.tensor(counted, device=values.device)
        for group in self._shard_groups():
            dist.all_reduce(total, group=group)
        return total

    def _after_update(self) -> None:
        raise NotImplementedError

    def _clear_gradients(self) -> None:
        raise NotImplementedError

    def _start(self, name: str) -> int:
        """Where the master begins in the flattened (tensor-parallel local) parameter."""
        raise NotImplementedError

    def _is_owner(self) -> bool:
        raise NotImplementedError


class ReplicatedEngine(TorchEngine):
    """Every rank holds everything (ZeRO stage 0); gradients are summed in fp32.

    fp32: the parameters are the masters. bf16, fp16: the module holds weights of that type, the
    optimizer steps on fp32 masters, and the weights are rounded from them after each update.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        recipe: OptimizerRecipe,
        mesh: ParallelMesh,
        placements: Mapping[str, Placement],
        dtype: torch.dtype,
        scaling: LossScaling,
        layout: PipelineLayout | None = None,
    ) -> None:
        super().__init__(module, device, recipe, mesh, placements, scaling)
        module.to_empty(device=device)
        self._params = dict(module.named_parameters())
        if dtype == wide_dtype(dtype):
            masters = {name: p.detach() for name, p in self._params.items()}
        else:
            masters = {name: widen(p.detach()) for name, p in self._params.items()}
            for param in self._params.values():
                param.data = param.data.to(dtype)
        self._masters = {name: master.requires_grad_() for name, master in masters.items()}
        group = mesh.data_group if mesh.data_size > 1 else None
        self._reducer = GradientReducer(list(self._params.values()), group)
        if layout is not None:
            self._pipeline = Pipeline(module, layout, mesh, dtype)
        else:  # whose forwards and backwards of micro-batches do not interleave
            self._attach_sinks()
        self._build_optimizer()
        weights = {self._masters[name]: param for name, param in self._params.items()}
        self._one_pass = OnePassAdamW.of(self._optimizer, weights)

    def _attach_sinks(self) -> None:
        fast = all(LIBRARY.multiplies(param) for param in self._params.values())
        for part in self.module.modules():
            names: tuple[str, ...] = ()
            if isinstance(part, (TokenEmbedding, VocabParallelEmbedding)):
                names = ("weight",)
            elif fast and isinstance(part, Linear):
                names = ("weight", "bias")
            elif fast and isinstance(part, (ColumnParallelLinear, RowParallelLinear)):
                names = ("weight",)  # the bias is added outside of the product
            own = dict(part.named_parameters(recurse=False))
            for param in (own[name] for name in names if name in own):
                attach_sink(param, ReducerSink(self._reducer, param))

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], total_targets: torch.Tensor
    ) -> torch.Tensor:
        """See `Engine.forward_backward`."""
        divisors = total_targets.to(self._device, self._sum_dtype)
        if self._pipeline is not None:
            scale = self._scaler.scale / divisors
            total = self._pipeline.run(micro_batches, scale, self._reducer.collect)
            self._sum_copies()
            self._reducer.reduce()
            self._unscale()
            return total
        total = torch.zeros_like(divisors)
        for index, micro_batch in enumerate(micro_batches):
            self._reducer.begin_backward(last=index == len(micro_batches) - 1)
            loss_sum, _ = self.module(**micro_batch)
            (loss_sum * (self._scaler.scale / divisors)).sum().backward()
            total += loss_sum.detach()
        self._reducer.finish()
        self._unscale()
        return total

    def close(self) -> None:
        """See `Engine.close`."""
        for param in self._params.values():
            detach_sink(param)
        self._reducer.close()

    def _gradients(self) -> dict[str, torch.Tensor]:
        return {name: self._reducer.main_gradient(p) for name, p in self._params.items()}

    def _update(self, gradients: Mapping[str, torch.Tensor], norm: float) -> None:
        if self._one_pass is None:
            super()._update(gradients, norm)
            return
        of_masters = {self._masters[name]: gradient for name, gradient in gradients.items()}
        self._one_pass.step(of_masters, clip_factor(norm, self._recipe.grad_clip))

    def _after_update(self) -> None:
        with torch.no_grad():
            for name, param in self._params.items():
                if param.data_ptr() != self._masters[name].data_ptr():
                    param.copy_(self._masters[name])

    def _clear_gradients(self) -> None:
        for master in self._masters.values():
            master.grad = None
        self._reducer.zero()

    def _start(self, name: str) -> int:
        return 0

    def _is_owner(self) -> bool:
        return self._mesh.data_rank == 0


class ShardedEngine(TorchEngine):
    """ZeRO 1-3 through FSDP2 (`fully_shard`): parameters, gradients, states cut along dim 0.

    In FSDP2's terms (arXiv:1910.02054, arXiv:2304.11277):
        stage 1: weights stay gathered within a step, gradients reduced at the last micro-batch;
        stage 2: weights stay gathered within a step, gradients reduce-scattered at each;
        stage 3: weights also freed after each layer's forward.
    The optimizer steps on the local fp32 shards as plain tensors, not DTensors: the same
    arithmetic without a dispatch for each operation.

    Args:
        blocks: the submodules to shard one by one; the root takes what is left.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        recipe: OptimizerRecipe,
        mesh: ParallelMesh,
        placements: Mapping[str, Placement],
        dtype: torch.dtype,
        scaling: LossScaling,
        stage: int,
        blocks: Iterable[nn.Module],
        layout: PipelineLayout | None = None,
    ) -> None:
        super().__init__(module, device, recipe, mesh, placements, scaling)
        self._stage = stage
        data_mesh = mesh.data_mesh
        policy = MixedPrecisionPolicy(
            param_dtype=None if dtype == wide_dtype(dtype) else dtype,
            reduce_dtype=wide_dtype(dtype),
            cast_forward_inputs=False,
        )
        for block in blocks:
            fully_shard(block, mesh=data_mesh, mp_policy=policy, reshard_after_forward=stage == 3)
        fully_shard(module, mesh=data_mesh, mp_policy=policy, reshard_after_forward=stage == 3)
        module.to_empty(device=device)  # only this rank's shards
        self._params: dict[str, DTensor] = dict(module.named_parameters())  # type: ignore[arg-type]
        # Empty shards too: every rank's optimizer lists the same parameters in the same order.
        shards = {name: p.to_local().detach() for name, p in self._params.items()}
        self._masters = {name: shard.requires_grad_() for name, shard in shards.items()}
        if layout is not None:
            self._pipeline = Pipeline(module, layout, mesh, dtype)
        self._build_optimizer()

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], total_targets: torch.Tensor
    ) -> torch.Tensor:
        """See `Engine.forward_backward`."""
        module = self.module
        assert isinstance(module, FSDPModule)
        # FSDP2 averages over the group; the loss is normalised by the global target count.
        divisors = total_targets.to(self._device, self._sum_dtype)
        scale = self._scaler.scale * self._mesh.data_size / divisors
        if self._pipeline is not None:
            total = self._run_pipeline(self._pipeline, micro_batches, scale)
            self._sum_copies()
            self._unscale()
            return total
        total = torch.zeros_like(scale)
        for index, micro_batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            if self._stage < 3:
                module.set_reshard_after_backward(last)
            if self._stage == 1:
                module.set_requires_gradient_sync(last)
            loss_sum, _ = module(**micro_batch)
            (loss_sum * scale).sum().backward()
            total += loss_sum.detach()
        self._unscale()
        return total

    def _run_pipeline(
        self, pipeline: Pipeline, micro_batches: Sequence[MicroBatch], scale: torch.Tensor
    ) -> torch.Tensor:
        """Run the schedule; which backward is a parameter's last is known to the schedule only.

        Stages 2 and 3 reduce after every backward, as without a pipeline. Stage 1 adds up whole
        gradients (in fp32) and reduces at the end. The weight half of a split backward runs
        outside of the hooks that FSDP2 reduces from, so those schedules have stage 1 only.
        """
        module = self.module
        assert isinstance(module, FSDPModule)
        if self._stage > 1:
            return pipeline.run(micro_batches, scale)
        module.set_requires_gradient_sync(False)
        module.set_reshard_after_backward(False)
        module.set_is_last_backward(False)
        total = pipeline.run(micro_batches, scale, partial(accumulate, module))
        module.set_is_last_backward(True)
        module.set_reshard_after_backward(True)
        module.set_requires_gradient_sync(True)
        reduce_now(module)
        return total

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """See `Engine.evaluating`."""
        with super().evaluating():
            yield
        self._reshard()

    def close(self) -> None:
        """See `Engine.close`."""

    def _reshard(self) -> None:
        # A forward without a backward leaves weights gathered: the next step would use stale ones.
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _gradients(self) -> dict[str, torch.Tensor]:
        gradients = {}
        for name, master in self._masters.items():
            grad = self._params[name].grad
            gradients[name] = (
                torch.zeros_like(master) if grad is None else grad.to_local()  # type: ignore[attr-defined]
            )
        return gradients

    def _shard_groups(self) -> list[dist.ProcessGroup]:
        over_data = [self._mesh.data_group] if self._mesh.data_size > 1 else []
        return over_data + super()._shard_groups()

    def _after_update(self) -> None:
        self._reshard()

    def _clear_gradients(self) -> None:
        for param in self._params.values():
            param.grad = None
        for master in self._masters.values():
            master.grad = None

    def _start(self, name: str) -> int:
        shape = self._params[name].shape
        rows = -(-shape[0] // self._mesh.data_size)  # torch.chunk: every rank but the last the same
        return self._mesh.data_rank * rows * (self._params[name].numel() // shape[0])

    def _is_owner(self) -> bool:
        return True
