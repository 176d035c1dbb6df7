"""Checkpoints as Megatron-LM saves them (--ckpt-format torch), made from models of transformers.

The tensors are laid out by Megatron's documentation: queries, keys and values group after group;
columns of the first matrix of each pair and rows of the second one cut over tensor-parallel ranks;
layers numbered from 0 on every pipeline stage. Nothing of the importer is used here.
"""

from __future__ import annotations

import argparse
import enum
import random
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.hf_models import tiny_model

PADDED = 288  # a multiple of 32 above VOCAB


def register_megatron(patch: pytest.MonkeyPatch) -> None:
    """Modules under Megatron's names, so that classes of it can be pickled."""
    for name in ("megatron", "megatron.core", "megatron.core.enums"):
        patch.setitem(sys.modules, name, types.ModuleType(name))
    model_type = enum.Enum("ModelType", "encoder_or_decoder", module="megatron.core.enums")
    sys.modules["megatron.core.enums"].ModelType = model_type  # type: ignore[attr-defined]


def gpt2() -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """(model, megatron.core's tensors, arguments): learned positions, biases, a tied head."""
    model = tiny_model("gpt2", vocab_size=PADDED)
    theirs = dict(model.named_parameters())
    ours = {
        "embedding.word_embeddings.weight": theirs["transformer.wte.weight"],
        "embedding.position_embeddings.weight": theirs["transformer.wpe.weight"],
        "decoder.final_layernorm.weight": theirs["transformer.ln_f.weight"],
        "decoder.final_layernorm.bias": theirs["transformer.ln_f.bias"],
    }
    for layer in range(2):
        old, new = f"transformer.h.{layer}.", f"decoder.layers.{layer}."
        for kind in ("weight", "bias"):
            joined = theirs[old + f"attn.c_attn.{kind}"]
            joined = joined.T if kind == "weight" else joined  # (3 D, D) or (3 D,)
            parts = [part.reshape(4, 6, *part.shape[1:]) for part in joined.chunk(3)]
            ours[new + f"self_attention.linear_qkv.{kind}"] = torch.cat(
                [parts[which][head] for head in range(4) for which in range(3)]
            )
            for name, place in (
                ("self_attention.linear_proj", "attn.c_proj"),
                ("mlp.linear_fc1", "mlp.c_fc"),
                ("mlp.linear_fc2", "mlp.c_proj"),
            ):
                tensor = theirs[f"{old}{place}.{kind}"]
                ours[f"{new}{name}.{kind}"] = tensor.T if kind == "weight" else tensor
            ours[new + f"input_layernorm.{kind}"] = theirs[old + f"ln_1.{kind}"]
            ours[new + f"pre_mlp_layernorm.{kind}"] = theirs[old + f"ln_2.{kind}"]
    args = {
        "num_layers": 2,
        "hidden_size": 24,
        "num_attention_heads": 4,
        "kv_channels": 6,
        "ffn_hidden_size": 96,
        "max_position_embeddings": 32,
        "seq_length": 32,
        "position_embedding_type": "learned_absolute",
        "padded_vocab_size": PADDED,
        "norm_epsilon": 1e-5,
        "hidden_dropout": 0.1,
    }
    return model, ours, args


