"""Bugs outside of the cut layers are found and named, too: in what surrounds them.

The loss of a cut vocabulary, the seams of a cut sequence, recomputation, the sum of the norm, and
what an optimizer does with a right gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megascale.cli.config import all_checks
from megascale.config.load import load_config
from megascale.engine import torch_engine
from megascale.engine.deepspeed_engine import DeepSpeedEngine
from megascale.engine.torch_engine import ReplicatedEngine, ShardedEngine, TorchEngine
from megascale.parallel import context_parallel, linear_cross_entropy, ring_attention
from megascale.verification.compare import FP32, compare
from megascale.verification.layout import SINGLE, Layout, parse_layouts
from megascale.verification.record import read_record, record_run
from tests.distributed import Pools
from tests.integration.test_planted_bugs import DOWN, MODEL, Patch, _on_module, _patching
from tests.parity.test_engines import settings_of

SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {**MODEL, "optimizer.grad_clip": 0.5},
    "adamw": {**MODEL, "optimizer.name": "adamw", "optimizer.lr": 1e-3, "optimizer.eps": 1e-6},
}
ATTENTION, NORM = "model.layers.0.attention.output", "model.layers.0.mlp_norm"


def _other_target(patch: Patch) -> None:
    """Each rank takes a logit of its own for a label that another rank holds."""
    right = linear_cross_entropy._losses

    def losses(log_z: Any, target: Any, total: Any, elsewhere: torch.Tensor, terms: Any) -> Any:
        return right(log_z, target, total, torch.zeros_like(elsewhere), terms)

    patch(linear_cross_entropy, "_losses", losses)


def _heads_of_other_ranks(patch: Patch) -> None:
    right = context_parallel._heads_to_tokens
    patch(context_parallel, "_heads_to_tokens", lambda x, group: right(x, group).flip(1))


def _keys_lose_a_round(patch: Patch) -> None:
    """The backward leaves out what other ranks' queries give to this rank's keys and values."""
    right = ring_attention._Tile.backward

    def backward(self: Any, *args: Any) -> None:
        *before, grad_kv = args
        right(self, *before, grad_kv if self.masked else torch.zeros_like(grad_kv))

    patch(ring_attention._Tile, "backward", backward)


def _other_mask_again(patch: Patch) -> None:
    """What is computed again in the backward drops other elements than the forward did."""

    def plant(module: nn.Module) -> None:
        dropout: Any = module.get_submodule("model.layers.1.mlp_dropout")
        forward, calls = dropout.forward, [0]

        def planted(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            dropout.site += 1000 * (calls[0] % 2 == 0)
            try:
                return forward(*args, **kwargs)
            finally:
                dropout.site -= 1000 * (calls[0] % 2 == 0)

        dropout.forward = planted

    _on_module(patch, plant)


def _norm_of_copies(patch: Patch) -> None:
    patch(TorchEngine, "_is_counted", lambda self, name: True)


def _norm_of_a_shard(patch: Patch) -> None:
    patch(ShardedEngine, "_shard_groups", lambda self: [])


def _clips_by_its_own_norm(patch: Patch) -> None:
    right = torch_engine.clip_

    def clip(gradients: list[torch.Tensor], norm: float, limit: float) -> None:
        own = torch.cat([grad.flatten() for grad in gradients]).norm().item()
        right(gradients, own, limit)

    patch(torch_engine, "clip_", clip)


def _learning_rate_of_its_own(patch: Patch) -> None:
    for kind in (ReplicatedEngine, ShardedEngine):
        right: Callable[..., Any] = kind.step
        patch(kind, "step", lambda self, lr, f=right: f(self, lr * (1 + 0.1 * dist.get_rank())))


def _weight_is_not_gathered(patch: Patch) -> None:
    """Rank 1 steps on its master and computes on with the weight of the step before."""
    right = DeepSpeedEngine.step

    def step(self: DeepSpeedEngine, lr: float) -> Any:
        weight = dict(self.module.named_parameters())[f"{DOWN}.weight"]
        before = weight.detach().clone()
        outcome = right(self, lr)
        if dist.get_rank() == 1:
            weight.data.copy_(before)
        return outcome

    patch(DeepSpeedEngine, "step", step)


def _gradient_is_lost(patch: Patch) -> None:
    """One weight's gradient of the last backward never comes."""
    right = ShardedEngine._gradients

    def gradients(self: ShardedEngine) -> dict[str, torch.Tensor]:
        out = right(self)
        return {name: grad * (not name.startswith(NORM)) for name, grad in out.items()}

    patch(ShardedEngine, "_gradients", gradients)


