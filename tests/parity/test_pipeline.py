"""Every pipeline schedule, under both engines, is the same training as one process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from megascale.errors import UserError
from megascale.parallel.mesh import build_mesh
from megascale.parallel.pipeline import Action, PipelineLayout, cut_chunks
from megascale.planner.timeline import play, schedule_orders
from megascale.training.evaluation import evaluate
from megascale.training.state import TrainState
from tests.bert_data import make_bert_dataset
from tests.distributed import Pools
from tests.parity import test_bert_engines as bert
from tests.parity.harness import (
    Record,
    merge,
    record_rank,
    relative,
    resume_rank,
    run_steps,
    save_rank,
    set_up,
)
from tests.parity.test_context_parallel import continued
from tests.parity.test_engines import assert_same, settings_of
from tests.parity.test_tensor_parallel import GPT, LLAMA, SGD

STEPS = 3
DEEP: dict[str, Any] = {"model.num_layers": 5, "train.micro_batch_size": 1}
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {**GPT, **DEEP},
    "llama": {**LLAMA, **DEEP, "optimizer.grad_clip": 0.0},
    "sgd": {**SGD, **DEEP},
    # norms of whole tensors, and a learning rate for each layer
    "lamb": {**GPT, **DEEP, "optimizer.name": "lamb", "optimizer.layer_lr_decay": 0.8},
}


def pipeline(schedule: str, pp: int, v: int, engine: str, stage: int) -> dict[str, Any]:
    """The settings of a pipeline."""
    return {
        "parallel.pipeline_parallel_size": pp,
        "parallel.virtual_pipeline_stages": v,
        "parallel.pipeline_schedule": schedule,
        "parallel.engine": engine,
        "parallel.zero_stage": stage,
    }


SP: dict[str, Any] = {"parallel.tensor_parallel_size": 2, "parallel.sequence_parallel": True}
FULL, SELECTIVE = ({"parallel.activation_recomputation": mode} for mode in ("full", "selective"))
RING, ULYSSES = (
    {"parallel.context_parallel_size": 2, "parallel.context_parallel_method": method}
    for method in ("ring", "ulysses")
)
UNEVEN: dict[str, Any] = {"parallel.layers_per_stage": [1, 4]}

# world, schedule, pp, stages a rank, engine, ZeRO stage, models
LAYOUTS: list[tuple[int, str, int, int, str, int, tuple[str, ...]]] = [
    (2, "gpipe", 2, 1, "torch", 0, ("gpt",)),
    (2, "1f1b", 2, 1, "torch", 0, ("gpt", "llama", "sgd")),
    (2, "interleaved", 2, 2, "torch", 0, ("gpt",)),
    (2, "interleaved_zero_bubble", 2, 2, "torch", 0, ("gpt", "llama")),
    (2, "zbv", 2, 2, "torch", 0, ("gpt", "llama")),
    (2, "dualpipev", 2, 2, "torch", 0, ("gpt",)),
    (2, "1f1b", 2, 1, "deepspeed", 1, ("gpt", "llama", "sgd")),
    (2, "zbv", 2, 2, "deepspeed", 1, ("gpt", "llama")),
    (2, "interleaved", 2, 2, "deepspeed", 1, ("gpt",)),
    (4, "1f1b", 2, 1, "torch", 1, ("gpt",)),
    (4, "zbv", 2, 2, "torch", 1, ("gpt",)),
    (4, "interleaved", 2, 2, "torch", 2, ("gpt",)),
    (4, "1f1b", 2, 1, "torch", 3, ("gpt", "llama")),
    (4, "1f1b", 4, 1, "torch", 0, ("gpt",)),
    (4, "interleaved_zero_bubble", 2, 2, "deepspeed", 1, ("gpt",)),
]


# What is combined with a pipeline: world, pipeline, more settings, models
COMBINATIONS: list[tuple[int, tuple, dict[str, Any], tuple[str, ...]]] = [
    (4, ("1f1b", 2, 1, "torch", 0), SP, ("gpt", "llama")),
    (4, ("zbv", 2, 2, "torch", 0), SP, ("gpt",)),
    (4, ("1f1b", 2, 1, "deepspeed", 1), SP, ("gpt",)),
    (4, ("interleaved", 2, 2, "torch", 1), SP | FULL, ("llama",)),
    (2, ("1f1b", 2, 1, "torch", 1), FULL | UNEVEN, ("gpt",)),
    (2, ("zbv", 2, 2, "torch", 0), SELECTIVE, ("gpt",)),
    (4, ("1f1b", 2, 1, "torch", 1), {}, ("lamb",)),
    (4, ("1f1b", 2, 1, "deepspeed", 1), RING, ("gpt",)),
    (4, ("zbv", 2, 2, "torch", 1), ULYSSES, ("llama",)),
    (2, ("interleaved_zero_bubble", 2, 1, "torch", 0), FULL, ("gpt",)),
    (2, ("dualpipev", 2, 2, "deepspeed", 1), SELECTIVE, ("llama",)),
]


@pytest.fixture(scope="module")
def references(pools: Pools, token_prefix: Path) -> dict[str, Record]:
    return {
        name: merge(
            pools(1).run(record_rank, settings=settings_of(token_prefix, changes), steps=STEPS)
        )
        for name, changes in MODELS.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout[:6])))
def test_same_training(
    pools: Pools, token_prefix: Path, references: dict[str, Record], layout: tuple
) -> None:
    world, *parallel, names = layout
    for name in names:
        settings = settings_of(token_prefix, {**MODELS[name], **pipeline(*parallel)})
        found = merge(
            pools(world).run(record_rank, settings=settings, steps=STEPS, evaluate_every=2)
        )
        assert_same(found, references[name])


@pytest.mark.parametrize("case", COMBINATIONS, ids=lambda case: "-".join(map(str, case[1])))
def test_combined(
    pools: Pools, token_prefix: Path, references: dict[str, Record], case: tuple
) -> None:
    world, parallel, more, names = case
    for name in names:
        changes = {**MODELS[name], **pipeline(*parallel), **more}
        settings = settings_of(token_prefix, changes)
        found = merge(pools(world).run(record_rank, settings=settings, steps=STEPS))
        assert_same(found, references[name])


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, ("zbv", 2, 2, "torch", 0)),
        (4, ("1f1b", 2, 1, "torch", 1)),
        (2, ("interleaved", 2, 2, "deepspeed", 1)),
    ],
)
def test_bf16(pools: Pools, token_prefix: Path, world: int, parallel: tuple) -> None:
    """As in test_engines.py: one rounding is 2^-9; micro-batches are added in fp32."""
    changes = {**MODELS["gpt"], "precision.dtype": "bf16"}
    single = settings_of(token_prefix, {**changes, "parallel.engine": "torch"})
    expected = merge(pools(1).run(record_rank, settings=single, steps=STEPS))
    settings = settings_of(token_prefix, {**changes, **pipeline(*parallel)})
    found = merge(pools(world).run(record_rank, settings=settings, steps=STEPS))
    assert found.sample_ids == expected.sample_ids
    assert relative(found.losses, expected.losses) < 1e-3
    for a, b in zip(found.norms, expected.norms, strict=True):
        assert relative(a, b) < 1e-2
    floor = 1e-2 * expected.norms[0]
    for name, gradient in expected.gradients[0].items():
        assert relative(found.gradients[0][name], gradient, floor) < 1e-2, name


def test_an_overflow_on_one_stage_skips_the_step_on_all(pools: Pools, token_prefix: Path) -> None:
    """fp16 with a scale that overflows at first: the same steps are skipped as by one process."""
    changes = {
        **MODELS["gpt"],
        "model.dropout": 0.0,
        "precision.dtype": "fp16",
        "precision.initial_loss_scale_power": 24,
        "precision.hysteresis": 1,
    }
    single = settings_of(token_prefix, {**changes, "parallel.engine": "torch"})
    expected = merge(pools(1).run(record_rank, settings=single, steps=12))
    settings = settings_of(token_prefix, {**changes, **pipeline("zbv", 2, 2, "torch", 0)})
    found = merge(pools(2).run(record_rank, settings=settings, steps=12))
    skipped = [norm == float("inf") for norm in found.norms]
    assert skipped == [norm == float("inf") for norm in expected.norms]
    assert 0 < sum(skipped) < 12
    assert relative(found.losses, expected.losses) < 1e-3


@pytest.mark.parametrize(
    "parallel", [("zbv", 2, 2, "torch", 0), ("1f1b", 2, 1, "deepspeed", 1)], ids=str
)
def test_bert(pools: Pools, tmp_path_factory: pytest.TempPathFactory, parallel: tuple) -> None:
    """Two objectives, masks that each stage needs, a tied decoder."""
    data = make_bert_dataset(tmp_path_factory.mktemp("bert"))
    settings = bert.settings_of(data, model__num_layers=4)
    expected = merge(pools(1).run(record_rank, settings=settings, steps=STEPS))
    for path, value in pipeline(*parallel).items():
        settings.setdefault("parallel", {})[path.partition(".")[2]] = value
    found = merge(pools(2).run(record_rank, settings=settings, steps=STEPS, evaluate_every=2))
    assert_same(found, expected)


def test_resume_in_another_layout(pools: Pools, token_prefix: Path, tmp_path: Path) -> None:
    """Saved by a pipeline: bit-identical there, within 1e-5 in others; and into a pipeline."""
    zbv = pipeline("zbv", 2, 2, "deepspeed", 1)
    layouts: list[tuple[int, dict[str, Any]]] = [
        (1, {"parallel.engine": "torch"}),
        (2, pipeline("1f1b", 2, 1, "torch", 0)),
        (4, {**pipeline("interleaved", 2, 2, "torch", 1), **SP}),
        (2, {"parallel.zero_stage": 3}),
    ]
    settings = settings_of(token_prefix, {**MODELS["gpt"], **zbv})
    folder = str(tmp_path / "zbv")
    straight = pools(2).run(save_rank, settings=settings, folder=folder, at_step=2, steps=4)
    assert pools(2).run(resume_rank, settings=settings, folder=folder, steps=4) == straight
    for world, changes in layouts:
        other = settings_of(token_prefix, {**MODELS["gpt"], **changes})
        resumed = pools(world).run(resume_rank, settings=other, folder=folder, steps=4)
        for found, expected in zip(resumed[0], straight[0], strict=True):
            assert relative(found, expected) < 1e-5
    flat = settings_of(token_prefix, {**MODELS["gpt"], "parallel.zero_stage": 2})
    folder = str(tmp_path / "flat")
    straight = pools(2).run(save_rank, settings=flat, folder=folder, at_step=2, steps=4)
    resumed = pools(2).run(resume_rank, settings=settings, folder=folder, steps=4)
    for found, expected in zip(resumed[0], straight[0], strict=True):
        assert relative(found, expected) < 1e-5


def _ahead_rank(settings: dict[str, Any], folder: str) -> tuple[float, int]:
    """Runs on every rank: the validation loss, where rank 1 begins after rank 0's third forward."""
    setup = set_up(settings)
    pipeline, mesh = setup.engine.pipeline, setup.mesh
    module, third = pipeline._module, Path(folder) / "third"
    done = 0

    def forward(**inputs: Any) -> Any:
        nonlocal done
        if mesh.pp_rank:
            deadline = time.monotonic() + 60
            while not third.exists():
                assert time.monotonic() < deadline, "rank 0 waits for the result of each forward"
                time.sleep(0.01)
        out = module(**inputs)
        done += 1
        if mesh.pp_rank == 0 and done == 3:
            third.touch()
        return out

    pipeline._module = forward
    result = evaluate(setup.engine, setup.valid, mesh, setup.parts.device)
    setup.engine.close()
    return result.loss, done


