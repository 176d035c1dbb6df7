"""The choice of recomputed layers, against every way that there is."""

from __future__ import annotations

import itertools

import pytest

from megascale.errors import UserError
from megascale.parallel.activation_checkpoint import Mode
from megascale.parallel.pipeline import PipelineLayout, cut_chunks
from megascale.planner.activations import LayerCosts, RankLoad, choose, need, rank_loads
from megascale.planner.timeline import play, schedule_orders

MODES: tuple[Mode, ...] = ("none", "selective", "full")
COSTS = LayerCosts(
    {"none": 34e6, "selective": 20e6, "full": 2e6}, {"none": 0, "selective": 3, "full": 10}
)
FLASH = LayerCosts(
    {"none": 34e6, "selective": 33.9e6, "full": 2e6}, {"none": 0, "selective": 3, "full": 10}
)


def _peak(costs: LayerCosts, modes: tuple[Mode, ...], micro_batches: int = 1) -> float:
    """Forwards of all layers for some micro-batches, then the backward of one, layer by layer."""
    held = micro_batches * sum(costs.kept[mode] for mode in modes)
    peak = held
    for mode in reversed(modes):
        peak = max(peak, held + costs.kept["none"] - costs.kept[mode])
        held -= costs.kept[mode]
    return peak


@pytest.mark.parametrize("costs", [COSTS, FLASH], ids=["scores", "flash"])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("budget", [62, 80, 95, 110, 130, 160, 200, 300, 400, 500])
def test_no_way_is_cheaper(costs: LayerCosts, micro_batches: int, budget: int) -> None:
    """Of all modes of five layers in any order none stays within the budget for less."""
    load = RankLoad((5,), frozenset({(count,) for count in range(micro_batches + 1)}))
    [choice] = choose(costs, [load], budget)
    [modes] = choice.modes
    assert _peak(costs, modes, micro_batches) == choice.need <= budget * 1e6
    cheapest = min(
        sum(costs.again[mode] for mode in every)
        for every in itertools.product(MODES, repeat=5)
        if _peak(costs, every, micro_batches) <= budget * 1e6
    )
    assert sum(costs.again[mode] for mode in modes) == cheapest


def test_attention_that_keeps_no_scores_is_not_recomputed_layer_by_layer() -> None:
    [choice] = choose(FLASH, [RankLoad((12,))], 400)
    assert choice.modes == (("full",) + ("none",) * 11,)


def test_a_budget_that_nothing_meets_is_refused_and_the_remedy_is_enough() -> None:
    with pytest.raises(UserError, match=r"activation_memory_mb=41, but .* 42\.00 MB") as error:
        choose(COSTS, [RankLoad((5,))], 41)
    assert "no other memory" in error.value.rule
    enough = float(error.value.remedy.split("=")[1].split(" ")[0])
    [choice] = choose(COSTS, [RankLoad((5,))], enough)
    assert choice.need <= 42e6


def test_layers_are_offloaded_only_where_recomputing_all_is_not_enough() -> None:
    costs = LayerCosts({**COSTS.kept, "offload": 0.0}, {**COSTS.again, "offload": 10})
    [choice] = choose(costs, [RankLoad((5,))], 42)
    assert "offload" not in choice.modes[0]
    [choice] = choose(costs, [RankLoad((5,))], 41)
    assert choice.modes == (("offload", "full", "full", "full", "none"),)
    assert choice.need == 40e6
    with pytest.raises(UserError, match="recomputed and offloaded"):
        choose(costs, [RankLoad((5,))], 33)


def test_the_first_rank_of_a_pipeline_recomputes_most() -> None:
    layout = PipelineLayout("1f1b", 4, cut_chunks([3, 3, 3, 3]), hidden_size=8)
    choices = choose(COSTS, rank_loads(3, layout, 8), 150)
    recomputed = [sum(mode != "none" for mode in choice.modes[0]) for choice in choices]
    assert recomputed == sorted(recomputed, reverse=True)
    assert recomputed[0] == 3
    assert recomputed[-1] == 0  # one micro-batch at once: 102 MB


@pytest.mark.parametrize("schedule", ["interleaved", "zbv", "dualpipev"])
def test_the_need_of_several_stages_is_never_passed(schedule: str) -> None:
    """Played action by action, with stages of different lengths."""
    layout = PipelineLayout(schedule, 2, cut_chunks([2, 1, 3, 2]), hidden_size=8)
    loads = rank_loads(0, layout, 4)
    for rank, (load, choice) in enumerate(zip(loads, choose(COSTS, loads, 300), strict=True)):
        stages = layout.stages_of(rank)
        sizes = dict(zip(stages, (sum(map(COSTS.kept.get, m)) for m in choice.modes), strict=True))  # type: ignore[arg-type]
        held = most = 0.0
        for action in schedule_orders(layout, 4)[rank]:
            held += {"F": 1, "B": -1, "W": -1, "I": 0}[action.kind] * sizes[action.stage]
            most = max(most, held)
        assert held == 0
        assert most <= choice.need <= 300e6
        assert need(COSTS, load, choice.modes) == choice.need
        assert max(map(sum, load.moments)) == play(schedule_orders(layout, 4)).activations(rank)
