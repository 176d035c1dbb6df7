"""From a neighbour's checkpoint to one of ours, with a report of what came over and what not."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megascale import __version__
from megascale.checkpoint.manager import step_name
from megascale.checkpoint.manifest import Manifest, tensor_key
from megascale.checkpoint.storage import Storage
from megascale.checkpoint.tensor_file import TensorStream
from megascale.checkpoint.writer import StreamedFile, grouped_by_size, write_streamed
from megascale.config.load import dump_config, load_config
from megascale.config.schema import Config
from megascale.errors import UserError
from megascale.hf.family import EMBEDDING, Family, Row
from megascale.hf.fields import simplified
from megascale.hf.importing import (
    FILE_BYTES,
    NO_DATA,
    ShapesOf,
    check_vocabulary,
    config_text,
    parameter_streams,
    require_empty,
)
from megascale.hf.layouts import Shape
from megascale.hf.matching import match_tensors
from megascale.hf.registry import family_of
from megascale.hf.source import read_model_folder
from megascale.importers.deepspeed import read_deepspeed
from megascale.importers.megatron import family, read_megatron
from megascale.importers.megatron_args import model_settings
from megascale.importers.source import Found, Held, PartsSource
from megascale.parallel.fragment import whole_box

REPORT_NAME = "import.json"
_WRAPPERS = 3  # names of wrappers before the module's own, as in module.model.transformer.wte


@dataclass(frozen=True)
class Report:
    """What an import did; also written as OUT/import.json.

    Attributes:
        program: that saved it. source: its folder. checkpoint: ours. config_file: to train on.
        step: steps that it was trained. updates: the optimizer's count of them; 0 without moments.
        kinds: states that came over. num_parameters: of the model.
        drawn: parameters that the source lacks, drawn as those of a new model are.
        left_out: tensors that the model has no use for.
        lost: what was saved and did not come over.
        settings: what the program was told, to copy into the config by hand.
    """

    program: str
    source: str
    checkpoint: str
    config_file: str
    step: int
    updates: int
    kinds: tuple[str, ...]
    num_parameters: int
    drawn: tuple[str, ...]
    left_out: tuple[str, ...]
    lost: tuple[str, ...]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class _Model:
    """What the tensors are the weights of, and what said so."""

    described: str
    config: Config
    family_of: Callable[[Mapping[str, Shape]], Family]
    tokenizer: Mapping[str, bytes]


def import_deepspeed(
    path: str, out: str, model: str | None, shapes_of: ShapesOf, dtype: torch.dtype | None = None
) -> Report:
    """Write `out`/checkpoints/step_XXXXXXXX, config.yaml and import.json from DeepSpeed's files.

    Args:
        path: the folder given to save_checkpoint, or one global_stepN in it.
        out: a folder that does not exist yet or is empty.
        model: what the module is: a folder of transformers or its config.json, or a config of
            megascale (.yaml); None: config.json in or above `path`.
        shapes_of: parameter names and shapes of the model that a config describes.
        dtype: in which weights are stored; None: each as it is found.

    Raises:
        UserError: see `read_deepspeed`, or a model that the tensors do not fit.
    """
    require_empty(Storage(out))
    with _understood(path, "DeepSpeed"):
        found = read_deepspeed(path)
    described = _described(model, path)
    with _understood(path, "DeepSpeed"):
        return _write(found, described, out, shapes_of, dtype)


def import_megatron(
    path: str,
    out: str,
    shapes_of: ShapesOf,
    dtype: torch.dtype | None = None,
    vocab_size: int | None = None,
) -> Report:
    """The same from Megatron-LM's files, which describe their model themselves.

    Args:
        vocab_size: rows of the embedding to keep; None: all, the padding's too.

    Raises:
        UserError: see `read_megatron` and `model_settings`.
    """
    require_empty(Storage(out))
    with _understood(path, "Megatron-LM"):
        found, args = read_megatron(path, vocab_size)
        config = _config(model_settings(args, found.where))
        table = family(gated=bool(args.get("swiglu")))
        model = _Model("the arguments in the file", config, lambda shapes: table, {})
        return _write(found, model, out, shapes_of, dtype)


@contextmanager
def _understood(path: str, program: str) -> Iterator[None]:
    """Turn what values of unforeseen types or shapes lead to into an error about the files.

    They are another program's, so there is no list of all that may be wrong with them.
    """
    try:
        yield
    except (UserError, OSError):
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        reason = (str(e).strip().splitlines() or [""])[0][:200]
        raise UserError(
            f"{path} does not hold what {program} writes: {type(e).__name__}: {reason}",
            rule="its values must have the types and shapes of docs/importers.md",
            remedy=f"copy the checkpoint again; if {program} wrote it like this, please report it "
            "with its version",
        ) from e


def _config(model: Mapping[str, Any], objective: str = "none") -> Config:
    data = {"path": NO_DATA, "sentence_objective": objective}
    return load_config({"model": dict(model), "data": data})


def _described(model: str | None, path: str) -> _Model:
    """The model of a DeepSpeed checkpoint, which says nothing about it."""
    if model is None:
        places = [Path(path), *Path(path).resolve().parents[:2]]
        near = next((place for place in places if (place / "config.json").is_file()), None)
        if near is None:
            raise UserError(
                f"{path}: no config.json is in it or above it",
                rule="DeepSpeed does not store what its module is",
                remedy="give --model: the folder or config.json of a model of transformers, or "
                "the config of a megascale model (.yaml)",
            )
        model = str(near)
    if model.endswith((".yaml", ".yml")):
        given = load_config(model, [f"data.path={NO_DATA}"])
        if given.model.vocab_size is None:
            raise UserError(
                f"{model}: model.vocab_size is not given",
                rule="an import has no data whose tokenizer would tell it",
                remedy="set model.vocab_size to the rows of the embedding; the config.yaml in a "
                "run's checkpoint has it",
            )
        config = _config(given.model.model_dump(), given.data.sentence_objective)
        return _Model(model, config, _own_names, {})
    values, tokenizer = read_model_folder(model)
    table = family_of(values, model)
    objective = "nsp" if table.sentence_head else "none"
    config = _config(simplified(table.read_config(values)), objective)
    return _Model(f"the config.json of {model}", config, lambda shapes: table, tokenizer)


def _own_names(shapes: Mapping[str, Shape]) -> Family:
    """A module of megascale itself: every tensor has its parameter's name."""
    return Family(
        model_type="megascale model",
        architecture="",
        fields=(),
        rows=tuple(Row(name, name) for name in shapes),
        copies={"head.weight": EMBEDDING},
    )


