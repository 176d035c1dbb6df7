"""GGUF files, made here with the gguf library: a tiny Llama as llama.cpp stores it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from megascale.checkpoint.reader import CheckpointReader
from megascale.cli.convert import _shapes
from megascale.config.load import load_config
from megascale.errors import UserError
from megascale.hf.importing import import_model
from megascale.training.inference import LoadedModel
from tests.hf_models import VOCAB, tiny_model, token_ids

Q = gguf.GGMLQuantizationType
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def their_name(name: str) -> str:
    """llama.cpp's name of one of transformers' tensors."""
    stem, _, kind = name.rpartition(".")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest]}.{kind}"


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in llama.cpp's order: the two halves of a head taken in turns."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(model: PreTrainedModel, path: Path, kind: Q, **metadata: Any) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(VOCAB)
    for name, value in metadata.items():
        writer.add_float32(name.replace("__", "."), value)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        for part, count in heads.items():
            values = paired(values, count) if f".{part}." in name else values
        stored = kind if values.ndim == 2 else Q.F32
        data = gguf.quants.quantize(values, stored) if stored != Q.I32 else values.astype(np.int32)
        writer.add_tensor(their_name(name), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama(**changes: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "rms_norm_eps": 1e-5}
    theta = {"rope_type": "default", "rope_theta": 100000.0}
    return tiny_model("llama", rope_parameters=theta, **{**sizes, **changes})


@pytest.mark.parametrize(
    ("kind", "stored", "tolerance"),
    [
        (Q.F32, torch.float32, 1e-6),
        (Q.F16, torch.float16, 1e-2),
        (Q.BF16, torch.bfloat16, 5e-2),
        (Q.Q8_0, torch.float32, 5e-2),
        (Q.Q4_1, torch.float32, 0.5),
    ],
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits(kind: Q, stored: torch.dtype, tolerance: float, tied: bool, tmp_path: Path) -> None:
    reference, ids = llama(tie_word_embeddings=tied), token_ids()
    path = write_gguf(reference, tmp_path / "model.gguf", kind)
    done = import_model(str(path), str(tmp_path / "ours"), _shapes)
    config = load_config(done.config_file, ["data.path=given"])
    assert (config.model.rope_theta, config.model.norm_eps) == (100000.0, 1e-5)
    assert config.model.tie_word_embeddings is tied
    loaded = LoadedModel(done.checkpoint, torch.device("cpu"))
    with torch.no_grad():
        ours = loaded.module.logits(ids)  # type: ignore[operator]
        theirs = reference(ids).logits
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error < tolerance
    if kind in (Q.Q8_0, Q.Q4_1):
        assert error > 1e-5, "nothing was quantized"
    file = CheckpointReader(done.checkpoint)._file("weights_00000.safetensors")
    assert file.dtype("master/model.layers.0.attention.query.weight") == stored


def refused(path: Path, tmp_path: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        import_model(str(path), str(tmp_path / "ours"), _shapes)
    assert caught.value.remedy
    return caught.value


def test_a_quantization_that_cannot_be_undone_is_named(tmp_path: Path) -> None:
    error = refused(write_gguf(llama(), tmp_path / "model.gguf", Q.I32), tmp_path)
    assert "I32 (model.embed_tokens.weight" in error.what
    assert "Q4_0" in error.rule


def test_settings_that_are_not_computed_are_named(tmp_path: Path) -> None:
    path = write_gguf(llama(), tmp_path / "model.gguf", Q.F32, llama__logit_scale=2.0)
    assert "llama.logit_scale = 2.0" in refused(path, tmp_path).what


def test_other_architectures_and_files(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    error = refused(tmp_path / "other.gguf", tmp_path)
    assert "'mamba'" in error.what
    assert "llama" in error.rule
    (tmp_path / "text.gguf").write_text("no GGUF at all, but long enough to have a header")
    assert "cannot be read as GGUF" in refused(tmp_path / "text.gguf", tmp_path).what
    assert "there is no file" in refused(tmp_path / "none.gguf", tmp_path).what


def test_a_tensor_too_many_is_listed(tmp_path: Path) -> None:
    model = llama()
    model.model.layers[1].self_attn.q_proj.bias = torch.nn.Parameter(torch.ones(64))
    error = refused(write_gguf(model, tmp_path / "model.gguf", Q.F32), tmp_path)
    assert "not in the model: model.layers.1.self_attn.q_proj.bias" in error.what