def llama() -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """The same with groups of heads, rotary positions, swiglu, RMSNorm and a head of its own."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    model = tiny_model("llama", vocab_size=PADDED, num_hidden_layers=4, rope_parameters=rope)
    theirs = dict(model.named_parameters())
    ours = {
        "embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": theirs["model.norm.weight"],
        "output_layer.weight": theirs["lm_head.weight"],
    }
    for layer in range(4):
        old, new = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        query, key, value = (theirs[f"{old}self_attn.{n}_proj.weight"] for n in "qkv")
        rows = []
        for group in range(2):  # 4 query heads, 2 groups, head width 6
            rows += [query[12 * group : 12 * group + 12], key[6 * group : 6 * group + 6]]
            rows += [value[6 * group : 6 * group + 6]]
        ours[new + "self_attention.linear_qkv.weight"] = torch.cat(rows)
        ours[new + "self_attention.linear_proj.weight"] = theirs[old + "self_attn.o_proj.weight"]
        gate, up = (theirs[f"{old}mlp.{name}_proj.weight"] for name in ("gate", "up"))
        ours[new + "mlp.linear_fc1.weight"] = torch.cat([gate, up])
        ours[new + "mlp.linear_fc2.weight"] = theirs[old + "mlp.down_proj.weight"]
        ours[new + "input_layernorm.weight"] = theirs[old + "input_layernorm.weight"]
        ours[new + "pre_mlp_layernorm.weight"] = theirs[old + "post_attention_layernorm.weight"]
    args = {
        "num_layers": 4,
        "hidden_size": 24,
        "num_attention_heads": 4,
        "group_query_attention": True,
        "num_query_groups": 2,
        "kv_channels": 6,
        "ffn_hidden_size": 20,
        "seq_length": 32,
        "max_position_embeddings": 32,
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "padded_vocab_size": PADDED,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-6,
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return model, ours, args


def _cut(name: str, tensor: Tensor, rank: int, size: int, gated: bool) -> Tensor:
    if "linear_fc1" in name and gated:
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    if any(part in name for part in ("word_emb", "output_layer", "linear_qkv", "linear_fc1")):
        return tensor.chunk(size)[rank]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return tensor.chunk(size, dim=1)[rank]
    return tensor


def _fused_names(name: str) -> str:
    """As Transformer Engine names norms that are one kernel with the matrix after them."""
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    return name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


def _older_tree(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The nested dictionary of the model before megatron.core."""
    encoder: dict[str, Tensor] = {}
    embedding: dict[str, Any] = {}
    tree: dict[str, Any] = {"language_model": {"embedding": embedding, "encoder": encoder}}
    for name, tensor in tensors.items():
        if name.startswith("embedding."):
            _, table, kind = name.split(".")
            embedding[table] = {kind: tensor}
        elif name.startswith("output_layer."):
            tree["language_model"]["output_layer"] = {"weight": tensor}
        else:
            new = name.removeprefix("decoder.").replace("linear_qkv", "query_key_value")
            new = new.replace("linear_proj", "dense").replace("linear_fc1", "dense_h_to_4h")
            new = new.replace("linear_fc2", "dense_4h_to_h")
            encoder[new.replace("pre_mlp_layernorm", "post_attention_norm")] = tensor
    return tree


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    args: Mapping[str, Any],
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    style: str = "core",
    version: float = 3.0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write latest_checkpointed_iteration.txt and iter_0000007/mp_rank_TT[_PPP]/."""
    chunks = pp * vpp
    per_chunk = args["num_layers"] // chunks
    for rank in range(tp):
        for stage in range(pp):
            content: dict[str, Any] = _beside(args, tp, pp, version)
            for chunk in range(vpp):
                place = chunk * pp + stage
                held = _of_chunk(tensors, place, per_chunk, chunks)
                gated = bool(args.get("swiglu"))
                parts = {
                    n: _cut(n, t.detach(), rank, tp, gated).to(dtype).clone()
                    for n, t in held.items()
                }
                if style == "fused":
                    parts = {_fused_names(name): part for name, part in parts.items()}
                    parts["decoder.layers.0.mlp.linear_fc1._extra_state"] = torch.zeros(3)
                model: Any = _older_tree(parts) if style == "older" else parts
                content["model" if vpp == 1 else f"model{chunk}"] = model
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
            path = folder / "iter_0000007" / name / "model_optim_rng.pt"
            path.parent.mkdir(parents=True)
            torch.save(content, path)
    (folder / "latest_checkpointed_iteration.txt").write_text("7")


def _of_chunk(
    tensors: Mapping[str, Tensor], place: int, per_chunk: int, chunks: int
) -> dict[str, Tensor]:
    """What the part `place` of the model holds, its layers numbered from 0."""
    held = {}
    for name, tensor in tensors.items():
        if name.startswith("decoder.layers."):
            _, _, layer, rest = name.split(".", 3)
            if int(layer) // per_chunk == place:
                held[f"decoder.layers.{int(layer) % per_chunk}.{rest}"] = tensor
        elif (name.startswith("embedding.") and place == 0) or (
            not name.startswith("embedding.") and place == chunks - 1
        ):
            held[name] = tensor
    if place == chunks - 1 and chunks > 1 and "output_layer.weight" not in tensors:
        held["output_layer.weight"] = tensors["embedding.word_embeddings.weight"]  # the tied copy
    return held


def _beside(args: Mapping[str, Any], tp: int, pp: int, version: float) -> dict[str, Any]:
    """What else is in each file: arguments, random states, the optimizer's."""
    names = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    others = {"params_dtype": torch.bfloat16, "model_type": _model_type()}
    return {
        "args": argparse.Namespace(**args, **names, **others),
        "checkpoint_version": version,
        "iteration": 7,
        "optimizer": {"optimizer": {"state": {}, "param_groups": []}},
        "opt_param_scheduler": {"max_lr": 0.1},
        "rng_state": [
            {
                "random_rng_state": random.Random(1).getstate(),
                "np_rng_state": np.random.RandomState(1).get_state(),
                "torch_rng_state": torch.get_rng_state(),
            }
        ],
    }


def _model_type() -> Any:
    return sys.modules["megatron.core.enums"].ModelType.encoder_or_decoder  # type: ignore[attr-defined]