def _write(
    found: Found, model: _Model, out: str, shapes_of: ShapesOf, dtype: torch.dtype | None
) -> Report:
    storage, config = Storage(out), model.config
    shapes = shapes_of(config)
    table = model.family_of(shapes)
    entries = table.entries(shapes, config.model.num_layers)
    known = {entry.theirs for entry in entries} | table.head_tensors()
    wrapper = _wrapper(found.kinds["master"], table, known)
    sources = {
        kind: PartsSource(found.where, {}, _unwrapped(tensors, wrapper))
        for kind, tensors in found.kinds.items()
    }
    heads = config.model.num_attention_heads
    match = match_tensors(sources["master"], table, entries, shapes, heads, model.described)
    check_vocabulary(model.tokenizer, config.model, found.where)
    if match.drawn and len(sources) > 1:
        sources = {"master": sources["master"]}
        lost = "the optimizer's moments: parameters that the checkpoint lacks have none"
        found = replace(found, updates=0, lost=(*found.lost, lost))
    files = [
        _file(kind, group, shapes)
        for kind, source in sources.items()
        for group in grouped_by_size(
            parameter_streams(
                source, entries, match.stored, shapes, config, dtype if kind == "master" else None
            ),
            FILE_BYTES,
        )
    ]
    try:
        checkpoint, config_file = _commit(found, model, storage, files, tuple(sources), shapes)
    except BaseException:  # a tensor that cannot be put together is found while it is written
        storage.remove_folder("checkpoints")
        raise
    report = Report(
        program=found.program,
        source=found.where,
        checkpoint=checkpoint,
        config_file=config_file,
        step=found.step,
        updates=found.updates,
        kinds=tuple(sources),
        num_parameters=sum(torch.Size(shape).numel() for shape in shapes.values()),
        drawn=match.drawn,
        left_out=match.left_out,
        lost=found.lost,
        settings=found.settings,
    )
    with storage.open_write(REPORT_NAME) as stream:
        stream.write(json.dumps(asdict(report), indent=1, default=str).encode())
    return report


def _commit(
    found: Found,
    model: _Model,
    storage: Storage,
    files: list[StreamedFile],
    kinds: tuple[str, ...],
    shapes: Mapping[str, Shape],
) -> tuple[str, str]:
    """Write the checkpoint and the config beside it; returns both paths."""
    attachments = {f"tokenizer/{name}": content for name, content in model.tokenizer.items()}
    attachments["config.yaml"] = dump_config(model.config).encode()
    manifest = Manifest(
        written_by=f"megascale {__version__}",
        step=found.step,
        world_size=1,
        kinds=kinds,
        parameters=dict(shapes),
        files=(),
        pieces=(),
        state={"imported_from": found.program, "updates": found.updates},
    )
    folder = Storage(storage.location("checkpoints"))
    write_streamed(folder, step_name(found.step), files, manifest, attachments)
    checkpoint = folder.path(step_name(found.step))
    with storage.open_write("config.yaml") as stream:
        text = config_text(model.config, checkpoint, storage, found.where)
        stream.write(text.encode())
    return checkpoint, storage.location("config.yaml")


def _file(kind: str, group: list[TensorStream], shapes: Mapping[str, Shape]) -> StreamedFile:
    flat = [
        replace(each, key=tensor_key(kind, each.key), shape=(torch.Size(each.shape).numel(),))
        for each in group
    ]
    return StreamedFile(flat, [(each.key, kind, whole_box(shapes[each.key])) for each in group])


def _wrapper(tensors: Mapping[str, Held], table: Family, known: Container[str]) -> str:
    """What all names begin with that is no part of the model's own names; "" for nothing."""
    names = list(tensors)
    prefix = ""
    for _ in range(_WRAPPERS + 1):
        if any(table.canonical_name(name[len(prefix) :], known) in known for name in names):
            return prefix
        longer = names[0][: names[0].find(".", len(prefix)) + 1] if names else ""
        if len(longer) <= len(prefix) or not all(name.startswith(longer) for name in names):
            return ""
        prefix = longer
    return ""


def _unwrapped(tensors: Mapping[str, Held], prefix: str) -> dict[str, Held]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
