"""Bugs planted at any module are found by the prover, and named: where, and what they look like.

Each is planted in the ranks of a pool, for one recorded run, and taken out again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megascale.cli.config import all_checks
from megascale.config.load import load_config
from megascale.engine.torch_engine import ReplicatedEngine
from megascale.parallel import layers, tensor_parallel
from megascale.parallel.collectives import leave_sequence, own_slice
from megascale.parallel.gradient_reducer import GradientReducer
from megascale.training import assemble
from megascale.verification.compare import FP32, Difference, compare
from megascale.verification.layout import SINGLE, Layout
from megascale.verification.record import read_record, record_run
from tests.distributed import Pools
from tests.parity.test_engines import settings_of

MODEL = {
    "model.hidden_size": 24,
    "model.seq_length": 16,
    "model.dropout": 0.1,
    "train.micro_batch_size": 2,
    "train.global_batch_size": 4,
    "optimizer.name": "sgd",
    "optimizer.lr": 0.1,
    "optimizer.grad_clip": 0.0,
}
TENSOR = Layout(tp=2, engine="torch")
SEQUENCE = Layout(tp=2, sp=1, engine="torch")
REPLICAS = Layout(dp=2, engine="torch")

Patch = Callable[[Any, str, Any], None]
TOKENS, POSITIONS = "model.embedding.tokens", "model.embedding.positions"
OUTPUT, DOWN = "model.layers.0.attention.output", "model.layers.1.mlp.down"
MLP_NORM, FINAL_NORM = "model.layers.0.mlp_norm", "model.final_norm"


def _reduction(patch: Patch, kind: str, path: str) -> None:
    """Drop or double what the module at `path` reduces, and nothing else."""
    drop = {
        "reduce_from_group": lambda x, group: x,
        "scatter_sequence": own_slice,
        "copy_to_group": lambda x, group: x,
    }

    def plant(module: nn.Module) -> None:
        target = module.get_submodule(path)
        forward, right = target.forward, {name: getattr(layers, name) for name in drop}
        double = {
            "reduce_from_group": lambda x, g: 2 * right["reduce_from_group"](x, g),
            "scatter_sequence": lambda x, g: 2 * right["scatter_sequence"](x, g),
            "copy_to_group": lambda x, g: right["copy_to_group"](right["copy_to_group"](x, g), g),
        }
        # a row-parallel layer's bias is summed, too: that is not the reduction that is meant
        names = drop if type(target).__name__ != "RowParallelLinear" else list(drop)[:2]

        def planted(*args: Any) -> Any:
            for name in names:
                setattr(layers, name, (drop if kind == "dropped" else double)[name])
            try:
                return forward(*args)
            finally:
                for name in names:
                    setattr(layers, name, right[name])

        target.forward = planted

    _on_module(patch, plant)


def _bias_sum(patch: Patch, kind: str, path: str) -> None:
    """Do not sum the gradient of a row-parallel layer's bias, which sees a part of T only."""

    def plant(module: nn.Module) -> None:
        target = module.get_submodule(path)
        forward, right = target.forward, layers.copy_to_group

        def planted(*args: Any) -> Any:
            layers.copy_to_group = lambda x, group: x
            try:
                return forward(*args)
            finally:
                layers.copy_to_group = right

        target.forward = planted

    _on_module(patch, plant)


def _head(patch: Patch, kind: str, path: str) -> None:
    copy, gather = tensor_parallel.copy_to_group, tensor_parallel.gather_sequence
    if kind == "dropped":
        patch(tensor_parallel, "copy_to_group", lambda x, group: x)
        patch(tensor_parallel, "gather_sequence", leave_sequence)
    else:
        patch(tensor_parallel, "copy_to_group", lambda x, group: copy(copy(x, group), group))
        patch(tensor_parallel, "gather_sequence", lambda x, group: gather(copy(x, group), group))


def _columns(patch: Patch, kind: str, path: str) -> None:
    right = layers._start_sum

    class Done:
        def wait(self) -> None: ...

    def planted(grad: torch.Tensor, group: Any, sequence: bool) -> Any:
        if kind == "doubled":
            return right(2 * grad, group, sequence)
        summed = own_slice(grad, group).transpose(0, 1) if sequence else grad
        return Done(), summed.contiguous()

    patch(layers, "_start_sum", planted)


