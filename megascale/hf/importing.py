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
from megascale.hf.matching import match_tensors
from megascale.hf.registry import family_of
from megascale.hf.source import SafetensorsFolder, TensorSource
from megascale.models.initialization import initial_value

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
    drawn: tuple[str, ...] = ()
    """Parameters of heads that the files lack, drawn as those of a new model are."""
    left_out: tuple[str, ...] = ()
    """Tensors of heads that the model has no use for."""


def open_source(path: str) -> TensorSource:
    """Open a folder of transformers or a .gguf file."""
    if path.endswith(".gguf"):
        from megascale.hf.gguf import GGUFSource

        return GGUFSource(path)
    return SafetensorsFolder(path)


def import_model(
    path: str,
    out: str,
    shapes_of: ShapesOf,
    dtype: torch.dtype | None = None,
    sentence_objective: str | None = None,
) -> Imported:
    """Write `out`/checkpoints/step_00000000 and `out`/config.yaml from a model of transformers.

    Args:
        path: folder with config.json and safetensors, or a .gguf file.
        out: a folder that does not exist yet or is empty.
        shapes_of: parameter names and shapes of the model that a config describes.
        dtype: in which weights are stored; None: each as it is found. Training reads any of them
            into fp32 masters.
        sentence_objective: "none", "nsp" or "sop", which files of a BERT do not tell apart; None:
            nsp where the files have a head for it.

    Raises:
        UserError: a family, setting, tensor or vocabulary that does not fit (all are listed).
    """
    storage = Storage(out)
    require_empty(storage)
    source = open_source(path)
    try:
        family = family_of(source.config, source.where)
        settings = simplified(family.read_config(source.config))
        data = {"path": NO_DATA, **_objective(source, family, sentence_objective)}
        config = load_config({"model": settings, "data": data})
        shapes = shapes_of(config)
        entries = family.entries(shapes, config.model.num_layers)
        match = match_tensors(source, family, entries, shapes, config.model.num_attention_heads)
        files = source.tokenizer_files()
        check_vocabulary(files, config.model, source.where)
        tensors = parameter_streams(source, entries, match.stored, shapes, config, dtype)
        attachments = {f"tokenizer/{name}": content for name, content in files.items()}
        attachments["config.yaml"] = dump_config(config).encode()
        write_weights(
            storage.path("checkpoints"),
            "step_00000000",
            tensors,
            {"imported_from": family.model_type, "drawn": list(match.drawn)},
            attachments,
            FILE_BYTES,
        )
    finally:
        source.close()
    checkpoint = storage.path("checkpoints", "step_00000000")
    with storage.open_write("config.yaml") as stream:
        stream.write(config_text(config, checkpoint, storage, source.where).encode())
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    return Imported(
        checkpoint,
        storage.path("config.yaml"),
        family.model_type,
        total,
        match.drawn,
        match.left_out,
    )


def require_empty(storage: Storage) -> None:
    """Raise a UserError when something is in the folder that an import would write to."""
    if storage.exists() and storage.fs.ls(storage.root):
        raise UserError(
            f"{storage.url} exists and is not empty",
            rule="an import does not overwrite anything",
            remedy="choose another folder",
        )


def _objective(source: TensorSource, family: Family, wanted: str | None) -> dict[str, str]:
    """data.sentence_objective for a family that has one: as wanted, or as the files look."""
    if not family.sentence_head:
        if wanted is None:
            return {}
        raise UserError(
            f"--sentence-objective {wanted} for {source.where}, a {family.model_type}",
            rule="only a bert has a sentence objective",
            remedy="leave it out",
        )
    has_head = any(
        family.canonical_name(name, {family.sentence_head}) == family.sentence_head
        for name in source.names()
    )
    return {"sentence_objective": wanted or ("nsp" if has_head else "none")}


def parameter_streams(
    source: TensorSource,
    entries: list[Entry],
    names: Mapping[str, str],
    shapes: Mapping[str, Shape],
    config: Config,
    dtype: torch.dtype | None,
) -> Iterator[TensorStream]:
    """Our parameters in the order of `entries`, made from their tensors while they are written.

    Args:
        names: their name -> the name in `source`; a parameter without one is drawn.
        dtype: in which they are written; None: each as it is found.
    """
    heads = config.model.num_attention_heads
    for entry in entries:
        stored = names.get(entry.theirs)
        if stored is None:
            yield from _drawn(entry, shapes, config, dtype or torch.float32)
            continue
        kept = dtype or source.dtype(stored)
        for index, name in enumerate(entry.ours):
            yield TensorStream(
                name, kept, shapes[name], _Part(source, entry, stored, shapes, heads, index, kept)
            )


def _drawn(
    entry: Entry, shapes: Mapping[str, Shape], config: Config, dtype: torch.dtype
) -> Iterator[TensorStream]:
    """Parameters of a head as a new run of the same seed draws them."""
    for name in entry.ours:

        def blocks(name: str = name) -> Iterator[torch.Tensor]:
            value = initial_value(
                name,
                shapes[name],
                config.run.seed,
                init_std=config.model.init_std,
                num_layers=None,  # heads end no residual branch
            )
            yield value.to(dtype)

        yield TensorStream(name, dtype, shapes[name], blocks)


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


def check_vocabulary(files: Mapping[str, bytes], model: ModelConfig, where: str) -> None:
    """Raise a UserError when a tokenizer has more ids than the embedding has rows."""
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


def config_text(config: Config, checkpoint: str, storage: Storage, where: str) -> str:
    """A config file that trains on from the import; data.path is left to the user."""
    defaults = ModelConfig().model_dump(mode="json")
    given = config.model.model_dump(mode="json")
    model = {name: value for name, value in given.items() if value != defaults[name]}
    objective = {"sentence_objective": config.data.sentence_objective}
    objective = objective if config.data.sentence_objective != "none" else {}
    tree: dict[str, Any] = {
        "run": {"output_dir": storage.path("run")},
        "model": model,
        **({"data": objective} if objective else {}),
        "checkpoint": {"init_from": checkpoint},
    }
    bert = " --bert" if config.model.family == "bert" else ""
    rotary = config.model.position_embedding == "rope"
    free = "model.seq_length may be lowered; the rest of " if rotary else ""
    return (
        f"# {where} as a start for continued pretraining:\n"
        f"#   python -m data_prep tokenize{bert} --tokenizer {checkpoint}/tokenizer ...\n"
        f"#   megascale train {storage.path('config.yaml')} data.path=...\n"
        f"# {free}model describes the weights.\n" + dump_yaml(tree)
    )
