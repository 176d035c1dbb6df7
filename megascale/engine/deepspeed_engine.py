"""DeepSpeed's engine behind our protocol: ZeRO 1, 2, 3. The only file that imports deepspeed.

Settings and state access follow what was measured (docs/design.md, "DeepSpeed"): client torch
optimizer, DeepSpeed's own accumulation count, state read as fragments of its flat partitions.
Stage 0 never runs here (silently wrong in half precision).
"""

from __future__ import annotations

import importlib
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.utils import groups, safe_get_local_grad
from deepspeed.utils import logger as deepspeed_logger
from torch import nn

from megascale.engine.buckets import reduce_bucket
from megascale.engine.loss_scaler import LossScaler, LossScaling
from megascale.engine.mpu import Mpu
from megascale.engine.pipeline import Pipeline
from megascale.engine.protocol import MicroBatch, OptimizerRecipe, StepOutcome
from megascale.errors import UserError
from megascale.parallel.fragment import Fragment
from megascale.parallel.mesh import ParallelMesh
from megascale.parallel.pipeline import PipelineLayout
from megascale.parallel.tensor_parallel import Placement

_COUNTERS = ("global_steps", "micro_steps", "skipped_steps")


def _configuration(
    module: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    stage: int,
    micro_batch_size: int,
    num_micro_batches: int,
    data_size: int,
    grad_clip: float,
    hidden_size: int,
    scaling: LossScaling,
    offload: Offload,
    pipelined: bool,
) -> dict[str, Any]:
    """DeepSpeed's own configuration for one of our layouts."""
    on_cpu = {"device": "cpu", "pin_memory": device.type == "cuda"}
    bucket = reduce_bucket(sum(p.numel() for p in module.parameters()))
    return {
        "train_batch_size": micro_batch_size * num_micro_batches * data_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": grad_clip,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        # its own CPU Adam is compiled at first use; torch's fused one needs no compiler
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        # Static for DeepSpeed, moved by our LossScaler: in the step in which DeepSpeed doubles a
        # dynamic scale, it divides the gradients by the doubled one (0.19.8).
        "fp16": {"enabled": dtype == torch.float16, "loss_scale": scaling.initial_scale},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            # the values that transformers' integration derives for "auto"
            "stage3_param_persistence_threshold": 10 * hidden_size,
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
            **({"offload_optimizer": on_cpu} if offload.optimizer else {}),
            **({"offload_param": on_cpu} if offload.parameters else {}),
            # under a pipeline the gradients stay with the parameters until the step
            **({"contiguous_gradients": False} if pipelined else {}),
        },
        # the schedule accumulates: told the real number, DeepSpeed is silently off by 2e-4
        **({"managed_gradient_accumulation": False} if pipelined else {}),
    }


@dataclass(frozen=True)
class Offload:
    """What lives in the memory of the host and not of the device."""

    optimizer: bool = False
    parameters: bool = False