def _gather(patch: Patch, kind: str, path: str) -> None:
    """Put the parts of T together in the wrong order."""
    right = layers.all_gather_sequence
    patch(layers, "all_gather_sequence", lambda x, group: right(x, group).flip(1))


def _scale(patch: Patch, kind: str, path: str) -> None:
    """Multiply finished gradients: per replica, or per micro-batch."""
    right = GradientReducer.finish

    def planted(self: GradientReducer) -> None:
        right(self)
        for bucket in self._buckets:
            bucket.buffer().mul_({"averaged": 0.5, "not divided": 2.0}[kind])

    patch(GradientReducer, "finish", planted)


def _mask(patch: Patch, kind: str, path: str) -> None:
    """Ranks share a mask that must differ, or have masks of their own that must be the same."""

    def plant(module: nn.Module) -> None:
        dropout: Any = module.get_submodule(path)
        if kind == "shared":
            dropout._shards.clear()
        else:
            dropout.site += 1000 * dist.get_rank()

    _on_module(patch, plant)


def _slice(patch: Patch, kind: str, path: str) -> None:
    """Rank 1 starts from other rows or columns than its own."""

    def plant(module: nn.Module) -> None:
        weight = module.get_submodule(path).weight
        assert isinstance(weight, torch.Tensor)
        if dist.get_rank() == 1:
            weight.data.copy_(weight.data.roll(1, dims=1 if kind == "columns" else 0))

    _on_module(patch, plant)


def _interval(patch: Patch, kind: str, path: str) -> None:
    right = tensor_parallel.interval

    def shifted(length: int, unit: int, rank: int, size: int, name: str) -> tuple[int, int]:
        begin, end = right(length, unit, rank, size, name)
        return (begin - 1, end - 1) if rank == 1 and name.startswith(path) else (begin, end)

    patch(tensor_parallel, "interval", shifted)


def _stale(patch: Patch, kind: str, path: str) -> None:
    """Rank 1 does not update its copy of a weight that every rank has."""
    right = ReplicatedEngine.step

    def planted(self: ReplicatedEngine, lr: float) -> Any:
        weight = dict(self.module.named_parameters())[f"{path}.weight"]
        before = weight.detach().clone()
        outcome = right(self, lr)
        if dist.get_rank() == 1:
            weight.data.copy_(before)
        return outcome

    patch(ReplicatedEngine, "step", planted)


def _on_module(patch: Patch, plant: Callable[[nn.Module], None]) -> None:
    """Run `plant` on the finished module, with its initial weights."""
    right = assemble.assemble_engine

    def planted(*args: Any) -> Any:
        engine = right(*args)
        plant(engine.module)
        return engine

    patch(assemble, "assemble_engine", planted)


@contextlib.contextmanager
def _patching() -> Iterator[Patch]:
    undo: list[tuple[Any, str, Any]] = []

    def patch(target: Any, name: str, value: Any) -> None:
        undo.append((target, name, getattr(target, name)))
        setattr(target, name, value)

    try:
        yield patch
    finally:
        for target, name, value in reversed(undo):
            setattr(target, name, value)


def _record(
    settings: dict[str, Any], folder: str, layout: Layout, bug: tuple[str, str, str] | None
) -> None:
    """Runs on every rank."""
    with _patching() as patch:
        if bug is not None:
            plant, kind, path = bug
            PLANTS[plant](patch, kind, path)
        config = load_config(
            settings, layout.overrides(), checks=all_checks(), world_size=layout.world_size
        )
        record_run(config, torch.device("cpu"), 1, Path(folder) / str(layout))


PLANTS: dict[str, Callable[[Patch, str, str], None]] = {
    "reduction": _reduction,
    "bias sum": _bias_sum,
    "head": _head,
    "columns": _columns,
    "gather": _gather,
    "scale": _scale,
    "mask": _mask,
    "slice": _slice,
    "interval": _interval,
    "stale": _stale,
}
ALONE = "all outputs before it agree"
COPIES = "copies on different ranks differ"

