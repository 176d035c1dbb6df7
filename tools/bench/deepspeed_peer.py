"""DeepSpeed's own save_checkpoint and load_checkpoint, to measure beside ours."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch


class _Weights(torch.nn.Module):
    """Parameters and nothing to compute."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(map(torch.nn.Parameter, weights.values()))


def works(state: dict[str, dict[str, torch.Tensor]], folder: Path) -> dict[str, Callable[[], None]]:
    """Save and load of an engine without ZeRO whose module and AdamW hold `state`.

    Without ZeRO its files hold exactly the weights and both moments: as many bytes as ours.
    """
    module = _Weights({name: kinds["master"] for name, kinds in state.items()})
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for parameter, kinds in zip(module.weights, state.values(), strict=True):
        moments = {kind: tensor for kind, tensor in kinds.items() if kind != "master"}
        optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 0},
        "wall_clock_breakdown": False,
    }
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at first use
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )
    path = str(folder / "deepspeed")

    def save() -> None:
        engine.save_checkpoint(path, tag="1")

    def load() -> None:
        engine.load_checkpoint(path, tag="1")

    return {"DeepSpeed save_checkpoint": save, "DeepSpeed load_checkpoint": load}