class DeepSpeedEngine:
    """ZeRO 1-3 by DeepSpeed (arXiv:1910.02054)."""

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        recipe: OptimizerRecipe,
        mesh: ParallelMesh,
        placements: Mapping[str, Placement],
        *,
        dtype: torch.dtype,
        stage: int,
        micro_batch_size: int,
        num_micro_batches: int,
        hidden_size: int,
        scaling: LossScaling,
        offload: Offload,
        layout: PipelineLayout | None = None,
    ) -> None:
        if layout is not None:
            num_micro_batches = 1  # the schedule's business
        self._recipe = recipe
        self._scaler = LossScaler(scaling)
        self._mesh = mesh
        self._stage = stage
        self._micro_batch_size = micro_batch_size
        self._num_micro_batches = num_micro_batches
        self.placements = placements
        self._layout = layout
        self._device = device
        _silence()
        # Compiled at first use even for gloo; a killed build leaves a lock that hangs all later
        # runs without a word. torch's gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        _import_its_muon()
        configuration = _configuration(
            module,
            device,
            dtype,
            stage,
            micro_batch_size,
            num_micro_batches,
            mesh.data_size,
            recipe.grad_clip,
            hidden_size,
            scaling,
            offload,
            layout is not None,
        )
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        mpu = Mpu(mesh) if mesh.tp_size > 1 or layout is not None else None
        if stage == 3 and mesh.data_size > 1:
            deepspeed.zero.Init(  # divides the parameters one by one
                module=_OneByOne(module.to(dtype), device),
                data_parallel_group=mesh.data_group,
                config_dict_or_path=configuration,
                mpu=mpu,
                dtype=dtype,
            )
        else:
            list(_OneByOne(module.to(dtype), device).parameters())
        _mark(module, placements, mesh, layout)
        optimizer = _build_optimizer(recipe, module, shapes)
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            mpu=mpu,
            config=configuration,
        )
        self._zero = self._engine.optimizer
        self.module: nn.Module = self._engine.module
        self._params = dict(self.module.named_parameters())
        self.pipeline: Pipeline | None = None
        self._sums: dict[str, torch.Tensor] = {}
        if layout is not None:
            _require_equal_groups(len(self._zero.param_groups), mesh)
            self.pipeline = Pipeline(self.module, layout, mesh, dtype)
            self._engine.enable_backward_allreduce = False  # _run_pipeline reduces

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], total_targets: torch.Tensor
    ) -> torch.Tensor:
        """See `Engine.forward_backward`."""
        if self.pipeline is not None:
            return self._run_pipeline(self.pipeline, micro_batches, total_targets)
        if len(micro_batches) != self._num_micro_batches:
            self._set_accumulation(len(micro_batches))
        # DeepSpeed averages gradients over the data-parallel group.
        scale = (self._mesh.data_size / total_targets).to(self._device, torch.float32)
        total = torch.zeros_like(scale)
        for index, micro_batch in enumerate(micro_batches):
            loss_sum, _ = self._engine(**micro_batch)
            self._engine.backward((loss_sum * scale).sum(), scale_wrt_gas=False)
            total += loss_sum.detach().float()
            if index < len(micro_batches) - 1:
                self._engine.step()  # counts the micro-step; updates nothing before the boundary
        return total

    def _run_pipeline(
        self, pipeline: Pipeline, micro_batches: Sequence[MicroBatch], total_targets: torch.Tensor
    ) -> torch.Tensor:
        scale = (self._scaler.scale * self._mesh.data_size / total_targets).to(
            self._device, torch.float32
        )
        half = next(iter(self._params.values())).dtype != torch.float32
        total = pipeline.run(micro_batches, scale, self._collect if half else None)
        for name, gradient in self._sums.items():  # rounded once, not at every micro-batch
            self._params[name].grad = gradient.to(self._params[name].dtype)
        self._sums = {}
        tied = pipeline.tied_here()
        if tied is not None:
            gradient = self._params[tied].grad
            assert gradient is not None
            pipeline.sum_copies(gradient)
        # step() would do this; here, so that the gradients can be looked at before it
        self._zero.set_gradient_accumulation_boundary(True)
        self._zero.reduce_gradients()
        return total

    def _collect(self) -> None:
        """Move what a backward left in `.grad` to the step's fp32 sums."""
        for name, param in self._params.items():
            if param.grad is not None:
                if name in self._sums:
                    self._sums[name].add_(param.grad)
                else:
                    self._sums[name] = param.grad.float()
                param.grad = None

    def step(self, lr: float) -> StepOutcome:
        """See `Engine.step`."""
        for group in self._zero.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        skipped_before = self._engine.skipped_steps
        scale = self._scaler.scale
        self._engine.step()
        skipped = self._engine.skipped_steps > skipped_before
        norm = math.inf if skipped else float(self._engine.get_global_grad_norm())
        self._scaler.update(overflow=skipped)
        self._push_scale()
        return StepOutcome(norm, skipped=skipped, loss_scale=scale)

    def forward(self, micro_batches: Sequence[MicroBatch]) -> list[tuple[torch.Tensor, ...]]:
        """See `Engine.forward`."""
        if self.pipeline is not None:
            return self.pipeline.forward(micro_batches)
        return [self._engine(**micro_batch) for micro_batch in micro_batches]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """See `Engine.evaluating`."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    @property
    def state_kinds(self) -> tuple[str, ...]:
        """See `Engine.state_kinds`."""
        return ("master", *self._recipe.state_keys)

    def fragments(self, kinds: Sequence[str], *, replicas: bool = False) -> Iterator[Fragment]:
        """See `Engine.fragments`."""
        for name, param in self._params.items():
            place = self.placements[name]
            is_copy = self.pipeline is not None and self.pipeline.is_copy(name)
            if not (replicas or (place.counts_on(self._mesh.tp_rank) and not is_copy)):
                continue
            for kind in kinds:
                found = self._fragment(param, kind)
                if found is not None:
                    start, tensor = found
                    yield Fragment(
                        name, kind, place.global_shape, place.box, start, tensor.view(-1)
                    )

    def prepare_load(self, updates: int) -> Iterator[Fragment]:
        """See `Engine.prepare_load`."""
        for flat in self._flat_masters():
            state = self._inner.state[flat]
            if self._recipe.counts_steps:
                state["step"] = torch.tensor(float(updates))
            for key in self._recipe.state_keys:  # elementwise optimizers only: flat like flat
                state[key] = torch.zeros_like(flat)
        return self.fragments(self.state_kinds, replicas=True)

    def finish_load(self) -> None:
        """See `Engine.finish_load`."""
        zero = self._zero
        if self._stage < 3:
            for parts, flat, group in zip(
                zero.parallel_partitioned_bit16_groups,
                self._flat_masters(),
                zero.real_dp_process_group,
                strict=True,
            ):
                parts[torch.distributed.get_rank(group)].data.copy_(flat.data)
            all_gather_dp_groups(
                zero.bit16_groups_flat,
                zero.parallel_partitioned_bit16_groups,
                zero.real_dp_process_group,
                zero.nccl_start_alignment_factor,
                zero.allgather_bucket_size,
            )
            return
        # Small parameters stay gathered; without a new partition their old values would be used.
        persistent = zero.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
        for index in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if persistent:
            persistent[0].all_gather(persistent)

    def state_dict(self) -> dict[str, float]:
        """See `Engine.state_dict`: DeepSpeed's step counters and the loss scaler's state."""
        counters = {f"deepspeed.{key}": getattr(self._engine, key) for key in _COUNTERS}
        return {**counters, **self._scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """See `Engine.load_state_dict`: a state of another engine has no DeepSpeed counters."""
        for key in _COUNTERS:
            if f"deepspeed.{key}" in state:
                setattr(self._engine, key, int(state[f"deepspeed.{key}"]))
        self._align_micro_steps()
        self._scaler.load_state_dict(state)
        self._push_scale()

    def close(self) -> None:
        """See `Engine.close`."""
        self._engine.destroy()
        groups.mpu = None  # left behind by destroy(): a next engine of this process would ask it

    def _set_accumulation(self, num_micro_batches: int) -> None:
        """Another number of micro-batches from this step on (a ramp of the batch size)."""
        self._num_micro_batches = num_micro_batches
        self._engine.set_train_batch_size(
            self._micro_batch_size * num_micro_batches * self._mesh.data_size
        )
        self._zero.gradient_accumulation_steps = num_micro_batches
        self._align_micro_steps()

    def _align_micro_steps(self) -> None:
        # DeepSpeed derives the accumulation boundary from micro_steps. A step begins on one,
        # whatever accumulation count came before it.
        self._engine.micro_steps -= self._engine.micro_steps % self._num_micro_batches

    def _push_scale(self) -> None:
        self._zero.loss_scaler.cur_scale = self._scaler.scale

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """The torch optimizer that steps on DeepSpeed's flat fp32 partitions."""
        return self._zero.optimizer

    def _flat_masters(self) -> list[torch.Tensor]:
        if self._stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        return self._zero.single_partition_of_fp32_groups

    def _fragment(self, param: Any, kind: str) -> tuple[int, torch.Tensor] | None:
        """(start in the flattened parameter, live 1-D view) of this rank's part, or None."""
        if self._stage == 3:
            return self._fragment_stage3(param, kind)
        mapping = param._hp_mapping
        if mapping is None:
            return None
        start = mapping.lp_fragment_address.start
        if kind == "grad":
            grad = mapping.get_lp_grad_fragment(param._index_in_param_group)
            return start, grad.detach().float().view(-1)
        flat = self._flat_masters()[mapping.param_group_index]
        # not mapping.optim_fragment: 0.19.8 links it after the first group's step only
        source = flat.data if kind == "master" else self._inner.state.get(flat, {}).get(kind)
        if source is None:
            return None
        address = mapping.hp_fragment_address
        return start, source.detach().narrow(0, address.start, address.numel)

    def _fragment_stage3(self, param: Any, kind: str) -> tuple[int, torch.Tensor] | None:
        start = self._zero._get_param_partition_rank(param) * param.partition_numel()
        real = max(0, min(param.partition_numel(), param.ds_numel - start))  # the rest is padding
        if not real:
            return None
        if kind == "grad":
            return start, safe_get_local_grad(param).detach().float().view(-1)[:real]
        key = None if kind == "master" else kind
        if key is not None and not any(key in s for s in self._inner.state.values()):
            return None
        view, _ = self._zero._get_fp32_opt_state_partition(
            param, release_swap_buffers=False, optim_state_key=key
        )
        return start, view.detach().view(-1)[:real]


