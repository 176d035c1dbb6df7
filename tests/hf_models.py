"""Tiny models of transformers with a tokenizer, saved as a user finds them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 270

_GPT2 = {"n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 4}
_LLAMA = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

TINY: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "llama": {**_LLAMA, "rope_parameters": _LLAMA3},
    "mistral": {**_LLAMA, "sliding_window": 5},
    "qwen2": {**_LLAMA, "tie_word_embeddings": True},
    "qwen3": {**_LLAMA, "head_dim": 8},
    "gpt_neox": {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}
    | {"rotary_pct": 0.5, "hidden_size": 32},
    "gemma2": {**_LLAMA, "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 7},
    "gemma3_text": {
        **_LLAMA,
        "head_dim": 8,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """A model of a few thousand parameters in which nothing is 0 or 1."""
    settings = {"vocab_size": VOCAB, **TINY[family], **changes}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    config = AutoConfig.for_model(family, **settings, **special)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def save_model(
    model: PreTrainedModel, folder: Path, tokenizer: Path | None, shard_size: str = "40KB"
) -> Path:
    """Save as `save_pretrained` does, in several files, with a tokenizer's files beside."""
    model.save_pretrained(folder, max_shard_size=shard_size)
    for file in tokenizer.iterdir() if tokenizer else ():
        shutil.copy(file, folder / file.name)
    return folder


def token_ids(batch: int = 2, length: int = 19) -> torch.Tensor:
    """Ids (batch, length) below VOCAB."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(VOCAB, (batch, length), generator=generator)
