"""Which layers recompute, so that what a rank keeps for the backward fits into a budget.

Recomputed are the first layers of a stage. The backward begins with the last ones, and what they
let go is room for what a recomputed layer makes anew: where the last layer keeps everything,
recomputation needs no memory of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megascale.errors import UserError
from megascale.parallel.activation_checkpoint import Mode
from megascale.parallel.pipeline import PipelineLayout
from megascale.planner.timeline import play, schedule_orders

MB = 1e6
_FIRST_TO_LAST: tuple[Mode, ...] = ("offload", "full", "selective")
Modes = tuple[tuple[Mode, ...], ...]
"""Of each layer of each of a rank's stages."""


@dataclass(frozen=True)
class LayerCosts:
    """What one layer costs in each mode that the device has.

    Attributes:
        kept: bytes on the device between its forward and its backward, for one micro-batch.
        again: FLOPs that the backward computes once more.
    """

    kept: Mapping[Mode, float]
    again: Mapping[Mode, float]


@dataclass(frozen=True)
class RankLoad:
    """What a rank works on.

    Attributes:
        layers: of each of its stages.
        moments: states of a step: micro-batches of each stage that wait for their backward.
    """

    layers: tuple[int, ...]
    moments: frozenset[tuple[int, ...]] = frozenset({(1,)})


@dataclass(frozen=True)
class Choice:
    """The modes of a rank's layers, and the bytes that they need at most."""

    modes: Modes
    need: float

    def __str__(self) -> str:
        flat = [mode for stage in self.modes for mode in stage]
        counts = ", ".join(f"{flat.count(mode)} {mode}" for mode in dict.fromkeys(flat))
        return f"{counts}; {_mb(self.need)} MB"


def rank_loads(
    num_layers: int, layout: PipelineLayout | None, num_micro_batches: int
) -> list[RankLoad]:
    """The load of every pipeline rank; without a pipeline there is one."""
    if layout is None:
        return [RankLoad((num_layers,))]
    timeline = play(schedule_orders(layout, num_micro_batches))
    loads = []
    for rank in range(layout.size):
        chunks = [layout.chunks[stage] for stage in layout.stages_of(rank)]
        layers = tuple(chunk.end - chunk.begin for chunk in chunks)
        loads.append(RankLoad(layers, frozenset(timeline.moments(rank))))
    return loads


def choose(costs: LayerCosts, loads: Sequence[RankLoad], budget_mb: float) -> list[Choice]:
    """For every rank the fewest FLOPs computed again with which it stays within the budget.

    Layers are offloaded only where recomputing all of them is not enough.

    Raises:
        UserError: a rank has no way to stay within the budget.
    """
    choices = [_cheapest(costs, load, budget_mb * MB) for load in loads]
    found = [choice for choice in choices if choice is not None]
    if len(found) < len(choices):
        raise _does_not_fit(costs, loads, budget_mb)
    return found


def need(costs: LayerCosts, load: RankLoad, modes: Modes) -> float:
    """The most bytes that the layers of a rank take at once."""
    stages = [sum(costs.kept[mode] for mode in stage) for stage in modes]
    kept = max(
        sum(count * size for count, size in zip(moment, stages, strict=True))
        for moment in load.moments
    )
    return kept + max(_working(costs, stage) for stage in modes)


def _working(costs: LayerCosts, stage: Sequence[Mode]) -> float:
    """What recomputed layers take beyond what the backward of the stage has let go by then."""
    most = let_go = 0.0
    for mode in reversed(stage):
        most = max(most, costs.kept["none"] - costs.kept[mode] - let_go)
        let_go += costs.kept[mode]
    return most


def _cheapest(costs: LayerCosts, load: RankLoad, budget: float) -> Choice | None:
    total = sum(load.layers)
    for offloaded in range(total + 1) if "offload" in costs.kept else (0,):
        if need(costs, load, _modes(load.layers, (offloaded, total - offloaded, 0))) > budget:
            continue
        fitting: list[tuple[float, int, Choice]] = []
        for counts in _counts(offloaded, total):
            modes = _modes(load.layers, counts)
            choice = Choice(modes, need(costs, load, modes))
            if choice.need <= budget:
                again = sum(costs.again[mode] for stage in modes for mode in stage)
                fitting.append((again, sum(counts), choice))
        return min(fitting, key=lambda one: one[:2])[2]
    return None


def _counts(offloaded: int, total: int) -> Iterator[tuple[int, int, int]]:
    """All numbers of (offloaded, fully, selectively recomputed) layers."""
    rest = range(total - offloaded + 1)
    for full, selective in itertools.product(rest, rest):
        if offloaded + full + selective <= total:
            yield offloaded, full, selective


def _modes(layers: Sequence[int], counts: tuple[int, int, int]) -> Modes:
    """The modes when so many layers are offloaded, fully and selectively recomputed."""
    first = sorted((place, stage) for stage, size in enumerate(layers) for place in range(size))
    spent = [m for mode, n in zip(_FIRST_TO_LAST, counts, strict=True) for m in [mode] * n]
    given = dict(zip(first, spent, strict=False))
    return tuple(
        tuple(given.get((place, stage), "none") for place in range(size))
        for stage, size in enumerate(layers)
    )


def _does_not_fit(costs: LayerCosts, loads: Sequence[RankLoad], budget_mb: float) -> UserError:
    offloads = "offload" in costs.kept
    last: Mode = "offload" if offloads else "full"
    least = max(need(costs, load, tuple((last,) * size for size in load.layers)) for load in loads)
    where = "" if offloads else " (and on this device there is no other memory to offload it to)"
    ways = "even when every layer is recomputed" + (" and offloaded" if offloads else "")
    return UserError(
        f"parallel.activation_memory_mb={budget_mb:g}, but a rank's layers take "
        f"{_mb(least)} MB {ways}",
        rule="what layers keep for the backward fits into the budget: one layer of a micro-batch "
        f"{_mb(costs.kept['none'])} MB, its input alone {_mb(costs.kept['full'])} MB{where}",
        remedy=f"parallel.activation_memory_mb={_mb(least + MB / 100, grouped=False)} or more, a "
        "smaller train.micro_batch_size, or more tensor- or context-parallel ranks",
    )


def _mb(size: float, grouped: bool = True) -> str:
    text = f"{size / MB:,.2f}"
    return text if grouped else text.replace(",", "")