def _mark(
    module: nn.Module,
    placements: Mapping[str, Placement],
    mesh: ParallelMesh,
    layout: PipelineLayout | None,
) -> None:
    """Tell DeepSpeed which parameters this rank counts in the gradient's norm.

    Without the first mark it takes a shard for a copy, and copies it counts on the first rank of
    pp x tp only; the second excludes the last stage's copy of a tied weight.
    """
    for name, param in module.named_parameters():
        counted = placements[name].counts_on(mesh.tp_rank)
        param.tensor_model_parallel = counted  # type: ignore[attr-defined]
        param.model_parallel = counted  # type: ignore[attr-defined]
        if layout is not None and mesh.pp_rank > 0 and name == layout.copied_weight:
            param.ds_pipe_replicated = True  # type: ignore[attr-defined]


def _require_equal_groups(count: int, mesh: ParallelMesh) -> None:
    """DeepSpeed sums the norm once a parameter group: other numbers of groups wait for ever.

    Raises:
        UserError: stages have different numbers of non-empty parameter groups. Collective.
    """
    counts: list[Any] = [None] * mesh.pp_size
    torch.distributed.all_gather_object(counts, count, group=mesh.pp_group)
    if len(set(counts)) > 1:
        raise UserError(
            f"pipeline stages with {', '.join(map(str, counts))} parameter groups",
            rule="DeepSpeed reduces the gradient norm once a group, so every stage needs as many",
            remedy="use parallel.engine=torch, or weight decay and learning rates that give every "
            "stage the same groups",
        )