PLANTS: dict[str, Callable[[Patch], None]] = {
    "nothing": lambda patch: None,
    "target of another rank": _other_target,
    "heads of other ranks": _heads_of_other_ranks,
    "keys lose a round": _keys_lose_a_round,
    "another mask again": _other_mask_again,
    "norm of copies": _norm_of_copies,
    "norm of a shard": _norm_of_a_shard,
    "own norm in the clipping": _clips_by_its_own_norm,
    "own learning rate": _learning_rate_of_its_own,
    "stale weight": _weight_is_not_gathered,
    "lost gradient": _gradient_is_lost,
}
SHARDS, STAGES = "dp=2,zero=2,engine=torch", "pp=2,engine=torch"
ULYSSES = "cp=2,method=ulysses,engine=torch"
SLOWER = "the gradient is right and the update is not: rank 1 x 1.1: a learning rate"

# bug, layout, step, what, place, cause
BUGS: list[tuple[str, str, int, str, str, str]] = [
    *(("nothing", layout, 0, "", "", "") for layout in (SHARDS, STAGES)),
    ("target of another rank", "tp=2,engine=torch", 1, "loss", "", "its own sums, its labels"),
    (
        "heads of other ranks",
        "cp=2,method=ulysses,engine=torch",
        1,
        "output",
        ATTENTION,
        "at a seam",
    ),
    ("keys lose a round", "cp=2,method=ring,engine=torch", 1, "gradient", "1.attention.value", ""),
    (
        "another mask again",
        "tp=2,engine=torch,recompute=full",
        1,
        "gradient",
        "model.layers.1.mlp.down",
        "computes again",
    ),
    ("norm of copies", "tp=2,engine=torch", 1, "gradient norm", "", "2 tensor-parallel ranks hold"),
    ("norm of a shard", SHARDS, 1, "gradient norm", "", "the sum over the dp ranks is missing"),
    ("own norm in the clipping", SHARDS, 1, "weight", "", "norm in the clipping"),
    ("own learning rate", SHARDS, 1, "weight", "", SLOWER),
    ("own learning rate", STAGES, 1, "weight", "final_norm", SLOWER),
    ("stale weight", "dp=2,zero=1,engine=deepspeed", 2, "output", DOWN, "a stale weight"),
    ("lost gradient", "dp=2,zero=3,engine=torch", 1, "gradient", NORM, "scaled by 0"),
]


def _record(settings: dict[str, Any], folder: str, layout: Layout, bug: str) -> None:
    """Runs on every rank."""
    config = load_config(
        settings, layout.overrides(), checks=all_checks(), world_size=layout.world_size
    )
    with _patching() as patch:
        PLANTS[bug](patch)
        record_run(config, torch.device("cpu"), 2, Path(folder) / str(layout))


@pytest.fixture(scope="module")
def expected(pools: Pools, token_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere")
    for name, changes in SETTINGS.items():
        settings, out = settings_of(token_prefix, changes), str(folder / name)
        pools(1).run(_record, settings=settings, folder=out, layout=SINGLE, bug="nothing")
    return folder


@pytest.mark.parametrize(
    ("bug", "text", "step", "what", "place", "cause"), BUGS, ids=[f"{b[0]}-{b[1]}" for b in BUGS]
)
def test_a_planted_bug_is_found_and_named(
    pools: Pools,
    token_prefix: Path,
    expected: Path,
    tmp_path: Path,
    bug: str,
    text: str,
    step: int,
    what: str,
    place: str,
    cause: str,
) -> None:
    (layout,) = parse_layouts(text)
    # with SGD a tenth of an update is within what rounding may do to a weight
    optimizer = "adamw" if bug == "own learning rate" else "sgd"
    settings = settings_of(token_prefix, SETTINGS[optimizer])
    pools(2).run(_record, settings=settings, folder=str(tmp_path), layout=layout, bug=bug)
    found = read_record(tmp_path / str(layout), 2)
    reference = read_record(expected / optimizer / str(SINGLE), 1)
    with contextlib.closing(found), contextlib.closing(reference):
        assert min(reference.norms) > 0.5, "clipping must be active"
        lr = SETTINGS[optimizer]["optimizer.lr"]
        first = compare(found, reference, layout, FP32, micro=2 // layout.dp, lr=lr).first
    if not what:
        assert first is None, first
        return
    assert first is not None
    assert (first.step, first.what) == (step, what), first
    assert place in first.tensor, first
    assert cause in first.cause, first
