"""`verify layout` finds and names mistakes in what holds a pipeline together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale.cli.config import all_checks
from megascale.config.load import load_config
from megascale.engine.pipeline import Pipeline
from megascale.engine.torch_engine import TorchEngine
from megascale.verification.compare import FP32, Verdict, compare
from megascale.verification.layout import SINGLE, Layout, legal_layouts, pairwise, parse_layouts
from megascale.verification.record import read_record, record_run
from tests.distributed import Pools
from tests.parity.test_engines import settings_of

MODEL: dict[str, Any] = {
    "model.hidden_size": 40,
    "model.num_layers": 4,
    "model.seq_length": 24,
    "model.dropout": 0.1,
    "train.micro_batch_size": 2,
    "optimizer.name": "sgd",
    "optimizer.lr": 0.1,
    "optimizer.grad_clip": 0.0,
}


def _scaled_by_micro_batches(run: Callable) -> Callable:
    return lambda self, batches, scale, *rest: run(self, batches, scale / len(batches), *rest)


def _wrong_labels(compute: Callable) -> Callable:
    """The last stage looks up the tensors of micro-batch 0 every time."""

    def wrong(self: Pipeline, chunk: Any, received: torch.Tensor, index: int) -> torch.Tensor:
        return compute(self, chunk, received, 0 if chunk.is_last else index)

    return wrong


def _layer_left_out(compute: Callable) -> Callable:
    """The second stage begins one layer late."""

    def wrong(self: Pipeline, chunk: Any, received: torch.Tensor, index: int) -> torch.Tensor:
        if not chunk.is_first:
            chunk = type(chunk)(chunk.begin + 1, chunk.end, chunk.num_layers)
        return compute(self, chunk, received, index)

    return wrong


# bug -> class, method, what it becomes
BUGS: dict[str, tuple[type, str, Callable[[Callable], Callable]]] = {
    "tie not summed": (Pipeline, "sum_copies", lambda right: lambda self, gradient: None),
    "scaled by micro-batches": (Pipeline, "run", _scaled_by_micro_batches),
    "one stage's norm": (TorchEngine, "_norm_groups", lambda right: TorchEngine._shard_groups),
    "tied weight counted twice": (Pipeline, "is_copy", lambda right: lambda self, name: False),
    "labels of another micro-batch": (Pipeline, "compute", _wrong_labels),
    "a layer left out": (Pipeline, "compute", _layer_left_out),
}


@contextlib.contextmanager
def _planted(bug: str) -> Iterator[None]:
    """A mistake in this process, for as long as it lasts."""
    if not bug:
        yield
        return
    owner, name, change = BUGS[bug]
    right = getattr(owner, name)
    setattr(owner, name, change(right))
    try:
        yield
    finally:
        setattr(owner, name, right)


def _record(settings: dict[str, Any], folder: str, layout: Layout, bug: str) -> None:
    """Runs on every rank."""
    config = load_config(
        settings, layout.overrides(), checks=all_checks(), world_size=layout.world_size
    )
    with _planted(bug):
        record_run(config, torch.device("cpu"), 2, Path(folder) / str(layout))


@pytest.fixture(scope="module")
def expected(pools: Pools, token_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    settings = settings_of(token_prefix, MODEL)
    pools(1).run(_record, settings=settings, folder=str(folder), layout=SINGLE, bug="")
    return folder


def _verdict(
    pools: Pools, prefix: Path, folder: Path, tmp_path: Path, layout: Layout, bug: str
) -> Verdict:
    settings = settings_of(prefix, MODEL)
    pools(layout.world_size).run(
        _record, settings=settings, folder=str(tmp_path), layout=layout, bug=bug
    )
    found = read_record(tmp_path / str(layout), layout.world_size)
    reference = read_record(folder / str(SINGLE), 1)
    with contextlib.closing(found), contextlib.closing(reference):
        return compare(found, reference, layout, FP32, micro=4 // layout.dp, lr=0.1)


PLAIN = "pp=2,engine=torch"


@pytest.mark.parametrize("text", [PLAIN, "pp=2,vpp=2,schedule=zbv,zero=1,engine=deepspeed"])
def test_what_is_right_agrees(
    pools: Pools, token_prefix: Path, expected: Path, tmp_path: Path, text: str
) -> None:
    (layout,) = parse_layouts(text)
    verdict = _verdict(pools, token_prefix, expected, tmp_path, layout, "")
    assert verdict.first is None
    assert 0 < verdict.gradient < 1e-5


@pytest.mark.parametrize(
    ("bug", "what", "tensor", "cause"),
    [
        (
            "tie not summed",
            "replicas",
            "embedding.tokens.weight",
            "a weight that pipeline ranks 0 and 1 share are not summed",
        ),
        ("scaled by micro-batches", "gradient", "", "x 1/micro-batches (1/4)"),
        ("one stage's norm", "gradient norm", "", "pipeline rank 1's gradients are missing"),
        (
            "tied weight counted twice",
            "gradient norm",
            "",
            "model.embedding.tokens.weight are counted twice",
        ),
        ("labels of another micro-batch", "output", "", "an input of this module"),
        ("a layer left out", "output", "", "outputs before it agree"),
    ],
)
def test_a_planted_bug_is_found_and_named(
    pools: Pools,
    token_prefix: Path,
    expected: Path,
    tmp_path: Path,
    bug: str,
    what: str,
    tensor: str,
    cause: str,
) -> None:
    (layout,) = parse_layouts(PLAIN)
    first = _verdict(pools, token_prefix, expected, tmp_path, layout, bug).first
    assert first is not None
    assert (first.step, first.what) == (1, what)
    assert first.tensor.endswith(tensor)
    assert cause in first.cause


def test_pairwise_covers_every_pair_with_few_layouts(token_prefix: Path) -> None:
    settings = settings_of(token_prefix, {**MODEL, "train.micro_batch_size": 1})

    def check(layout: Layout) -> None:
        load_config(settings, layout.overrides(), checks=all_checks(), world_size=4)

    every = list(legal_layouts(4, check))
    few = pairwise(every)
    assert set(few) <= set(every)
    assert len(few) < len(every) / 10

    def pairs(layouts: list[Layout]) -> set[tuple[object, ...]]:
        return {
            (a, getattr(one, a), b, getattr(one, b))
            for one in layouts
            for a in vars(one)
            for b in vars(one)
        }

    assert pairs(few) == pairs(every)
