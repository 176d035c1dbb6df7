"""Megatron-LM's checkpoints of models of transformers, in every layout: equal logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale.checkpoint.reader import CheckpointReader
from megascale.cli.convert import _shapes
from megascale.errors import UserError
from megascale.importers.importing import Report, import_megatron
from megascale.importers.megatron_args import model_settings
from megascale.training.inference import LoadedModel
from tests.hf_models import VOCAB, token_ids
from tests.integration.runs import call
from tests.megatron_checkpoints import PADDED, gpt2, llama, register_megatron, write

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    register_megatron(monkeypatch)


def _import(folder: Path, out: Path, vocab_size: int | None = None) -> Report:
    return import_megatron(str(folder), str(out), _shapes, vocab_size=vocab_size)


def _assert_same(report: Report, model: Any, vocab: int = PADDED) -> None:
    ids = token_ids()
    with torch.no_grad():
        theirs = model(ids).logits[..., :vocab]
        ours = LoadedModel(report.checkpoint, CPU).module.logits(ids)  # type: ignore[operator]
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


LAYOUTS: list[tuple[Any, dict[str, Any]]] = [
    (gpt2, {}),
    (gpt2, {"tp": 2, "style": "fused"}),
    (gpt2, {"tp": 4, "pp": 2, "style": "older"}),
    (llama, {"tp": 2, "pp": 2, "vpp": 2}),
    (llama, {"tp": 2, "pp": 4, "style": "fused"}),
    (llama, {"tp": 1, "pp": 2, "style": "older"}),
]


@pytest.mark.parametrize(("made", "layout"), LAYOUTS)
def test_any_layout_gives_the_same_logits(made: Any, layout: Any, tmp_path: Path) -> None:
    model, tensors, args = made()
    write(tmp_path / "theirs", tensors, args, **layout)
    report = _import(tmp_path / "theirs", tmp_path / "out")
    _assert_same(report, model)
    assert report.step == 7
    assert report.num_parameters == sum(p.numel() for p in model.parameters())
    assert CheckpointReader(report.checkpoint).damage() is None
    assert any("optimizer's state" in line for line in report.lost)
    assert "random states" in report.lost


@pytest.mark.parametrize(("version", "order"), [(0.0, (1, 0, 2)), (1.0, (0, 2, 1))])
def test_old_orders_of_queries_keys_and_values(
    version: float, order: tuple[int, int, int], tmp_path: Path
) -> None:
    """Before version 2 rows were (3, heads, width), then (heads, width, 3)."""
    model, tensors, args = gpt2()
    for name in tensors:
        if "linear_qkv" in name:
            rows = tensors[name].reshape(4, 3, 6, -1).permute(*order, 3)
            tensors[name] = rows.reshape(tensors[name].shape)
    write(tmp_path / "theirs", tensors, args, style="older", version=version)
    _assert_same(_import(tmp_path / "theirs", tmp_path / "out"), model)


def test_padding_of_the_vocabulary_is_dropped_on_request(tmp_path: Path) -> None:
    model, tensors, args = llama()
    write(tmp_path / "theirs", tensors, args, tp=2)
    _assert_same(_import(tmp_path / "theirs", tmp_path / "out", VOCAB), model, VOCAB)
    with pytest.raises(UserError, match=r"--vocab-size 289"):
        _import(tmp_path / "theirs", tmp_path / "other", PADDED + 1)


def test_norms_whose_weights_are_stored_around_zero(tmp_path: Path) -> None:
    model, tensors, args = gpt2()
    moved = {n: t - 1 if n.endswith("layernorm.weight") else t for n, t in tensors.items()}
    write(tmp_path / "theirs", moved, {**args, "apply_layernorm_1p": True}, style="fused")
    _assert_same(_import(tmp_path / "theirs", tmp_path / "out"), model)


def test_the_command_and_its_report(tmp_path: Path) -> None:
    _, tensors, args = gpt2()
    write(tmp_path / "theirs", tensors, args, dtype=torch.bfloat16)
    done = call("convert", "from-megatron", tmp_path / "theirs", tmp_path / "out")
    assert done.code == 0, done.output
    assert "lost: digits of the weights" in done.stdout
    report = json.loads((tmp_path / "out" / "import.json").read_text())
    assert report["settings"]["arguments"]["num_layers"] == 2
    assert report["kinds"] == ["master"]


def test_a_file_that_needs_code_is_refused_with_its_name(tmp_path: Path) -> None:
    _, tensors, args = gpt2()
    write(tmp_path / "theirs", tensors, args)
    path = tmp_path / "theirs" / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    torch.save({**content, "hook": print}, path)
    refused = call("convert", "from-megatron", tmp_path / "theirs", tmp_path / "out").refusal()
    assert "model_optim_rng.pt" in refused
    assert "print" in refused
    assert not (tmp_path / "out").exists()


def _refusal(folder: Path, out: Path) -> str:
    with pytest.raises(UserError) as caught:
        _import(folder, out)
    assert caught.value.remedy
    return caught.value.what


def test_what_cannot_be_put_together_is_refused(tmp_path: Path) -> None:
    _, tensors, args = llama()
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    write(theirs, tensors, args, tp=2, pp=2)
    step = theirs / "iter_0000007"
    (step / "mp_rank_01_001").rename(tmp_path / "kept")
    assert "3 folders mp_rank_TT_PPP" in _refusal(theirs, out)
    (tmp_path / "kept").rename(step / "mp_rank_01_001")
    path = step / "mp_rank_01_000" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["model"]["decoder.layers.0.input_layernorm.weight"] += 1
    torch.save(content, path)
    assert "input_layernorm.weight differs between the tensor-parallel ranks" in _refusal(
        theirs, out
    )
    (step / "mp_rank_01_000").rename(step / "mp_rank_01_000_003")
    assert "expert parallelism" in _refusal(theirs, out)
    (step / ".metadata").write_bytes(b"")
    assert "torch_dist" in _refusal(theirs, out)
    (theirs / "latest_checkpointed_iteration.txt").write_text("9")
    assert "'9'" in _refusal(theirs, out)


GARBAGE = (None, "x", -3, 1e300, [], {"a": 1}, torch.zeros(()), torch.zeros(3, 3))


def test_garbage_in_any_place_is_a_mistake_of_the_file(tmp_path: Path) -> None:
    """What was planted is refused or, where nothing depends on it, the import is the same."""
    _, tensors, args = gpt2()
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    write(theirs, tensors, args)
    path = theirs / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    places = [(key,) for key in content]
    places += [("model", key) for key in list(content["model"])[:4]]
    refused = 0
    for place in places:
        for value in GARBAGE:
            planted = dict(content)
            inside = planted
            for key in place[:-1]:
                inside[key] = dict(inside[key])
                inside = inside[key]
            inside[place[-1]] = value
            torch.save(planted, path)
            try:
                _import(theirs, out)
            except UserError:
                refused += 1
            shutil.rmtree(out, ignore_errors=True)
    assert refused >= 4 * len(GARBAGE)  # no place in the model's tensors is taken for granted


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_layers": 10**9}, "num_layers is 1000000000, there are 2"),
        ({"num_attention_heads": "many"}, "does not hold what Megatron-LM writes"),
        ({"hidden_size": -8}, "does not hold what Megatron-LM writes"),
        ({"norm_epsilon": {"a": 1}}, "does not hold what Megatron-LM writes"),
    ],
)
def test_garbage_in_the_arguments_is_told(tmp_path: Path, change: Any, says: str) -> None:
    _, tensors, args = gpt2()
    write(tmp_path / "theirs", tensors, {**args, **change})
    assert says in _refusal(tmp_path / "theirs", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_experts": 8}, "num_experts = 8"),
        ({"squared_relu": True}, "squared_relu = True"),
        ({"rotary_interleaved": True}, "rotary_interleaved"),
        ({"position_embedding_type": "yarn"}, "position_embedding_type = 'yarn'"),
        ({"normalization": "L2Norm"}, "normalization = 'L2Norm'"),
        ({"hidden_size": None}, "hidden_size is missing"),
    ],
)
def test_arguments_that_change_the_computation_are_refused(change: Any, says: str) -> None:
    _, _, args = llama()
    with pytest.raises(UserError, match="does not compute") as caught:
        model_settings({**args, **change}, "there")
    assert says in caught.value.what


def test_settings_of_arguments() -> None:
    _, _, args = llama()
    longer = {**args, "use_rope_scaling": True, "rope_scaling_factor": 4.0, "qk_layernorm": True}
    settings = model_settings(longer, "there")
    assert settings["rope_scaling"] == "llama3"
    assert settings["rope_scaling_factor"] == 4.0
    assert settings["qk_norm"]
    assert settings["num_kv_heads"] == 2
    _, _, plain = gpt2()
    assert model_settings(plain, "there")["activation"] == "gelu_tanh"
    exact = {**plain, "bias_gelu_fusion": False}
    assert model_settings(exact, "there")["activation"] == "gelu"
    stretched = {**args, "rotary_seq_len_interpolation_factor": 2}
    assert model_settings(stretched, "there")["rope_scaling"] == "linear"