@pytest.mark.parametrize(
    ("schedule", "v", "engine", "stage"), [("1f1b", 1, "torch", 0), ("1f1b", 1, "deepspeed", 1)]
)
def test_validation_fills_the_pipeline(
    pools: Pools,
    token_prefix: Path,
    tmp_path: Path,
    schedule: str,
    v: int,
    engine: str,
    stage: int,
) -> None:
    """No rank waits for a micro-batch's end before it begins the next one."""
    alone = settings_of(token_prefix, {**MODELS["gpt"], "parallel.engine": "torch"})
    (expected,) = pools(1).run(record_rank, settings=alone, steps=0)
    changes = {**MODELS["gpt"], **pipeline(schedule, 2, v, engine, stage)}
    settings = settings_of(token_prefix, changes)
    for loss, forwards in pools(2).run(_ahead_rank, settings=settings, folder=str(tmp_path)):
        assert relative(loss, expected["valid"][0]) < 1e-5
        assert forwards > 3


@pytest.mark.parametrize(
    "parallel", [("1f1b", 2, 1, "torch", 3), ("zbv", 2, 2, "deepspeed", 1)], ids=str
)
def test_text_samples_come_through_the_pipeline(
    pools: Pools, token_prefix: Path, parallel: tuple
) -> None:
    """The logits that a text is continued from are those of one process, on every rank."""
    for length in (1, 7):
        (alone,), cut = (
            pools(world).run(continued, settings=settings_of(token_prefix, changes), length=length)
            for world, changes in (
                (1, {**MODELS["gpt"], "parallel.engine": "torch"}),
                (2, {**MODELS["gpt"], **pipeline(*parallel)}),
            )
        )
        for logits in cut:
            assert relative(logits.numpy(), alone.numpy()) < 1e-5


