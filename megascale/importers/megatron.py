"""What Megatron-LM's `--ckpt-format torch` wrote of a GPT, from any tensor and pipeline layout.

Both of its models are read: megatron.core's and the older one (`language_model`), whose names are
turned into the former's. docs/importers.md tells how tensors are cut and joined.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megascale.errors import UserError
from megascale.hf.family import EMBEDDING, Family, Row
from megascale.hf.layouts import JOINED, PLAIN, Layout, Shape
from megascale.importers.source import Found, Held, Made
from megascale.importers.torch_files import StandIn, load_file

STAND_INS = (
    *("argparse.Namespace", "types.SimpleNamespace", "signal.Signals", "_io.BytesIO"),
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    *("numpy.ndarray", "numpy.dtype", "_codecs.encode"),
)
"""Beside all of megatron's own classes: of its arguments, random states and FP8 scales."""
_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(_\d+)?")
_RENAMED = (
    (r"^(module|language_model)\.", ""),
    (r"^language_model\.", ""),
    (r"^(encoder|transformer)\.", "decoder."),
    (r"^word_embeddings_for_head\.", "output_layer."),
    (r"\.(self_)?attention\.query_key_value\.", ".self_attention.linear_qkv."),
    (r"\.(self_)?attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.mlp\.dense_h_to_4h\.", ".mlp.linear_fc1."),
    (r"\.mlp\.dense_4h_to_h\.", ".mlp.linear_fc2."),
    (r"\.post_attention_(layer)?norm\.", ".pre_mlp_layernorm."),
    (r"\.input_norm\.", ".input_layernorm."),
    (r"\.final_norm\.", ".final_layernorm."),
    (r"\.self_attention\.linear_qkv\.layer_norm_(weight|bias)", r".input_layernorm.\1"),
    (r"\.mlp\.linear_fc1\.layer_norm_(weight|bias)", r".pre_mlp_layernorm.\1"),
)
_ROWS_CUT = re.compile(r"(word_embeddings|output_layer|linear_qkv)\.|linear_fc1\.")
_COLUMNS_CUT = re.compile(r"(linear_proj|linear_fc2)\.weight$")


def _merge_groups(parts: Sequence[Tensor], heads: int) -> Tensor:
    query, key, value = parts
    groups = heads * key.shape[0] // query.shape[0]
    cut = [part.reshape(groups, -1, *part.shape[1:]) for part in (query, key, value)]
    return torch.cat(cut, dim=1).flatten(0, 1)


