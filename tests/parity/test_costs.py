"""What a step sends and what a rank holds are the formulas of megascale.planner, counted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megascale.config.load import load_config
from megascale.parallel.tensor_parallel import Placement
from megascale.planner.communication import (
    ContextTraffic,
    bert_traffic,
    context_volumes,
    data_volumes,
    gpt_traffic,
    pipeline_volumes,
    tensor_volumes,
)
from megascale.planner.memory import FP32, StateBytes, state_bytes
from megascale.training.state import TrainState
from megascale.training.step import train_step
from megascale.training.tasks.bert import bert_config
from megascale.training.tasks.gpt import gpt_config
from megascale.verification.collectives import CollectiveCounter
from megascale.verification.storages import LiveBytes, all_live_bytes, live_bytes
from tests.bert_data import make_bert_dataset
from tests.distributed import Pools
from tests.parity.harness import set_up
from tests.parity.test_engines import settings_of

BATCH, MICRO, WIDTH = 8, 2, 40
KEPT_WHOLE = 10 * WIDTH  # what the DeepSpeed engine sets
GPT: dict[str, Any] = {
    "model.hidden_size": WIDTH,
    "model.seq_length": 24,
    "train.micro_batch_size": MICRO,
    "train.global_batch_size": BATCH,
}
GEMMA = {
    **GPT,
    "model.position_embedding": "rope",
    "model.norm": "rmsnorm",
    "model.activation": "swiglu",
    "model.bias": False,
    "model.qk_norm": True,
    "model.norm_placement": "sandwich",
    "model.tie_word_embeddings": False,
    "model.dropout": 0.1,
    "train.label_smoothing": 0.1,
}
BERT = {
    **GPT,
    "model.family": "bert",
    "model.activation": "gelu",
    "model.vocab_size": 281,
    "data.sentence_objective": "nsp",
    "data.mask_probability": 0.4,
}


def _step(settings: dict[str, Any]) -> dict[str, Any]:
    """Runs on every rank: costs of the second step (the first builds states and buffers)."""
    before = all_live_bytes()
    setup = set_up(settings)
    engine, state = setup.engine._engine, TrainState()
    train_step(setup.parts, state)
    setup.engine.gradients.clear()
    peak, update = [], engine.step

    def step(lr: float) -> Any:
        peak.append(all_live_bytes() - before)
        return update(lr)

    engine.step = step
    batches = setup.parts.loader.load(state.samples_seen)
    masked = [int((batch["labels"] >= 0).sum()) for batch in batches]
    del batches
    places = engine.placements.values()
    with CollectiveCounter(setup.mesh) as counter:
        train_step(setup.parts, state)
    setup.engine.gradients.clear()
    between = all_live_bytes() - before
    seen = {
        "bytes": dict(counter.bytes),
        "live": live_bytes(engine),
        "peak": peak[0],
        "between": between,
        "masked": masked,
        "shapes": [_shape(place) for place in places],
        "dp_rank": setup.mesh.dp_rank,
        "layout": getattr(getattr(engine, "_pipeline", None), "_layout", None),
        "elements": {name: math.prod(_shape(place)) for name, place in engine.placements.items()},
    }
    del engine.step
    setup.engine.close()
    return seen


def _shape(place: Placement) -> tuple[int, ...]:
    return tuple(end - begin for begin, end in place.box)


def _parallel(engine: str, stage: int, tp: int, sp: bool, **more: Any) -> dict[str, Any]:
    return {
        "parallel.engine": engine,
        "parallel.zero_stage": stage,
        "parallel.tensor_parallel_size": tp,
        "parallel.sequence_parallel": sp,
        **{name.replace("__", "."): value for name, value in more.items()},
    }


@pytest.fixture(scope="module")
def bert_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert_dataset(tmp_path_factory.mktemp("bert"))


# world, model, engine, stage, tp, sp, recomputation, precision
LAYOUTS = [
    (2, "gpt", "torch", 0, 2, False, "none", "fp32"),
    (2, "gpt", "torch", 0, 2, True, "full", "fp32"),
    (2, "gemma", "torch", 0, 2, False, "full", "fp32"),
    (2, "gemma", "torch", 0, 2, True, "selective", "bf16"),
    (2, "bert", "torch", 0, 2, False, "none", "fp32"),
    (2, "bert", "torch", 0, 2, True, "full", "fp32"),
    *((2, "gpt", "torch", stage, 1, False, "none", "fp32") for stage in range(4)),
    *((2, "gpt", "deepspeed", stage, 1, False, "none", "fp32") for stage in (1, 2, 3)),
    (2, "gpt", "torch", 0, 1, False, "none", "bf16"),
    (2, "gpt", "torch", 3, 1, False, "none", "bf16"),
    (2, "gpt", "deepspeed", 1, 1, False, "none", "bf16"),
    (2, "gpt", "deepspeed", 3, 1, False, "none", "bf16"),
    (4, "gpt", "torch", 2, 2, True, "none", "fp32"),
    (4, "gpt", "deepspeed", 3, 2, True, "none", "fp32"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout)))
def test_costs_are_the_formulas(
    pools: Pools, token_prefix: Path, bert_data: Path, layout: tuple
) -> None:
    world, model, engine, stage, tp, sp, mode, dtype = layout
    changes = {"gpt": GPT, "gemma": GEMMA, "bert": BERT}[model]
    parallel = _parallel(engine, stage, tp, sp, parallel__activation_recomputation=mode)
    settings = settings_of(
        bert_data if model == "bert" else token_prefix,
        {**changes, **parallel, "precision.dtype": dtype},
    )
    ranks = pools(world).run(_step, settings=settings)
    for seen in ranks:
        _assert_volumes(seen, settings, world // tp)
        _assert_bytes(seen, settings, world // tp)


def _assert_volumes(seen: dict[str, Any], settings: dict[str, Any], dp: int) -> None:
    parallel, weight = settings["parallel"], _weight_bytes(settings)
    micro_batches = BATCH // (MICRO * dp)
    expected: dict[tuple[str, str], float] = {}
    if parallel["tensor_parallel_size"] > 1:
        for masked in seen["masked"]:
            volumes = tensor_volumes(
                _traffic(settings, masked),
                micro_batch_size=MICRO,
                num_micro_batches=1,
                sequence_parallel=parallel["sequence_parallel"],
                recompute=parallel["activation_recomputation"],
                element_bytes=weight,
            )
            for kind, size in volumes.items():
                expected["tp", kind] = expected.get(("tp", kind), 0) + size
    volumes = data_volumes(
        seen["shapes"],
        engine=parallel["engine"],
        stage=parallel["zero_stage"],
        dp_size=dp,
        num_micro_batches=micro_batches,
        element_bytes=weight,
        kept_whole=KEPT_WHOLE,
    )
    expected |= {("dp", kind): size for kind, size in volumes.items()}
    found = {key: size for key, size in seen["bytes"].items() if key[1] != "scalar"}
    assert found.keys() == expected.keys()
    for key, size in expected.items():
        assert abs(found[key] - size) <= 0.01 * size, (key, found[key], size)


# method, kv heads, recomputation, further settings
CONTEXT = [
    ("ulysses", 4, "none", {}),
    ("ulysses", 1, "full", {"precision.dtype": "bf16"}),
    ("ring", 2, "none", {}),
    ("ring", 4, "selective", {"precision.dtype": "bf16"}),
    ("ring", 4, "full", {}),
]


@pytest.mark.parametrize("case", CONTEXT, ids=lambda case: "-".join(map(str, case[:3])))
def test_context_parallelism_sends_what_the_formula_says(
    pools: Pools, token_prefix: Path, case: tuple
) -> None:
    method, kv_heads, mode, more = case
    settings = settings_of(
        token_prefix,
        {
            **GPT,
            "model.num_kv_heads": kv_heads,
            "model.position_embedding": "rope",
            "parallel.engine": "torch",
            "parallel.context_parallel_size": 2,
            "parallel.context_parallel_method": method,
            "parallel.activation_recomputation": mode,
            **more,
        },
    )
    model = load_config(settings, world_size=2).model
    traffic = ContextTraffic(
        num_layers=model.num_layers,
        tokens=MICRO * 24 // 2,
        heads=model.num_attention_heads,
        kv_heads=kv_heads,
        head_dim=WIDTH // model.num_attention_heads,
    )
    volumes = context_volumes(
        traffic,
        method=method,
        cp_size=2,
        num_micro_batches=BATCH // MICRO,
        recompute=mode,
        element_bytes=_weight_bytes(settings),
    )
    for seen in pools(2).run(_step, settings=settings):
        gradients = FP32 * sum(map(math.prod, seen["shapes"]))
        expected = {("cp", kind): size for kind, size in volumes.items()}
        expected["cp", "all_reduce"] = gradients
        found = {key: size for key, size in seen["bytes"].items() if key[1] != "scalar"}
        assert found == expected


# world, tp, schedule, stages a rank, tied
PIPELINES = [
    (2, 1, "1f1b", 1, True),
    (2, 1, "interleaved", 2, False),
    (2, 1, "zbv", 2, True),
    (4, 2, "1f1b", 1, True),
]


@pytest.mark.parametrize("case", PIPELINES, ids=lambda case: "-".join(map(str, case)))
def test_a_pipeline_sends_what_the_formula_says(
    pools: Pools, token_prefix: Path, case: tuple
) -> None:
    world, tp, schedule, stages, tied = case
    parallel = _parallel("torch", 0, tp, tp > 1)
    settings = settings_of(
        token_prefix,
        {
            **GPT,
            **parallel,
            "model.num_layers": 4,
            "model.tie_word_embeddings": tied,
            "parallel.pipeline_parallel_size": 2,
            "parallel.pipeline_schedule": schedule,
            "parallel.virtual_pipeline_stages": stages,
        },
    )
    ranks = pools(world).run(_step, settings=settings)
    for rank, seen in enumerate(ranks):
        volumes = pipeline_volumes(
            seen["layout"],
            rank // tp,
            activation=MICRO * 24 * WIDTH // tp,
            num_micro_batches=BATCH // MICRO,
            element_bytes=FP32,
            tied_elements=seen["elements"].get(seen["layout"].tied_weight, 0),
        )
        found = {key: n for key, n in seen["bytes"].items() if key[0] == "pp" and key[1] == "send"}
        assert found == {("pp", kind): size for kind, size in volumes.items()}


def _traffic(settings: dict[str, Any], masked: int) -> Any:
    model = load_config(settings, world_size=None).model
    smoothing = settings["train"].get("label_smoothing", 0) > 0
    if model.family == "bert":
        return bert_traffic(bert_config(model), masked, smoothing)
    return gpt_traffic(gpt_config(model), MICRO, smoothing)


def _assert_bytes(seen: dict[str, Any], settings: dict[str, Any], dp: int) -> None:
    parallel = settings["parallel"]
    expected = state_bytes(
        seen["shapes"],
        engine=parallel["engine"],
        stage=parallel["zero_stage"],
        weight_bytes=_weight_bytes(settings),
        dp_size=dp,
        dp_rank=seen["dp_rank"],
        kept_whole=KEPT_WHOLE,
    )
    live: LiveBytes = seen["live"]
    for name in ("weights", "masters", "states"):
        extra = getattr(live, name) - getattr(expected, name)
        assert 0 <= extra <= expected.padding, (name, live, expected)
    held = live.weights + live.masters + live.states
    assert seen["peak"] - held <= expected.gradients + _surroundings(seen), (seen, expected)
    if parallel["engine"] == "torch" and (parallel["zero_stage"] or expected.masters):
        # between two steps there are no gradients; of fp32 weights autograd's own stay
        assert seen["between"] - held <= _surroundings(seen), (seen, expected)


def _surroundings(seen: dict[str, Any]) -> int:
    """The micro-batches of the step, step counters and losses: not the engine's."""
    samples = 24 * 8 * BATCH * 6
    return samples + 4 * 4 * len(seen["shapes"]) + 1024


def _weight_bytes(settings: dict[str, Any]) -> int:
    return 2 if settings.get("precision", {}).get("dtype") == "bf16" else 4


def test_the_formulas_at_a_size_that_no_test_can_hold() -> None:
    """7e9 parameters, Adam, bf16: bytes a parameter of arXiv:1910.02054, figure 1, on 64 ranks."""
    shapes = [(7_000_000, 1000)]
    numel = math.prod(shapes[0])

    def per_parameter(engine: Any, stage: int) -> float:
        found: StateBytes = state_bytes(
            shapes, engine=engine, stage=stage, weight_bytes=2, dp_size=64
        )
        return (found.weights + found.masters + found.states) / numel

    assert per_parameter("torch", 0) == 2 + 12
    assert per_parameter("deepspeed", 1) == 2 + 12 / 64
    assert per_parameter("deepspeed", 3) == 14 / 64
    assert per_parameter("torch", 3) == 12 / 64
