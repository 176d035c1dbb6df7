"""How layers, stages, ranks and micro-batches of a pipeline fit together, and how it plays."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest

from megascale.cli.config import all_checks
from megascale.config.load import load_config
from megascale.config.problems import ConfigError, Problem
from megascale.engine.pipeline_checks import CHECKS
from megascale.parallel.pipeline import (
    SCHEDULES,
    PipelineLayout,
    StageCosts,
    balance,
    cut_chunks,
)
from megascale.planner.timeline import Timeline, play, schedule_orders


def layout_of(schedule: str, size: int, v: int) -> PipelineLayout:
    return PipelineLayout(schedule, size, cut_chunks([1] * (size * v)), hidden_size=8)


def timeline(schedule: str, size: int, v: int, micro_batches: int) -> Timeline:
    return play(schedule_orders(layout_of(schedule, size, v), micro_batches))


@pytest.mark.parametrize(
    ("layers", "last", "stages"),
    [(5, 0.0, 2), (6, 3.0, 3), (7, 0.5, 4), (4, 9.0, 4), (9, 2.0, 1)],
)
def test_the_dearest_stage_is_as_cheap_as_can_be(layers: int, last: float, stages: int) -> None:
    costs = StageCosts(tuple(1.0 + i % 2 for i in range(layers)), last=last)

    def dearest(counts: tuple[int, ...]) -> float:
        return max(costs.of(chunk.begin, chunk.end) for chunk in cut_chunks(counts))

    every = [
        counts
        for counts in itertools.product(range(1, layers + 1), repeat=stages)
        if sum(counts) == layers
    ]
    found = balance(costs, stages)
    assert tuple(found) in every
    assert dearest(tuple(found)) == min(map(dearest, every))


def test_a_heavy_head_gets_fewer_layers() -> None:
    assert balance(StageCosts((1.0,) * 8), 2) == [4, 4]
    assert balance(StageCosts((1.0,) * 8, last=2.0), 2) == [5, 3]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_stage_lies_on_one_rank(name: str) -> None:
    v = SCHEDULES[name].stages_per_rank[0]
    layout = layout_of(name, 3, v)
    stages = [stage for rank in range(3) for stage in layout.stages_of(rank)]
    assert sorted(stages) == list(range(3 * v))
    assert layout.copied_weight is None  # nothing is tied
    ends = PipelineLayout(name, 3, layout.chunks, 8, tied_weight="w")
    shared = SCHEDULES[name].placement == "v"
    assert ends.last_rank == (0 if shared else 2)
    assert ends.copied_weight == (None if shared else "w")


@pytest.mark.parametrize("name", SCHEDULES)
def test_takes_what_torch_takes(name: str) -> None:
    """Our rule for micro-batches is torch's, which it states by raising."""
    kind = SCHEDULES[name]
    for size, micro_batches in itertools.product((2, 3, 4), range(1, 14)):
        layout = layout_of(name, size, kind.stages_per_rank[0])
        try:
            play(schedule_orders(layout, micro_batches))
            taken = True
        except ValueError:
            taken = False
        assert kind.takes(micro_batches, size) == taken, (size, micro_batches)


@pytest.mark.parametrize(("size", "micro_batches"), [(2, 4), (3, 6), (4, 8), (4, 16)])
def test_idle_time_is_that_of_theory(size: int, micro_batches: int) -> None:
    """(p - 1) / m for GPipe and 1F1B, (p - 1) / (v m) interleaved, less for zero-bubble."""
    plain = (size - 1) / micro_batches
    for name in ("gpipe", "1f1b"):
        assert timeline(name, size, 1, micro_batches).bubble == pytest.approx(plain)
    for v in (2, 3):
        found = timeline("interleaved", size, v, micro_batches).bubble
        assert found == pytest.approx(plain / v)
    assert timeline("interleaved_zero_bubble", size, 2, micro_batches).bubble < plain / 2
    assert timeline("zbv", size, 2, micro_batches).bubble < plain / 2
    assert timeline("dualpipev", size, 2, micro_batches).bubble < plain


@pytest.mark.parametrize(("size", "micro_batches"), [(2, 4), (4, 8)])
def test_activations_in_flight_are_those_of_theory(size: int, micro_batches: int) -> None:
    gpipe = timeline("gpipe", size, 1, micro_batches)
    one = timeline("1f1b", size, 1, micro_batches)
    interleaved = timeline("interleaved", size, 2, micro_batches)
    zbv = timeline("zbv", size, 2, micro_batches)
    for rank in range(size):
        assert gpipe.activations(rank) == micro_batches
        assert one.activations(rank) == size - rank
        # arXiv:2104.04473: warm-up of 2 (p - rank - 1) + (v - 1) p, and one more under way
        assert interleaved.activations(rank) == 2 * (size - rank - 1) + size + 1
        assert zbv.activations(rank) <= 2 * size  # of half the size: 1F1B's peak at most