def _split_groups(tensor: Tensor, shapes: Sequence[Shape], heads: int) -> list[Tensor]:
    groups = heads * shapes[1][0] // shapes[0][0]
    widths = [shape[0] // groups for shape in shapes]
    cut = tensor.reshape(groups, sum(widths), *tensor.shape[1:]).split(widths, dim=1)
    return [part.reshape(shape) for part, shape in zip(cut, shapes, strict=True)]


GROUPED_HEADS = Layout(_merge_groups, _split_groups)
"""Group after group: its query heads, its key head, its value head."""


def family(gated: bool) -> Family:
    """The tensors of megatron.core's GPT; `gated` for swiglu, whose first matrix is two."""
    layer, ours = "decoder.layers.{layer}.", "model.layers.{layer}."
    attention = ours + "attention."
    parts = tuple(f"{attention}{part}.{{kind}}" for part in ("query", "key", "value"))
    up: tuple[Any, Layout] = (ours + "mlp.up.{kind}", PLAIN)
    if gated:
        up = ((ours + "mlp.gate.{kind}", ours + "mlp.up.{kind}"), JOINED)
    return Family(
        model_type="Megatron-LM GPT",
        architecture="",
        fields=(),
        rows=(
            Row("embedding.word_embeddings.weight", EMBEDDING),
            Row("embedding.position_embeddings.weight", "model.embedding.positions.weight"),
            Row(layer + "input_layernorm.{kind}", ours + "attention_norm.{kind}"),
            Row(layer + "self_attention.linear_qkv.{kind}", parts, GROUPED_HEADS),
            Row(layer + "self_attention.linear_proj.{kind}", attention + "output.{kind}"),
            Row(layer + "self_attention.q_layernorm.{kind}", attention + "query_norm.{kind}"),
            Row(layer + "self_attention.k_layernorm.{kind}", attention + "key_norm.{kind}"),
            Row(layer + "pre_mlp_layernorm.{kind}", ours + "mlp_norm.{kind}"),
            Row(layer + "mlp.linear_fc1.{kind}", *up),
            Row(layer + "mlp.linear_fc2.{kind}", ours + "mlp.down.{kind}"),
            Row("decoder.final_layernorm.{kind}", "model.final_norm.{kind}"),
            Row("output_layer.weight", "head.weight"),
        ),
        copies={"output_layer.weight": EMBEDDING},
    )


def read_megatron(path: str, vocab_size: int | None = None) -> tuple[Found, dict[str, Any]]:
    """Open what Megatron-LM saved, and its arguments; tensors stay in their files.

    Args:
        path: the folder given to --save, or one iter_XXXXXXX in it.
        vocab_size: rows of the embedding to keep; None: all, the padding's too.

    Raises:
        UserError: no such checkpoint, torch_dist or experts, files that are missing, do not fit
            together, or need code to be read.
    """
    folder = _step_folder(Path(path))
    grid = _files(folder)
    loaded = [[load_file(file, STAND_INS, "megatron") for file in row] for row in grid]
    first = loaded[0][0]
    args = _arguments(first, grid[0][0])
    _require_grid(folder, args, loaded)
    version = float(first.get("checkpoint_version", 0))
    pieces = _joined(loaded, str(folder))
    _require_layers(folder, args, pieces)
    tensors = {name: _tensor(name, parts, args, version) for name, parts in pieces.items()}
    args = _cut_vocabulary(tensors, args, vocab_size, str(folder))
    found = Found(
        program="megatron",
        where=str(folder),
        step=int(first.get("iteration") or 0),
        updates=0,
        kinds={"master": tensors},
        settings={"arguments": {k: v for k, v in args.items() if isinstance(v, _PLAIN)}},
        lost=_lost(folder, grid, first, tensors),
    )
    return found, args


_PLAIN = (int, float, str, bool, type(None))


def _step_folder(path: Path) -> Path:
    if "://" in str(path) or not path.is_dir():
        raise _missing(path, "a local folder")
    latest = path / "latest_checkpointed_iteration.txt"
    if not latest.is_file():
        return path
    text = latest.read_text().strip()
    name = text if text == "release" else f"iter_{int(text):07d}" if text.isdigit() else ""
    if not name or not (path / name).is_dir():
        raise _missing(path, f"the iteration {text!r} that {latest.name} names")
    return path / name


def _files(folder: Path) -> list[list[Path]]:
    """The files by pipeline and tensor rank."""
    if (folder / ".metadata").exists() or (folder / "metadata.json").exists():
        raise UserError(
            f"{folder} is of --ckpt-format torch_dist or zarr: its .metadata is a pickle of "
            "torch.distributed.checkpoint.metadata.Metadata",
            rule="nothing that needs code is read, and this one cannot be read without",
            remedy="load it in Megatron-LM with --ckpt-convert-format torch "
            "--ckpt-convert-save DIR, and convert DIR",
        )
    grid: dict[tuple[int, int], Path] = {}
    for entry in sorted(folder.iterdir()):
        match = _RANK.fullmatch(entry.name)
        if match is None:
            continue
        if match.group(3):
            raise _missing(folder, f"dense layers: {entry.name} is of expert parallelism")
        file = next((entry / n for n in _NAMES if (entry / n).is_file()), None)
        if file is None:
            raise _missing(entry, " or ".join(_NAMES))
        grid[int(match.group(2) or 0), int(match.group(1))] = file
    stages = 1 + max((stage for stage, _ in grid), default=-1)
    width = 1 + max((rank for _, rank in grid), default=-1)
    if not grid or len(grid) != stages * width:
        raise _missing(folder, f"ranks: {len(grid)} folders mp_rank_TT_PPP are there")
    return [[grid[stage, rank] for rank in range(width)] for stage in range(stages)]


_NAMES = ("model_optim_rng.pt", "model_rng.pt")


def _missing(folder: Path, what: str) -> UserError:
    return UserError(
        f"{folder} lacks {what}",
        rule="a checkpoint of Megatron-LM is a folder with latest_checkpointed_iteration.txt and "
        "iter_XXXXXXX/mp_rank_TT_PPP/model_optim_rng.pt of every tensor and pipeline rank",
        remedy="give the folder that --save named, copied whole",
    )


def _arguments(content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    args = content.get("args")
    state = args.state if isinstance(args, StandIn) else args
    if not isinstance(state, dict):
        raise UserError(
            f"{file} has no arguments",
            rule="Megatron-LM stores `args`, which describe the model",
            remedy="save it again with Megatron-LM's own save_checkpoint",
        )
    return dict(state)


def _require_grid(folder: Path, args: Mapping[str, Any], loaded: Sequence[Sequence[Any]]) -> None:
    for name, found in (
        ("pipeline_model_parallel_size", len(loaded)),
        ("tensor_model_parallel_size", len(loaded[0])),
    ):
        if args.get(name) not in (None, found):
            raise _missing(folder, f"ranks: {name} was {args[name]}, there are {found}")


def _require_layers(folder: Path, args: Mapping[str, Any], names: Iterable[str]) -> None:
    """A model of more layers than there are is not even built."""
    found = 1 + max((_global_name(name, 0)[1] for name in names), default=-1)
    if args.get("num_layers") not in (None, found):
        raise _missing(folder, f"layers: num_layers is {args['num_layers']}, there are {found}")


def _joined(loaded: Sequence[Sequence[Mapping[str, Any]]], where: str) -> dict[str, list[Tensor]]:
    """The tensors by global name, each as the parts of the tensor-parallel ranks."""
    found: dict[str, list[Tensor]] = {}
    layers = 0
    for chunk in _chunks(loaded[0][0]):
        for stage in loaded:
            ranks = [dict(_flat(rank[chunk])) for rank in stage]
            if any(set(rank) != set(ranks[0]) for rank in ranks):
                raise UserError(
                    f"{where}: the tensor-parallel ranks hold tensors of different names",
                    rule="each holds its part of every tensor of its stage",
                    remedy="copy the checkpoint again",
                )
            here = 0
            for name in ranks[0]:
                place, layer = _global_name(name, layers)
                here = max(here, layer + 1)
                # a tied head is there on the last stage too
                found.setdefault(place, [rank[name] for rank in ranks])
            layers += here
    return found


def _global_name(name: str, before: int) -> tuple[str, int]:
    """(the name with the model's layer number, the stage's; -1 outside layers)."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
    if match is None:
        return name, -1
    layer = int(match.group(1))
    return f"decoder.layers.{before + layer}.{match.group(2)}", layer


def _chunks(content: Mapping[str, Any]) -> list[str]:
    """Keys of the model's parts on one rank: several with an interleaved pipeline."""
    if "model" in content:
        return ["model"]
    names = [key for key in content if re.fullmatch(r"model\d+", key)]
    return sorted(names, key=lambda name: int(name[len("model") :]))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(megatron.core's name, tensor) of every tensor below."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, name + ".")
        elif isinstance(value, Tensor) and not name.endswith("_extra_state"):
            for pattern, new in _RENAMED:
                name = re.sub(pattern, new, name)
            yield name, value


def _tensor(name: str, parts: list[Tensor], args: Mapping[str, Any], version: float) -> Held:
    """The whole tensor of the ranks' parts.

    Raises:
        UserError: they are not equally large.
    """
    if any(part.shape != parts[0].shape for part in parts):
        raise UserError(
            f"{name} has the shapes {[tuple(part.shape) for part in parts]} on its ranks",
            rule="tensor-parallel ranks hold equal parts",
            remedy="copy the checkpoint again",
        )
    gated = bool(args.get("swiglu"))
    make: Callable[[], Tensor]
    shape = list(parts[0].shape)
    if ".linear_fc1." in name and gated:
        make = partial(_join_gates, parts)
        shape[0] *= len(parts)
    elif _ROWS_CUT.search(name):
        make = partial(torch.cat, parts)
        shape[0] *= len(parts)
        if ".linear_qkv." in name and version < 2:
            make = partial(_old_order, make, version, args["num_attention_heads"])
    elif _COLUMNS_CUT.search(name):
        make = partial(torch.cat, parts, 1)
        shape[1] *= len(parts)
    else:
        make = partial(_only_one, name, parts)
    if name.endswith("layernorm.weight") and args.get("apply_layernorm_1p"):
        make = partial(_plus_one, make)
    return Made(tuple(shape), parts[0].dtype, make)


def _plus_one(make: Callable[[], Tensor]) -> Tensor:
    return make() + 1


def _join_gates(parts: Sequence[Tensor]) -> Tensor:
    """Every rank has a part of the gate and then one of the other matrix."""
    gates, others = zip(*(part.chunk(2) for part in parts), strict=True)
    return torch.cat([*gates, *others])


def _old_order(make: Callable[[], Tensor], version: float, heads: int) -> Tensor:
    """Rows of checkpoint versions 0 (3, H, K) and 1 (H, K, 3) as (H, 3, K)."""
    tensor = make()
    rest = tensor.shape[1:]
    if version < 1:
        cut = tensor.reshape(3, heads, -1, *rest).transpose(0, 1)
    else:
        cut = tensor.reshape(heads, -1, 3, *rest).transpose(1, 2)
    return cut.reshape(tensor.shape)


def _only_one(name: str, parts: Sequence[Tensor]) -> Tensor:
    for rank, part in enumerate(parts):
        if not torch.equal(part, parts[0]):
            raise UserError(
                f"{name} differs between the tensor-parallel ranks 0 and {rank}",
                rule="what is not cut is the same on all of them",
                remedy="train with one tensor-parallel rank, or repair the checkpoint",
            )
    return parts[0]


def _cut_vocabulary(
    tensors: dict[str, Held], args: dict[str, Any], vocab_size: int | None, where: str
) -> dict[str, Any]:
    """Keep `vocab_size` rows; returns the arguments of what is kept."""
    embedding = tensors.get("embedding.word_embeddings.weight")
    rows = embedding.shape[0] if embedding is not None else args.get("padded_vocab_size")
    if vocab_size is None:
        return {**args, "padded_vocab_size": rows}
    if rows is None or vocab_size > rows:
        raise UserError(
            f"--vocab-size {vocab_size}",
            rule=f"{where} has {rows} rows, its padding included",
            remedy="give the tokenizer's number of ids, or leave it out to keep all rows",
        )
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in tensors:
            whole = tensors[name]
            cut = partial(_first_rows, whole, vocab_size)
            tensors[name] = Made((vocab_size, *whole.shape[1:]), whole.dtype, cut)
    return {**args, "padded_vocab_size": vocab_size}


def _first_rows(tensor: Held, count: int) -> Tensor:
    return tensor.read()[:count]


def _lost(
    folder: Path,
    grid: Sequence[Sequence[Path]],
    content: Mapping[str, Any],
    tensors: Mapping[str, Held],
) -> tuple[str, ...]:
    lost = ["position in the data: `consumed_train_samples` counts another order of samples"]
    apart = any((file.parent / "distrib_optim.pt").exists() for row in grid for file in row)
    if apart or "optimizer" in content:
        lost.append("the optimizer's state: Megatron stores it by number, not by name")
        if any(tensor.dtype != torch.float32 for tensor in tensors.values()):
            lost.append("digits of the weights: fp32 masters are in the optimizer's state")
    if "opt_param_scheduler" in content:
        lost.append(
            "state of the learning-rate scheduler: a schedule here is a function of the step"
        )
    if "rng_state" in content:
        lost.append("random states")
    return tuple(lost)
