"""What a pipeline asks of other settings: the equation, the numbers, the nearest legal values."""

from __future__ import annotations

from collections.abc import Iterator

from megascale.config.problems import Problem
from megascale.config.rules import Check, either
from megascale.config.schema import Config
from megascale.parallel.pipeline import SCHEDULES, Schedule


def _stages_fit_schedule(config: Config, world_size: int | None) -> Iterator[Problem]:
    """Each schedule has its own number of stages a rank."""
    del world_size
    parallel = config.parallel
    if parallel.pipeline_parallel_size == 1:
        return
    name, stages = parallel.pipeline_schedule, parallel.virtual_pipeline_stages
    least, most = SCHEDULES[name].stages_per_rank
    if least <= stages and (most is None or stages <= most):
        return
    wanted = str(least) if least == most else f"at least {least}"
    others = [other for other, kind in SCHEDULES.items() if _takes_stages(kind, stages)]
    yield Problem(
        "parallel.virtual_pipeline_stages",
        stages,
        f"the {name} schedule has {wanted} on each rank",
        f"parallel.virtual_pipeline_stages={least}, or parallel.pipeline_schedule="
        f"{either_of(others)}",
    )


def _takes_stages(kind: Schedule, stages: int) -> bool:
    least, most = kind.stages_per_rank
    return least <= stages and (most is None or stages <= most)


def either_of(names: list[str]) -> str:
    """The names as a choice: "a, b or c"."""
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _layers_fit_stages(config: Config, world_size: int | None) -> Iterator[Problem]:
    """Every stage has a layer; explicit numbers of layers add up."""
    del world_size
    parallel, layers = config.parallel, config.model.num_layers
    if parallel.pipeline_parallel_size == 1:
        return
    ranks, virtual = parallel.pipeline_parallel_size, parallel.virtual_pipeline_stages
    stages = ranks * virtual
    equation = f"pipeline_parallel_size * virtual_pipeline_stages = {ranks} * {virtual} = {stages}"
    if stages > layers:
        fewer = f", or parallel.pipeline_parallel_size <= {layers // virtual}"
        yield Problem(
            "parallel.pipeline_parallel_size",
            ranks,
            f"every stage has at least one of the model.num_layers = {layers} layers, but "
            f"{equation}",
            f"model.num_layers >= {stages}" + (fewer if layers >= virtual else ""),
        )
    counts = parallel.layers_per_stage
    if counts is not None and (len(counts) != stages or sum(counts) != layers):
        yield Problem(
            "parallel.layers_per_stage",
            counts,
            f"one number for each stage ({equation}), with the sum model.num_layers = {layers}; "
            f"these are {len(counts)} with the sum {sum(counts)}",
            "leave it out to have the layers balanced",
        )


def _micro_batches_fill_pipeline(config: Config, world_size: int | None) -> Iterator[Problem]:
    """Each step has micro-batches as the schedule wants them, also while the batch size ramps."""
    parallel, train = config.parallel, config.train
    ranks = parallel.pipeline_parallel_size
    group = parallel.model_parallel_size
    if ranks == 1 or world_size is None or world_size % group:
        return
    at_once = train.micro_batch_size * (world_size // group)
    kind = SCHEDULES[parallel.pipeline_schedule]
    sizes = [("train.global_batch_size", train.global_batch_size)]
    if (ramp := train.batch_size_ramp) is not None:
        growing = range(ramp.start, train.global_batch_size, ramp.increment)
        sizes += [("train.batch_size_ramp", size) for size in growing]
    for path, size in sizes:
        if size % at_once or kind.takes(size // at_once, ranks):
            continue  # what does not divide is another check's
        count = size // at_once
        near = _legal_near(kind, count, ranks)
        yield Problem(
            path,
            size,
            f"{size} / (micro_batch_size * data_parallel_size) = {size} / {at_once} = {count} "
            f"micro-batches a step; {parallel.pipeline_schedule} takes {kind.rule(ranks)}",
            f"{path} = {either(n * at_once for n in near)}",
        )
        return


def _legal_near(kind: Schedule, count: int, ranks: int) -> list[int]:
    """The numbers of micro-batches next to `count` that the schedule takes."""
    below = [n for n in range(count, 0, -1) if kind.takes(n, ranks)][:1]
    above = next(n for n in range(count, 4 * (count + ranks)) if kind.takes(n, ranks))
    return sorted({*below, above})


_LAYOUT = (
    "parallel.pipeline_parallel_size",
    "parallel.virtual_pipeline_stages",
    "parallel.pipeline_schedule",
)

CHECKS: tuple[Check, ...] = (
    Check(_LAYOUT, _stages_fit_schedule),
    Check((*_LAYOUT, "model.num_layers", "parallel.layers_per_stage"), _layers_fit_stages),
    Check(
        (
            *_LAYOUT,
            "parallel.tensor_parallel_size",
            "parallel.context_parallel_size",
            "train.global_batch_size",
            "train.micro_batch_size",
            "train.batch_size_ramp",
        ),
        _micro_batches_fill_pipeline,
    ),
)
