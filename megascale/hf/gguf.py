"""A GGUF file (llama.cpp) read as a model of transformers, quantized weights made whole again.

Only the gguf library knows its block formats: `pip install megascale[hf]`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from megascale.errors import UserError
from megascale.hf.source import BLOCK_ELEMENTS

# Keys below the architecture's name -> fields of a Llama's config.json. None: checked apart.
_KEYS: dict[str, str | None] = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": None,
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "rope.dimension_count": None,
    "vocab_size": "vocab_size",
}
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ARCHITECTURES = ("llama",)


class GGUFSource:
    """A .gguf file of a Llama; see `TensorSource`.

    Args:
        path: local file.

    Raises:
        UserError: the gguf library is not installed, not an intact GGUF file, another architecture
            than Llama, or a quantization that cannot be undone (named).
    """

    def __init__(self, path: str) -> None:
        self.where = path
        self._gguf = _library()
        self._reader = self._opened()
        self._metadata = dict(self._reader.fields.items())
        self.config: Mapping[str, Any] = self._read_config()
        self._tensors = {_their_name(tensor.name): tensor for tensor in self._reader.tensors}
        self._check_types()

    def names(self) -> list[str]:
        """See `TensorSource.names`."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorSource.shape`."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> torch.dtype:
        """See `TensorSource.dtype`: fp32 for what is quantized."""
        kinds = {"F16": torch.float16, "BF16": torch.bfloat16}
        return kinds.get(self._tensors[name].tensor_type.name, torch.float32)

    def read(self, name: str) -> torch.Tensor:
        """See `TensorSource.read`."""
        parts = [block.view(-1) for block in self.blocks(name)]
        return torch.cat(parts).view(self.shape(name))

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """See `TensorSource.blocks`."""
        tensor, shape = self._tensors[name], self.shape(name)
        row = shape[-1] if len(shape) > 1 else 1
        step = max(1, BLOCK_ELEMENTS // row)
        # llama.cpp turns neighbouring features into a pair, transformers the two halves of a head.
        heads = self._paired_heads(name)
        if heads:
            step = shape[0]
        for start in range(0, shape[0], step):
            values = self._gguf.quants.dequantize(
                tensor.data[start : start + step], tensor.tensor_type
            )
            block = torch.from_numpy(values.copy())
            if heads:
                split = block.view(heads, shape[0] // heads // 2, 2, *block.shape[1:])
                block = split.transpose(1, 2).reshape(block.shape)
            yield block.to(self.dtype(name))

    def tokenizer_files(self) -> dict[str, bytes]:
        """See `TensorSource.tokenizer_files`: rebuilt by transformers from the file's lists."""
        if "tokenizer.ggml.tokens" not in self._metadata:
            return {}
        from transformers import AutoTokenizer

        folder, file = os.path.split(os.path.abspath(self.where))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, local_files_only=True)
        with tempfile.TemporaryDirectory() as target:
            tokenizer.save_pretrained(target)
            return {entry.name: entry.read_bytes() for entry in sorted(Path(target).iterdir())}

    def close(self) -> None:
        """See `TensorSource.close`."""
        self._tensors.clear()

    def _opened(self) -> Any:
        try:
            return self._gguf.GGUFReader(self.where)
        except FileNotFoundError as error:
            raise UserError(
                f"there is no file {self.where}", remedy="check the path of the .gguf file"
            ) from error
        except Exception as error:  # the library raises whatever its parsing stumbles over
            raise UserError(
                f"{self.where} cannot be read as GGUF: {error}",
                rule="an intact GGUF file whose types the installed gguf library knows",
                remedy="copy the file again, or update gguf",
            ) from error

    def _value(self, key: str) -> Any:
        return self._metadata[key].contents()

    def _read_config(self) -> dict[str, Any]:
        found = self._metadata.get("general.architecture")
        architecture = found.contents() if found is not None else None
        if architecture not in _ARCHITECTURES:
            raise UserError(
                f"{self.where} is of the architecture {architecture!r}",
                rule=f"of GGUF files these are supported: {', '.join(_ARCHITECTURES)}",
                remedy="convert the model's safetensors instead",
            )
        prefix = f"{architecture}."
        below = {k.removeprefix(prefix): k for k in self._metadata if k.startswith(prefix)}
        values: dict[str, Any] = {}
        for name, key in below.items():
            theirs = _KEYS.get(name)
            if theirs is not None:
                values[theirs] = self._value(key)
        heads = values["num_attention_heads"]
        width = values.get("head_dim") or values["hidden_size"] // heads
        problems = [f"{key} = {self._value(key)}" for n, key in below.items() if n not in _KEYS]
        for name in ("attention.value_length", "rope.dimension_count"):
            if name in below and self._value(below[name]) != width:
                problems.append(f"{below[name]} = {self._value(below[name])}, not {width}")
        names = {tensor.name for tensor in self._reader.tensors}
        if "rope_freqs.weight" in names:
            problems.append("rope_freqs.weight: stretched rotary wavelengths (Llama 3)")
        if problems:
            raise UserError(
                f"{self.where} has settings that megascale does not compute:\n    "
                + "\n    ".join(problems),
                rule="everything that changes the logits must be supported",
                remedy="convert the model's safetensors instead",
            )
        for name in ("rms_norm_eps", "rope_theta"):  # kept as fp32 there
            if name in values:
                values[name] = float(f"{values[name]:.7g}")
        if "vocab_size" not in values and "tokenizer.ggml.tokens" in self._metadata:
            values["vocab_size"] = len(self._metadata["tokenizer.ggml.tokens"].data)
        tied = "output.weight" not in names
        return {"model_type": "llama", **values, "tie_word_embeddings": tied}

    def _check_types(self) -> None:
        bad: dict[str, list[str]] = {}
        for name, tensor in self._tensors.items():
            try:
                self._gguf.quants.dequantize(tensor.data[:1], tensor.tensor_type)
            except NotImplementedError:
                bad.setdefault(tensor.tensor_type.name, []).append(name)
        if bad:
            shown = "; ".join(f"{kind} ({names[0]}, ...)" for kind, names in bad.items())
            raise UserError(
                f"{self.where} has weights of the quantization {shown}",
                rule="a quantization that the gguf library can undo: F32, F16, BF16, Q4_0 to Q8_0, "
                "the K and IQ types",
                remedy="convert a file of another quantization, or the model's safetensors",
            )

    def _paired_heads(self, name: str) -> int:
        """Heads of a query or key projection, whose rows llama.cpp orders in pairs; else 0."""
        if ".q_proj." in name:
            return self.config["num_attention_heads"]
        if ".k_proj." in name:
            return self.config.get("num_key_value_heads") or self.config["num_attention_heads"]
        return 0


def _their_name(name: str) -> str:
    """transformers' name of a tensor; an unknown one stays, and is told of as not in the model."""
    stem, _, kind = name.rpartition(".")
    *block, last = stem.split(".")
    prefix = f"model.layers.{block[1]}." if len(block) == 2 and block[0] == "blk" else ""
    return f"{prefix}{_TENSORS[last]}.{kind}" if last in _TENSORS else name


def _library() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            "reading a .gguf file needs the gguf library, which is not installed",
            rule="it is an optional dependency",
            remedy="pip install 'megascale[hf]'",
        ) from error
    return gguf
