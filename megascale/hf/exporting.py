"""To Hugging Face: a checkpoint as a folder that transformers loads, streamed.

In memory is at most one tensor, and of a tensor that keeps its layout one block.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from megascale.checkpoint.reader import CheckpointReader
from megascale.checkpoint.storage import Storage
from megascale.checkpoint.tensor_file import TensorStream, write_streams
from megascale.checkpoint.weights import WeightSource
from megascale.checkpoint.writer import grouped_by_size
from megascale.config.load import load_config
from megascale.config.schema import Config
from megascale.data.tokenizer import Tokenizer
from megascale.errors import UserError
from megascale.hf.family import Entry, Family
from megascale.hf.layouts import Shape
from megascale.hf.model_card import model_card
from megascale.hf.registry import family_for
from megascale.hf.source import BLOCK_ELEMENTS

DTYPE_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_UNITS = {"": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KIB": 1 << 10, "MIB": 1 << 20}
_UNITS["GIB"] = 1 << 30


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    family: str
    num_parameters: int
    num_files: int


def parse_size(text: str) -> int:
    """Bytes of "5GB", "50 MB", "512MiB" or "1000".

    Raises:
        UserError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = match.group(2).upper() if match else None
    size = int(float(match.group(1)) * _UNITS[unit]) if match and unit in _UNITS else 0
    if size < 1:
        raise UserError(
            f"--shard-size {text}",
            rule=f"a size is a positive number and one of {', '.join(list(_UNITS)[1:])}",
            remedy="for example --shard-size 5GB",
        )
    return size


def export_model(
    reader: CheckpointReader,
    tokenizer: Tokenizer | None,
    out: str,
    *,
    family_name: str | None = None,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 5 * 1000**3,
    weights: str = "trained",
) -> Exported:
    """Write a checkpoint's weights as a folder of transformers: all or nothing, by one rename.

    Args:
        reader: the checkpoint; every file is compared with its checksum first.
        tokenizer: the checkpoint's own, for the id that ends a text.
        out: a folder that does not exist yet.
        family_name: `model_type` to write; None takes the first that fits.
        dtype: of the weights in the files.
        shard_bytes: a file is closed when the next tensor would make it larger.
        weights: which of the checkpoint's weights; see `WeightSource`.

    Raises:
        UserError: no family computes what this model computes, a damaged checkpoint, or a folder
            that exists or cannot be written.
    """
    reader.require_intact()
    config = load_config(yaml.safe_load(reader.attachment("config.yaml")))
    family = family_for(config.model, family_name)
    shapes = {name: tuple(shape) for name, shape in reader.manifest.parameters.items()}
    entries = family.entries(shapes, config.model.num_layers)
    source = WeightSource(reader, weights)
    tensors = [_stream(source, entry, shapes, config, dtype) for entry in entries]
    parent, _, name = Storage(out).root.rstrip("/").rpartition("/")
    storage = Storage(parent or "/")
    if storage.exists(name):
        raise UserError(
            f"{out} exists", rule="an export overwrites nothing", remedy="choose another folder"
        )
    temporary = f".writing_{name}"
    storage.remove_folder(temporary)
    storage.make_folder(temporary)
    try:
        num_files = _write_shards(storage, temporary, tensors, shard_bytes)
        for path, content in _small_files(reader, config, family, tokenizer, dtype).items():
            with storage.open_write(temporary, path) as stream:
                stream.write(content)
        storage.commit_folder(temporary, name)
    except BaseException:
        storage.remove_folder(temporary)
        raise
    finally:
        source.close()
    return Exported(family.model_type, sum(torch.Size(t.shape).numel() for t in tensors), num_files)


def _stream(
    source: WeightSource,
    entry: Entry,
    shapes: Mapping[str, Shape],
    config: Config,
    dtype: torch.dtype,
) -> TensorStream:
    heads = config.model.num_attention_heads
    ours = [shapes[name] for name in entry.ours]

    def blocks() -> Iterator[torch.Tensor]:
        if entry.layout.is_plain:
            for block in _blocks(source, entry.ours[0], ours[0]):
                yield block.to(dtype)
            return
        parts = [_whole(source, name, shape) for name, shape in zip(entry.ours, ours, strict=True)]
        yield entry.layout.merge(parts, heads).to(dtype)

    return TensorStream(entry.theirs, dtype, entry.layout.shape(ours, heads), blocks)


def _blocks(source: WeightSource, name: str, shape: Shape) -> Iterator[torch.Tensor]:
    """A parameter's elements in order, fp32; each block takes the place of the one before."""
    total = torch.Size(shape).numel()
    buffer = torch.empty(min(BLOCK_ELEMENTS, total))
    for start in range(0, total, BLOCK_ELEMENTS):
        block = buffer[: total - start]
        source.fill(name, shape, start, block)
        yield block


def _whole(source: WeightSource, name: str, shape: Shape) -> torch.Tensor:
    """A parameter, fp32."""
    tensor = torch.empty(shape)
    for index, block in enumerate(tensor.view(-1).split(BLOCK_ELEMENTS)):
        start = index * BLOCK_ELEMENTS
        source.fill(name, shape, start, block)
    return tensor


def _write_shards(
    storage: Storage, folder: str, tensors: list[TensorStream], shard_bytes: int
) -> int:
    """Write model*.safetensors and, for several of them, their index; returns their number."""
    groups = grouped_by_size(tensors, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = "model.safetensors"
        if len(groups) > 1:
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        with storage.open_write(folder, name) as stream:
            write_streams(stream, group, {"format": "pt"})
        weight_map.update({tensor.key: name for tensor in group})
    if len(groups) > 1:
        total = sum(tensor.bytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        with storage.open_write(folder, "model.safetensors.index.json") as stream:
            stream.write(_json(index))
    return len(groups)


def _small_files(
    reader: CheckpointReader,
    config: Config,
    family: Family,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype,
) -> dict[str, bytes]:
    """config.json, generation_config.json, the model card and the tokenizer."""
    ids = _special_ids(family, tokenizer)
    architecture, _ = family.loaded_by(reader.manifest.parameters)
    described = {
        "architectures": [architecture],
        "model_type": family.model_type,
        **family.write_config(config.model),
        "torch_dtype": DTYPE_NAMES[dtype],
        **ids,
    }
    files = {
        "config.json": _json(described),
        "README.md": model_card(reader.manifest, config, family).encode(),
    }
    if family.continues_texts:
        files["generation_config.json"] = _json({"_from_model_config": True, **ids})
    for entry in reader.manifest.files:
        folder, _, name = entry.path.rpartition("/")
        if folder == "tokenizer":
            files[name] = reader.attachment(entry.path)
    return files


def _special_ids(family: Family, tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Special tokens of config.json: the end of a text, or what a masked model pads with."""
    if family.continues_texts:
        eos = None if tokenizer is None else tokenizer.eod_id
        return {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": None}
    tokens = None if tokenizer is None else tokenizer.bert_tokens
    return {"pad_token_id": None if tokens is None else tokens.ids["pad"]}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
