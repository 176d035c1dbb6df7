"""The configs of configs/: valid, and of the published sizes, counted without any memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megascale.cli.config import all_checks
from megascale.config.load import load_config
from megascale.config.schema import Config
from megascale.models.flops import num_parameters
from megascale.training.tasks.gpt import gpt_config
from megascale.training.tasks.registry import build_task

FOLDER = Path(__file__).resolve().parents[2] / "configs"

# parameters as published, and how many digits of them are
PUBLISHED = {
    "gpt2_small": (124_439_808, 9),
    "gpt2_medium": (354_823_168, 9),
    "gpt2_large": (774_030_080, 9),
    "gpt2_xl": (1_557_611_200, 10),
    "gpt_1b_zero3": (1.3e9, 2),
    "gpt_13b_tp_pp": (13e9, 2),
    "llama_8b": (8_030_261_248, 10),
    "llama_70b": (70_553_706_496, 11),
    "gpt_175b": (175e9, 3),
    "gpt_1t": (1008e9, 4),
}


def load(name: str) -> Config:
    return load_config(FOLDER / f"{name}.yaml", checks=())


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_config_is_valid(path: Path) -> None:
    config = load_config(path, checks=())
    ranks = 2 * config.parallel.model_parallel_size
    load_config(path, checks=all_checks(), world_size=ranks)
    model = config.model
    parallel = config.parallel
    stages = parallel.pipeline_parallel_size * parallel.virtual_pipeline_stages
    assert model.num_layers % stages == 0
    for size in (model.num_attention_heads, model.resolved_num_kv_heads, model.hidden_size):
        assert size % parallel.tensor_parallel_size == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_count(name: str) -> None:
    config = load(name)
    with torch.device("meta"):
        module = build_task(config).build_module()
    counted = sum(parameter.numel() for parameter in module.parameters())
    assert counted == num_parameters(gpt_config(config.model))
    published, digits = PUBLISHED[name]
    assert float(f"{counted:.{digits - 1}e}") == pytest.approx(published, rel=1e-12)