class _OneByOne(nn.Module):
    """A module on the meta device whose parameters take memory as they are asked for.

    DeepSpeed rounds what it finds there into its masters. The initial weights are written into
    these afterwards; until then there are zeros.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__()
        self._parts = [module]  # in a list: no submodule
        self._taken_to = device

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Every parameter, after it was replaced in its module by zeros on the device."""
        replaced: dict[int, nn.Parameter] = {}
        for part in self._parts[0].modules():
            for name, parameter in part.named_parameters(recurse=False):
                if id(parameter) not in replaced:
                    zeros = torch.zeros_like(parameter, device=self._taken_to)
                    replaced[id(parameter)] = nn.Parameter(zeros)
                    yield replaced[id(parameter)]
                setattr(part, name, replaced[id(parameter)])


def _build_optimizer(
    recipe: OptimizerRecipe, module: nn.Module, shapes: Mapping[str, tuple[int, ...]]
) -> torch.optim.Optimizer:
    """The optimizer over a module whose parameters may be empty already (stage 3).

    Which parameters decay is told by their shapes, so it is built on stand-ins of these, without
    memory of their own.
    """
    stand_ins, real = [], {}
    for name, parameter in module.named_parameters():
        one = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
        stand_ins.append((name, nn.Parameter(one.expand(shapes[name]))))
        real[stand_ins[-1][1]] = parameter
    optimizer = recipe.build(stand_ins)
    for group in optimizer.param_groups:
        group["params"] = [real[stand_in] for stand_in in group["params"]]
    return optimizer


def _import_its_muon() -> None:
    """Import DeepSpeed's Muon, which it asks about every optimizer, without torch's compiler.

    That module compiles three functions as it is imported. No engine of ours calls them (Muon is
    torch's business, see `capabilities`), and loading the compiler took 1.6 s of CPU time.
    """
    compiling = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        torch.compile = compiling


def _as_it_is(function: Any, *_: Any, **__: Any) -> Any:
    return function


def _silence() -> None:
    """DeepSpeed logs every setting at INFO; a run's console belongs to its own progress."""
    deepspeed_logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