def trace_rank(settings: dict[str, Any]) -> list[Action]:
    """Runs on every rank: what the schedule did in a step."""
    setup = set_up(settings)
    run_steps(setup, TrainState(), 1)
    trace = setup.engine.pipeline.trace
    setup.engine.close()
    return trace


@pytest.mark.parametrize(
    ("schedule", "pp", "v"),
    [
        ("gpipe", 2, 1),
        ("1f1b", 2, 1),
        ("1f1b", 4, 1),
        ("interleaved", 2, 2),
        ("interleaved_zero_bubble", 2, 2),
        ("zbv", 2, 2),
        ("dualpipev", 2, 2),
    ],
)
def test_ranks_do_what_the_timeline_says(
    pools: Pools, token_prefix: Path, schedule: str, pp: int, v: int
) -> None:
    """What ran is what `plan simulate` draws; idle time of the trace is that of theory."""
    settings = settings_of(token_prefix, {**MODELS["gpt"], **pipeline(schedule, pp, v, "torch", 0)})
    traces = dict(enumerate(pools(pp).run(trace_rank, settings=settings)))
    layout = PipelineLayout(schedule, pp, cut_chunks([1] * (pp * v)), hidden_size=8)
    assert traces == schedule_orders(layout, 8)
    bubble, theory = play(traces).bubble, (pp - 1) / (v * 8)
    if schedule in ("gpipe", "1f1b", "interleaved"):
        assert bubble == pytest.approx(theory)
    elif schedule != "dualpipev":
        assert bubble < theory


def _groups_rank(counts: list[int]) -> str:
    """Runs on every rank of a pipeline: what is said of these numbers of parameter groups."""
    from megascale.engine.deepspeed_engine import _require_equal_groups

    mesh = build_mesh("cpu", pipeline_parallel_size=2)
    try:
        _require_equal_groups(counts[mesh.pp_rank], mesh)
    except UserError as error:
        return str(error)
    return ""


def test_unequal_parameter_groups_are_refused_at_start(pools: Pools) -> None:
    """DeepSpeed would wait for ever in the first step."""
    assert pools(2).run(_groups_rank, counts=[2, 2]) == ["", ""]
    for said in pools(2).run(_groups_rank, counts=[1, 2]):
        assert "pipeline stages with 1, 2 parameter groups" in said
        assert "parallel.engine=torch" in said
