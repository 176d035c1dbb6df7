"""From Hugging Face: another program's weights as a checkpoint of step 0, streamed.

In memory is at most one tensor, and of a tensor that keeps its layout one block.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megascale.checkpoint.name_lists import folded
from megascale.checkpoint.storage import Storage
from megascale.checkpoint.tensor_file import TensorStream
from megascale.checkpoint.writer import write_weights
from megascale.config.load import dump_config, load_config
from megascale.config.schema import Config, ModelConfig
from megascale.config.yaml_text import dump_yaml
from megascale.data.tokenizer import load_tokenizer
from megascale.errors import UserError
from megascale.hf.family import Entry, Family
from megascale.hf.fields import simplified
from megascale.hf.layouts import Shape
from megascale.hf.registry import family_of
from megascale.hf.source import SafetensorsFolder, TensorSource

NO_DATA = "imported-weights-have-no-data"
"""data.path in the config inside an imported checkpoint: a config has one, an import none."""

FILE_BYTES = 4 * 1024**3
ShapesOf = Callable[[Config], Mapping[str, Shape]]


@dataclass(frozen=True)
class Imported:
    """What an import wrote: the checkpoint, the config to train on from, and how large it is."""

    checkpoint: str
    config_file: str
    family: str
    num_parameters: int


def open_source(path: str) -> TensorSource:
    """Open a folder of transformers or a .gguf file."""
    if path.endswith(".gguf"):
        from megascale.hf.gguf import GGUFSource

        return GGUFSource(path)
    return SafetensorsFolder(path)


def import_model(
    path: str, out: str, shapes_of: ShapesOf, dtype: torch.dtype | None = None
) -> Imported:
    """Write `out`/checkpoints/step_00000000 and `out`/config.yaml from a model of transformers.

    Args:
        path: folder with config.json and safetensors, or a .gguf file.
        out: a folder that does not exist yet or is empty.
        shapes_of: parameter names and shapes of the model that a config describes.
        dtype: in which weights are stored; None: each as it is found. Training reads any of them
            into fp32 masters.

    Raises:
        UserError: a family, setting, tensor or vocabulary that does not fit (all are listed).
    """
    storage = Storage(out)
    if storage.exists() and storage.fs.ls(storage.root):
        raise UserError(
            f"{out} exists and is not empty",
            rule="an import does not overwrite anything",
            remedy="choose another folder",
        )
    source = open_source(path)
    try:
        family = family_of(source.config, source.where)
        settings = simplified(family.read_config(source.config))
        config = load_config({"model": settings, "data": {"path": NO_DATA}})
        shapes = shapes_of(config)
        entries = family.entries(shapes, config.model.num_layers)
        heads = config.model.num_attention_heads
        names = _matched(source, family, entries, shapes, heads)
        files = source.tokenizer_files()
        _check_vocabulary(files, config.model, source.where)
        tensors = _streams(source, entries, names, shapes, heads, dtype)
        attachments = {f"tokenizer/{name}": content for name, content in files.items()}
        attachments["config.yaml"] = dump_config(config).encode()
        write_weights(
            storage.path("checkpoints"),
            "step_00000000",
            tensors,
            {"imported_from": family.model_type},
            attachments,
            FILE_BYTES,
        )
    finally:
        source.close()
    checkpoint = storage.path("checkpoints", "step_00000000")
    with storage.open_write("config.yaml") as stream:
        stream.write(_config_text(config, checkpoint, storage, source.where).encode())
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    return Imported(checkpoint, storage.path("config.yaml"), family.model_type, total)


def _matched(
    source: TensorSource,
    family: Family,
    entries: list[Entry],
    shapes: Mapping[str, Shape],
    heads: int,
) -> dict[str, str]:
    """Name in the rows -> name in the files, when exactly the right tensors are there."""
    wanted = {e.theirs: e.layout.shape([shapes[n] for n in e.ours], heads) for e in entries}
    found: dict[str, str] = {}
    extra = []
    for name in source.names():
        canonical = family.canonical_name(name, wanted)
        if canonical in wanted:
            found[canonical] = name
        elif family.canonical_name(name, {family.tied_head: ()}) == family.tied_head:
            found[family.tied_head] = name
        elif not family.is_skipped(name):
            extra.append(name)
    lines = [f"missing: {name}" for name in wanted if name not in found]
    lines += [f"not in the model: {name}" for name in extra]
    for name, shape in wanted.items():
        if name in found and source.shape(found[name]) != shape:
            lines.append(f"{name}: the file has {source.shape(found[name])}, config.json {shape}")
        elif name in found and not source.dtype(found[name]).is_floating_point:
            lines.append(f"{name}: quantized ({source.dtype(found[name])})")
    if lines:
        raise UserError(
            f"the tensors of {source.where} are not those of its config.json:\n    "
            + "\n    ".join(folded(lines)),
            rule=f"a {family.model_type} of this config.json has exactly one tensor of each name "
            "and shape",
            remedy="check config.json (vocab_size, tie_word_embeddings, ...) and copy the files "
            "again",
        )
    if family.tied_head in found and family.tied_head not in wanted:
        embedding = next(e.theirs for e in entries if e.ours[0].endswith("tokens.weight"))
        _check_tied(source, found.pop(family.tied_head), found[embedding])
    return found


def _check_tied(source: TensorSource, head: str, embedding: str) -> None:
    """A tied model may hold its head a second time, if it is the same."""
    same = source.shape(head) == source.shape(embedding) and all(
        torch.equal(a, b)
        for a, b in zip(source.blocks(head), source.blocks(embedding), strict=True)
    )
    if not same:
        raise UserError(
            f"{source.where}: {head} differs from {embedding}, and tie_word_embeddings is true",
            rule="tied weights are one tensor",
            remedy="set tie_word_embeddings to false in config.json",
        )


def _streams(
    source: TensorSource,
    entries: list[Entry],
    names: Mapping[str, str],
    shapes: Mapping[str, Shape],
    heads: int,
    dtype: torch.dtype | None,
) -> Iterator[TensorStream]:
    for entry in entries:
        stored = names[entry.theirs]
        kept = dtype or source.dtype(stored)
        for index, name in enumerate(entry.ours):
            yield TensorStream(
                name, kept, shapes[name], _Part(source, entry, stored, shapes, heads, index, kept)
            )


@dataclass(frozen=True)
class _Part:
    """The blocks of one parameter of ours, read when they are asked for."""

    source: TensorSource
    entry: Entry
    stored: str
    shapes: Mapping[str, Shape]
    heads: int
    index: int
    dtype: torch.dtype

    def __call__(self) -> Iterator[torch.Tensor]:
        if self.entry.layout.is_plain:
            for block in self.source.blocks(self.stored):
                yield block.to(self.dtype)
            return
        shapes = [self.shapes[name] for name in self.entry.ours]
        parts = self.entry.layout.split(self.source.read(self.stored), shapes, self.heads)
        yield parts[self.index].to(self.dtype)


def _check_vocabulary(files: Mapping[str, bytes], model: ModelConfig, where: str) -> None:
    if not files:
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        known = load_tokenizer(folder).vocab_size
    if model.vocab_size is not None and known > model.vocab_size:
        raise UserError(
            f"the tokenizer of {where} has {known} ids, its config.json vocab_size = "
            f"{model.vocab_size}",
            rule="every id that the tokenizer gives needs a row of the embedding",
            remedy="give the tokenizer that belongs to these weights, or remove its files to "
            "import the weights alone",
        )


def _config_text(config: Config, checkpoint: str, storage: Storage, where: str) -> str:
    """A config file that trains on from the import; data.path is left to the user."""
    defaults = ModelConfig().model_dump(mode="json")
    given = config.model.model_dump(mode="json")
    model = {name: value for name, value in given.items() if value != defaults[name]}
    tree: dict[str, Any] = {
        "run": {"output_dir": storage.path("run")},
        "model": model,
        "checkpoint": {"init_from": checkpoint},
    }
    return (
        f"# {where} as a start for continued pretraining:\n"
        f"#   megascale train {storage.path('config.yaml')} data.path=...\n"
        f"# with data tokenized by {checkpoint}/tokenizer. model.seq_length may be lowered where\n"
        "# positions are rotary; the rest of model describes the weights.\n" + dump_yaml(tree)
    )
