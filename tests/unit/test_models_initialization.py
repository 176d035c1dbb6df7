from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch

from megascale.models.gpt import GPT, GPTConfig, build_layer
from megascale.models.initialization import fill_initial, initial_value, parameter_seed
from tests.initial import initialize

CONFIG = GPTConfig(
    vocab_size=101,
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    num_kv_heads=4,
    ffn_hidden_size=96,
    seq_length=32,
)


def initialized(seed: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    with torch.device(device):
        model = GPT(CONFIG)
    if device == "meta":
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
    initialize(model, seed, init_std=0.02, num_layers=2)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_values_depend_on_seed_and_name_only() -> None:
    first, second, other = initialized(1), initialized(1, "meta"), initialized(2)
    alone = build_layer(CONFIG, 1)
    initialize(alone, 1, init_std=0.02, num_layers=2, prefix="layers.1.")
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        one = initial_value(name, value.shape, 1, init_std=0.02, num_layers=2)
        assert torch.equal(value, one), name
        assert torch.equal(value, other[name]) == (value.ndim < 2), name
        if name.startswith("layers.1."):
            assert torch.equal(value, alone.get_parameter(name.removeprefix("layers.1."))), name


def test_no_two_parameters_are_alike() -> None:
    matrices = [value for value in initialized(1).values() if value.ndim >= 2]
    starts = {tuple((value / value.std()).flatten()[:4].tolist()) for value in matrices}
    assert len(starts) == len(matrices)


def test_spread_of_each_kind() -> None:
    for name, value in initialized(7).items():
        if name.endswith("bias"):
            assert torch.equal(value, torch.zeros_like(value)), name
        elif "norm" in name:
            assert torch.equal(value, torch.ones_like(value)), name
        else:
            residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
            expected = 0.02 / 2 if residual else 0.02  # sqrt(2 * 2 layers) = 2
            margin = 5 * expected / value.numel() ** 0.5
            assert abs(value.std() - expected) < margin, name
            assert abs(value.mean()) < margin, name


def test_seed_is_the_same_in_another_process() -> None:
    name = "layers.0.mlp.up.weight"
    code = (
        "from megascale.models.initialization import parameter_seed, initial_value;"
        f"print(parameter_seed(5, {name!r}),"
        f" initial_value({name!r}, (3, 7), 5, init_std=0.02, num_layers=2).tolist())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    here = initial_value(name, (3, 7), 5, init_std=0.02, num_layers=2).tolist()
    assert run.stdout.strip() == f"{parameter_seed(5, name)} {here}"


def test_half_precision_holds_the_rounded_value() -> None:
    model = GPT(CONFIG).to(torch.bfloat16)
    initialize(model, 1, init_std=0.02, num_layers=2)
    reference = initialized(1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, reference[name].to(torch.bfloat16)), name


def test_a_vector_without_a_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers.0.gain.*\(8,\)"):
        initial_value("layers.0.gain", (8,), 1, init_std=0.02, num_layers=2)


MATRIX = "layers.0.mlp.up.weight"


@pytest.mark.parametrize(
    "shape",
    [(70_001, 33), (50_257, 64), (40, 70_000), (17, 70_001), (300, 70, 101), (3, 4), (3, 7)],
)
def test_blocks_are_the_numbers_of_one_draw(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(parameter_seed(5, MATRIX))
    at_once = torch.empty(*shape).normal_(0.0, 0.02, generator=generator)
    assert torch.equal(initial_value(MATRIX, shape, 5, init_std=0.02, num_layers=2), at_once)


@pytest.mark.parametrize("box", [None, ((0, 60_000), (0, 33)), ((123, 69_000), (5, 20))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_holds_the_numbers_of_the_whole(
    box: tuple[tuple[int, int], ...] | None, dtype: torch.dtype
) -> None:
    shape = (70_001, 33)
    whole = initial_value(MATRIX, shape, 5, init_std=0.02, num_layers=2)
    held = whole[tuple(slice(*ends) for ends in box or ())].reshape(-1).to(dtype)
    cuts = [0, 1, 7_777, held.numel() // 2, held.numel() - 3, held.numel()]
    for start, end in itertools.pairwise(cuts):
        part = torch.full((end - start,), float("nan"), dtype=dtype)
        fill_initial(part, MATRIX, shape, 5, init_std=0.02, num_layers=2, box=box, start=start)
        assert torch.equal(part, held[start:end]), (start, end)


def test_a_part_of_a_vector() -> None:
    for name, value in (("layers.0.norm.weight", 1.0), ("layers.0.mlp.up.bias", 0.0)):
        part = torch.full((5,), float("nan"))
        fill_initial(part, name, (16,), 1, init_std=0.02, num_layers=2, box=((4, 12),), start=3)
        assert torch.equal(part, torch.full((5,), value)), name
