"""From a checked config to the engine that runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from megascale.config.schema import Config
from megascale.engine.capabilities import choose_engine, require_allowed
from megascale.engine.loss_scaler import LossScaling
from megascale.engine.protocol import Engine, OptimizerRecipe
from megascale.engine.torch_engine import ReplicatedEngine, ShardedEngine
from megascale.parallel.mesh import ParallelMesh
from megascale.parallel.pipeline import PipelineLayout
from megascale.parallel.tensor_parallel import Placement
from megascale.wide import wide_dtype

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


def build_engine(
    config: Config,
    module: nn.Module,
    device: torch.device,
    blocks: Sequence[nn.Module],
    recipe: OptimizerRecipe,
    mesh: ParallelMesh,
    placements: Mapping[str, Placement],
    layout: PipelineLayout | None = None,
) -> Engine:
    """Hand the module to the engine of `config`; its weights have no values yet.

    Args:
        module: the task's module on the meta device; the engine owns it from here on.
        device: the run's device.
        blocks: its repeated layers, the units that ZeRO-3 gathers one by one.
        recipe: how to build the optimizer.
        mesh: who is where.
        placements: where each parameter lies in its global tensor.
        layout: of the pipeline; None without one.

    Raises:
        UserError: no engine, or not the one asked for, runs this config on this device.
    """
    require_allowed(config, device.type)
    dtype = DTYPES[config.precision.dtype]
    module.to(wide_dtype(dtype))  # of the masters
    scaling = loss_scaling(config)
    stage = config.parallel.zero_stage
    if choose_engine(config, device.type) == "deepspeed":
        # imported here: it costs seconds, and a machine without it can still train
        from megascale.engine.deepspeed_engine import DeepSpeedEngine, Offload

        micro = config.train.micro_batch_size
        return DeepSpeedEngine(
            module,
            device,
            recipe,
            mesh,
            placements,
            dtype=dtype,
            stage=stage,
            micro_batch_size=micro,
            num_micro_batches=config.train.global_batch_size // (micro * mesh.dp_size),
            hidden_size=config.model.hidden_size,
            scaling=scaling,
            offload=Offload(config.parallel.offload_optimizer, config.parallel.offload_parameters),
            layout=layout,
        )
    if stage == 0:
        return ReplicatedEngine(
            module, device, recipe, mesh, placements, dtype, scaling, layout=layout
        )
    return ShardedEngine(
        module,
        device,
        recipe,
        mesh,
        placements,
        dtype,
        scaling,
        stage=stage,
        blocks=blocks,
        layout=layout,
    )


def loss_scaling(config: Config) -> LossScaling:
    """How the loss is scaled: only fp16 needs it."""
    precision = config.precision
    if precision.dtype != "fp16":
        return LossScaling()
    if precision.loss_scale:
        return LossScaling(initial_scale=precision.loss_scale)
    return LossScaling(
        initial_scale=2.0**precision.initial_loss_scale_power,
        dynamic=True,
        window=precision.loss_scale_window,
        hysteresis=precision.hysteresis,
        min_scale=precision.min_loss_scale,
    )
