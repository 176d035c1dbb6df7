"""Recomputation by a memory budget: what a layer keeps is measured at start, then layers choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from megascale.config.schema import Config
from megascale.data.loader import BatchLoader
from megascale.data.protocol import SampleSource
from megascale.engine.factory import DTYPES
from megascale.models.chunk import Chunk
from megascale.parallel.activation_checkpoint import SELECTIVE, Mode, recomputing
from megascale.parallel.mesh import ParallelMesh
from megascale.parallel.pipeline import PipelineLayout
from megascale.planner.activations import Choice, LayerCosts, choose, rank_loads
from megascale.training.step import prepare

Say = Callable[[str], None]


def choose_modes(
    config: Config,
    module: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: ParallelMesh,
    layout: PipelineLayout | None,
    device: torch.device,
    samples: SampleSource | None,
    say: Say | None = None,
) -> list[Mode]:
    """The mode of each of this rank's layers. Collective where there is a budget.

    Args:
        module: with all cuts, still on the meta device.
        blocks: its layers, without recomputation yet.
        samples: what the run trains on; needed with a budget.
        say: told what was chosen.

    Raises:
        UserError: nothing that could be chosen stays within the budget.
    """
    parallel = config.parallel
    budget = parallel.activation_memory_mb
    if budget is None:
        mode = parallel.activation_recomputation
        return ["none" if mode == "auto" else mode] * len(blocks)
    assert samples is not None, "a budget is kept on samples of the run"
    index = 0 if layout is None else layout.chunks[layout.stages_of(mesh.pp_rank)[0]].begin
    costs = layer_costs(config, module, blocks[0], index, mesh, device, samples)
    size = config.train.micro_batch_size * mesh.dp_size
    loads = rank_loads(len(blocks), layout, config.train.global_batch_size // size)
    choices = choose(costs, loads, budget)
    if say is not None:
        say(_summary(choices, costs, budget))
    return [mode for stage in choices[mesh.pp_rank].modes for mode in stage]


def layer_costs(
    config: Config,
    module: nn.Module,
    block: nn.Module,
    index: int,
    mesh: ParallelMesh,
    device: torch.device,
    samples: SampleSource,
) -> LayerCosts:
    """What a layer costs in each mode on the run's first samples. Collective.

    Args:
        block: the layer of `module` with the global number `index`.
    """
    size = config.train.micro_batch_size
    loader = BatchLoader(
        samples, size * mesh.dp_size, size, mesh.dp_rank, mesh.dp_size, prefetch=False
    )
    batch = prepare(loader.load(0)[0], mesh, device)
    rows, length = batch["input_ids"].shape
    shards = mesh.tp_size if config.parallel.sequence_parallel else 1
    hidden = torch.zeros(
        (rows, length // shards, config.model.hidden_size),
        dtype=DTYPES[config.precision.dtype],
        device=device,
        requires_grad=True,
    )
    return _agree(_measure(module, block, index, batch, hidden), device)


def _measure(
    module: nn.Module,
    block: nn.Module,
    index: int,
    batch: Mapping[str, torch.Tensor],
    hidden: torch.Tensor,
) -> LayerCosts:
    """What a layer keeps and computes again in each mode, from forwards of one. Collective over
    the ranks that share it.

    Of two forwards on the same inputs it is counted what only the second one keeps: weights, and
    masks that layers share, are the first one's, too.

    Args:
        block: with the global number `index`.
        hidden: what goes into it, of the type that the run computes in.
    """
    arguments = _arguments(module, block, index, batch, hidden)
    weights = {
        name: torch.zeros(weight.shape, dtype=hidden.dtype, device=hidden.device).requires_grad_()
        for name, weight in block.named_parameters()
    }

    def forward() -> torch.Tensor:
        return functional_call(block, weights, (hidden.clone(), *arguments))

    kept: dict[Mode, float] = {}
    modes: tuple[Mode, ...] = ("none", "selective", "full")
    for mode in modes:
        with recomputing(block, mode):
            before, after = _saved(forward), _saved(forward)
        kept[mode] = sum(s.nbytes() for place, s in after.items() if place not in before)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_COUNTED) as counter:
        forward()
    counts = counter.get_flop_counts()
    core = counts.get(f"{type(block).__name__}.{SELECTIVE}", {})
    again: dict[Mode, float] = {
        "none": 0.0,
        "selective": float(sum(core.values())),
        "full": float(counter.get_total_flops()),
    }
    if hidden.device.type != "cpu":  # whose memory is the host's
        kept["offload"], again["offload"] = 0.0, again["full"]
    return LayerCosts(kept, again)


def _arguments(
    module: nn.Module,
    block: nn.Module,
    index: int,
    batch: Mapping[str, torch.Tensor],
    hidden: torch.Tensor,
) -> tuple[Any, ...]:
    """What the model hands to a layer beside the hidden states."""
    seen: list[Any] = []

    def note(hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.extend(rest)
        return hidden

    block.forward = note
    try:
        module(**batch, hidden=hidden, chunk=Chunk(index, index + 1, index + 2))
    finally:
        del block.forward
    return tuple(seen)


def _saved(forward: Callable[[], torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """The storages that a forward keeps for its backward, by address; they live on in it."""
    found: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return found


def _cpu_attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


_COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops}
"""What torch's counter leaves out; it hands over shapes."""


def _agree(costs: LayerCosts, device: torch.device) -> LayerCosts:
    """The most of all ranks: shares of a layer may differ, choices may not."""
    values = [*costs.kept.values(), *costs.again.values()]
    most = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    kept, again = most.tolist()[: len(costs.kept)], most.tolist()[len(costs.kept) :]
    return LayerCosts(
        dict(zip(costs.kept, kept, strict=True)), dict(zip(costs.again, again, strict=True))
    )


def _summary(choices: Sequence[Choice], costs: LayerCosts, budget: float) -> str:
    whose = [f"pipeline rank {rank}: " if len(choices) > 1 else "" for rank in range(len(choices))]
    ranks = "; ".join(f"{who}{choice}" for who, choice in zip(whose, choices, strict=True))
    sizes = ", ".join(f"{mode} {size / 1e6:,.2f}" for mode, size in costs.kept.items())
    return (
        f"activations of the layers within {budget:g} MB: {ranks} "
        f"(a layer of a micro-batch keeps in MB: {sizes})"
    )
