"""Folders that cannot be imported: refused before anything is written, with all that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megascale.checkpoint.name_lists import folded
from megascale.checkpoint.reader import CheckpointReader
from megascale.cli.convert import _shapes
from megascale.errors import UserError
from megascale.hf.exporting import export_model
from megascale.hf.importing import import_model
from tests.hf_models import save_model, tiny_model
from tests.integration.runs import make_tokenizer


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    return save_model(tiny_model("llama"), tmp_path / "theirs", None, shard_size="1GB")


def refusal(folder: Path | str, out: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        import_model(str(folder), str(out), _shapes)
    assert caught.value.rule
    assert caught.value.remedy
    assert not (out / "checkpoints" / "step_00000000").exists()
    assert not list(out.rglob(".writing*"))
    return caught.value


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_missing_extra_and_misshapen_tensors_are_all_listed(theirs: Path, tmp_path: Path) -> None:
    file = theirs / "model.safetensors"
    tensors = load_file(file)
    for layer in range(2):
        del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
    tensors["model.layers.7.odd.weight"] = torch.zeros(2)
    tensors["model.norm.weight"] = torch.ones(23)
    tensors["lm_head.weight"] = torch.zeros(270, 24, dtype=torch.int8)
    save_file(tensors, file)
    said = refusal(theirs, tmp_path / "ours").what
    assert "missing: model.layers.{0-1}.mlp.up_proj.weight" in said
    assert "not in the model: model.layers.7.odd.weight" in said
    assert "model.norm.weight: the file has (23,), by its config.json it is (24,)" in said
    assert "lm_head.weight: quantized (torch.int8)" in said


def test_vocabulary_of_config_and_weights_differ(theirs: Path, tmp_path: Path) -> None:
    edit(theirs, vocab_size=300)
    said = refusal(theirs, tmp_path / "ours").what
    assert (
        "model.embed_tokens.weight: the file has (270, 24), by its config.json it is (300, 24)"
        in said
    )


def test_tokenizer_with_more_ids_than_the_model(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, vocab_size=280)
    theirs = save_model(tiny_model("llama"), tmp_path / "theirs", tokenizer)
    error = refusal(theirs, tmp_path / "ours")
    assert "280 ids, its config.json vocab_size = 270" in error.what


def test_tied_head_that_differs(tmp_path: Path) -> None:
    theirs = save_model(tiny_model("qwen2"), tmp_path / "theirs", None, shard_size="1GB")
    tensors = load_file(theirs / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1e-3
    save_file(tensors, theirs / "model.safetensors")
    error = refusal(theirs, tmp_path / "ours")
    assert "tie_word_embeddings is true" in error.what


def test_pickled_weights_are_refused_with_the_command(theirs: Path, tmp_path: Path) -> None:
    (theirs / "model.safetensors").rename(theirs / "pytorch_model.bin")
    error = refusal(theirs, tmp_path / "ours")
    assert "pytorch_model.bin" in error.what
    assert "safetensors" in error.rule
    assert "save_pretrained(" in error.remedy
    assert str(theirs) in error.remedy


def test_unknown_family_and_unsupported_settings(theirs: Path, tmp_path: Path) -> None:
    edit(theirs, model_type="mamba2")
    error = refusal(theirs, tmp_path / "ours")
    assert "'mamba2'" in error.what
    assert "gpt2, llama, mistral" in error.rule
    edit(theirs, model_type="llama", num_local_experts=8)
    assert "num_local_experts = 8" in refusal(theirs, tmp_path / "ours").what


def test_incomplete_folders(theirs: Path, tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path / "nowhere", tmp_path / "ours").what
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (theirs / "model.safetensors").unlink()
    assert "has no weights" in refusal(theirs, tmp_path / "ours").what
    (theirs / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002" in refusal(theirs, tmp_path / "ours").what
    (theirs / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{not a header")
    assert "not an intact safetensors file" in refusal(theirs, tmp_path / "ours").what
    (theirs / "config.json").write_text("[1, 2")
    assert "is not JSON" in refusal(theirs, tmp_path / "ours").what


def test_nothing_is_overwritten(theirs: Path, tmp_path: Path) -> None:
    done = import_model(str(theirs), str(tmp_path / "ours"), _shapes)
    with pytest.raises(UserError, match="not empty"):
        import_model(str(theirs), str(tmp_path / "ours"), _shapes)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists"):
        export_model(CheckpointReader(done.checkpoint), None, str(tmp_path / "out"))


def test_a_damaged_checkpoint_is_not_exported(theirs: Path, tmp_path: Path) -> None:
    done = import_model(str(theirs), str(tmp_path / "ours"), _shapes)
    file = Path(done.checkpoint) / "weights_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(UserError, match="its bytes changed"):
        export_model(CheckpointReader(done.checkpoint), None, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_names_are_folded_by_layer() -> None:
    lines = [f"missing: a.{i}.b.0.c" for i in (3, 0, 1, 5)] + ["missing: d", "missing: a.7.x"]
    assert folded(lines) == ["missing: a.{0-1,3,5}.b.0.c", "missing: d", "missing: a.7.x"]