def test_orders_that_wait_for_each_other_are_found() -> None:
    orders = schedule_orders(layout_of("1f1b", 2, 1), 2)
    orders[0].reverse()
    with pytest.raises(ValueError, match="wait for each other"):
        play(orders)


@dataclass(frozen=True)
class Case:
    """Overrides that break a rule at `path`, words of its message, and overrides that keep it."""

    bad: str
    path: str
    words: tuple[str, ...]
    good: str
    world_size: int = 4


PP4 = "parallel.pipeline_parallel_size=4 "
PP2 = "parallel.pipeline_parallel_size=2 "
ZBV = "parallel.pipeline_schedule=zbv "
BATCH = "train.micro_batch_size=1 train.global_batch_size={} ".format
CASES = [
    Case(
        PP2 + ZBV,
        "parallel.virtual_pipeline_stages",
        ("the zbv schedule has 2 on each rank", "virtual_pipeline_stages=2"),
        PP2 + ZBV + "parallel.virtual_pipeline_stages=2",
    ),
    Case(
        PP2 + "parallel.virtual_pipeline_stages=2",
        "parallel.virtual_pipeline_stages",
        ("1f1b schedule has 1", "interleaved"),
        PP2 + "parallel.virtual_pipeline_stages=2 parallel.pipeline_schedule=interleaved",
    ),
    Case(
        PP4 + "model.num_layers=3",
        "parallel.pipeline_parallel_size",
        ("4 * 1 = 4", "model.num_layers >= 4", "pipeline_parallel_size <= 3"),
        PP4 + "model.num_layers=4",
    ),
    Case(
        PP2 + "parallel.layers_per_stage=[6,5]",
        "parallel.layers_per_stage",
        ("2 * 1 = 2", "model.num_layers = 12", "the sum 11"),
        PP2 + "parallel.layers_per_stage=[7,5]",
    ),
    Case(
        PP4 + BATCH(3),
        "train.global_batch_size",
        ("3 / 1 = 3 micro-batches", "at least 1 x 4 ranks = 4", "global_batch_size = 4"),
        PP4 + BATCH(4),
    ),
    Case(
        PP2
        + "parallel.pipeline_schedule=interleaved parallel.virtual_pipeline_stages=2 "
        + BATCH(10),
        "train.global_batch_size",
        ("10 / 2 = 5 micro-batches", "a multiple of", "global_batch_size = 8 or 12"),
        PP2
        + "parallel.pipeline_schedule=interleaved parallel.virtual_pipeline_stages=2 "
        + BATCH(12),
    ),
    Case(
        PP4 + BATCH(8) + 'train.batch_size_ramp={"start":2,"increment":2,"samples":90}',
        "train.batch_size_ramp",
        ("2 / 1 = 2 micro-batches",),
        PP4 + BATCH(8) + 'train.batch_size_ramp={"start":4,"increment":2,"samples":90}',
    ),
    Case(
        PP2 + "parallel.engine=deepspeed parallel.zero_stage=2",
        "parallel.engine",
        ("stages 2 and 3 fail under a pipeline", "parallel.engine=torch"),
        PP2 + "parallel.engine=deepspeed parallel.zero_stage=1",
    ),
    Case(
        PP2 + ZBV + "parallel.virtual_pipeline_stages=2 parallel.zero_stage=3",
        "parallel.pipeline_schedule",
        ("zero-bubble schedules", "parallel.zero_stage=1"),
        PP2 + ZBV + "parallel.virtual_pipeline_stages=2 parallel.zero_stage=1",
    ),
    Case(
        PP2 + "optimizer.layer_lr_decay=0.9 parallel.engine=deepspeed parallel.zero_stage=1",
        "parallel.engine",
        ("different groups",),
        PP2 + "optimizer.layer_lr_decay=0.9 parallel.zero_stage=1",
    ),
]


def found_by(overrides: str, world_size: int) -> tuple[Problem, ...]:
    try:
        load_config(
            {"data": {"path": "d"}}, overrides.split(), checks=all_checks(), world_size=world_size
        )
    except ConfigError as error:
        return error.problems
    return ()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.bad)
def test_what_does_not_fit_is_refused_with_the_numbers(case: Case) -> None:
    (problem,) = found_by(case.bad, case.world_size)
    assert problem.path == case.path
    text = f"{problem.rule} {problem.hint}"
    for words in case.words:
        assert words in text
    assert found_by(case.good, case.world_size) == ()


def test_every_check_has_a_case() -> None:
    broken = {case.path for case in CASES}
    assert {"parallel.virtual_pipeline_stages", "parallel.layers_per_stage"} <= broken
    assert len(CHECKS) == 3