# layout, (plant, kind, path), what is found, in which tensor or module, cause
BUGS: list[tuple[Layout, tuple[str, str, str], str, str, str]] = [
    *(
        (layout, ("reduction", kind, path), "output", path, cause)
        for layout in (TENSOR, SEQUENCE)
        for path in (TOKENS, OUTPUT, DOWN)
        for kind, cause in (("dropped", ALONE), ("doubled", "x tp (2): a doubled reduction"))
    ),
    *(
        (SEQUENCE, ("reduction", kind, path), what, path, cause)
        for path in (POSITIONS, MLP_NORM, FINAL_NORM)
        for kind, what, cause in (
            ("dropped", "replicas", COPIES),
            ("doubled", "gradient", "x tp (2): a doubled reduction"),
        )
    ),
    (SEQUENCE, ("bias sum", "dropped", OUTPUT), "replicas", OUTPUT + ".bias", COPIES),
    (TENSOR, ("head", "dropped", ""), "replicas", FINAL_NORM, COPIES),
    (TENSOR, ("head", "doubled", ""), "gradient", FINAL_NORM, "x tp (2)"),
    (SEQUENCE, ("head", "doubled", ""), "gradient", FINAL_NORM, "x tp (2)"),
    (TENSOR, ("columns", "dropped", ""), "replicas", "layers.1.mlp_norm", COPIES),
    (TENSOR, ("columns", "doubled", ""), "gradient", "layers.1.mlp_norm", "x tp (2)"),
    (SEQUENCE, ("columns", "doubled", ""), "gradient", "layers.1.mlp_norm", "x tp (2)"),
    (SEQUENCE, ("gather", "reversed", ""), "output", "model.layers.0.attention", ALONE),
    (REPLICAS, ("scale", "averaged", ""), "gradient", FINAL_NORM, "x 1/dp (1/2)"),
    (TENSOR, ("scale", "not divided", ""), "gradient", FINAL_NORM, "x micro-batches (2)"),
    *(
        # attention draws the masks of its probabilities block by block itself
        (layout, ("mask", kind, path), "output", path.replace("core.dropout", "core"), ALONE)
        for layout, kind, path in (
            (TENSOR, "shared", "model.layers.1.attention.core.dropout"),
            (SEQUENCE, "shared", "model.layers.0.mlp_dropout"),
            (SEQUENCE, "shared", "model.embedding.dropout"),
            (TENSOR, "own", "model.layers.0.attention_dropout"),
            (TENSOR, "own", "model.embedding.dropout"),
        )
    ),
    *(
        (TENSOR, ("slice", kind, path), "initial weight", path, "only the slice of rank(s) 1")
        for kind, path in (
            ("rows", TOKENS),
            ("rows", "model.layers.1.attention.key"),
            ("columns", OUTPUT),
            ("rows", "model.layers.0.mlp.up"),
            ("columns", DOWN),
        )
    ),
    (
        TENSOR,
        ("interval", "shifted", "model.layers.0.mlp.up"),
        "initial weight",
        "model.layers.0.mlp.up",
        "held by no rank",
    ),
    (TENSOR, ("slice", "rows", MLP_NORM), "", "", ""),  # rolled ones: nothing changes
    (REPLICAS, ("stale", "", DOWN), "replicas", DOWN, COPIES),
    (TENSOR, ("stale", "", POSITIONS), "replicas", POSITIONS, COPIES),
    (SEQUENCE, ("stale", "", FINAL_NORM), "replicas", FINAL_NORM, COPIES),
]


@pytest.fixture(scope="module")
def expected(pools: Pools, token_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    settings = settings_of(token_prefix, MODEL)
    pools(1).run(_record, settings=settings, folder=str(folder), layout=SINGLE, bug=None)
    return folder


@pytest.mark.parametrize(
    ("layout", "bug", "what", "place", "cause"),
    BUGS,
    ids=[f"{layout} {' '.join(bug)}" for layout, bug, *_ in BUGS],
)
def test_a_planted_bug_is_found_and_named(
    pools: Pools,
    token_prefix: Path,
    expected: Path,
    tmp_path: Path,
    layout: Layout,
    bug: tuple[str, str, str],
    what: str,
    place: str,
    cause: str,
) -> None:
    settings = settings_of(token_prefix, MODEL)
    pools(2).run(_record, settings=settings, folder=str(tmp_path), layout=layout, bug=bug)
    found = read_record(tmp_path / str(layout), 2)
    reference = read_record(expected / str(SINGLE), 1)
    with contextlib.closing(found), contextlib.closing(reference):
        micro = 2 // layout.dp
        first: Difference | None = compare(found, reference, layout, FP32, micro, lr=0.1).first
    if not what:
        assert first is None
        return
    assert first is not None
    assert first.step == 1
    assert first.what == what
    assert place in first.tensor
    assert cause in first.cause
