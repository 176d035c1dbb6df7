"""What DeepSpeed's save_checkpoint wrote, for ZeRO stages 0 to 3.

A ZeRO checkpoint keeps fp32 weights and moments in flat vectors, cut evenly over the ranks. Stages
1 and 2 flatten a parameter group, parameter after parameter, and cut the result; stage 3 cuts every
parameter by itself, the last part padded. `param_shapes` in the model's file gives the order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megascale.errors import UserError
from megascale.importers.source import Found, Parts
from megascale.importers.torch_files import load_file

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""States of an optimizer that have a kind in our format, under the same name."""
STAND_INS = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
_FLAT = "single_partition_of_fp32_groups"
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_KNOWN = (
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes"),
    *("shared_params", "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd"),
    *("skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size"),
    *("ds_config", "ds_version", "checkpoint_parallel_dimensions", "sparse_tensor_module_names"),
    *("csr_tensor_module_names", "iteration", "num_experts"),
)
Shape = tuple[int, ...]


def read_deepspeed(path: str) -> Found:
    """Open what DeepSpeed saved; tensors stay in their files until they are read.

    Args:
        path: the folder given to save_checkpoint, or one global_stepN in it.

    Raises:
        UserError: no such checkpoint, one of tensor or pipeline parallelism or of experts, files
            that are missing, or that need code to be read.
    """
    folder = _step_folder(Path(path))
    model_files, optimizer_files = _files(folder)
    models = [load_file(file, STAND_INS) for file in model_files]
    if not optimizer_files:
        return _without_zero(folder, models[0])
    states = [dict(load_file(f, STAND_INS)["optimizer_state_dict"]) for f in optimizer_files]
    _require_all_ranks(folder, states)
    stage_3 = "fp32_flat_groups" in states[0]
    weights = [s["fp32_flat_groups" if stage_3 else _FLAT] for s in states]
    groups = [{n: tuple(s) for n, s in group.items()} for group in models[0]["param_shapes"]]
    whole = {name: shape for group in groups for name, shape in group.items()}
    paddings = states[0].get("param_alignment_paddings")

    def sliced(vectors: Sequence[Sequence[Tensor]]) -> dict[str, Parts]:
        cut = _stage_3(whole, vectors) if stage_3 else _stages_1_2(groups, vectors, paddings)
        return {name: Parts(whole[name], views) for name, views in cut}

    moments, updates, lost = _moments([_inner(state, stage_3) for state in states], weights)
    frozen = _frozen(models, stage_3)
    if frozen and moments:
        moments, updates = {}, 0
        lost.append("the optimizer's moments: some parameters were frozen and have none")
    master = {**sliced(weights), **frozen}
    aliases = models[0].get("shared_params") or {}
    kinds = {"master": {**master, **{new: master[old] for new, old in aliases.items()}}}
    return Found(
        program="deepspeed",
        where=str(folder),
        step=int(models[0].get("global_steps", 0)),
        updates=updates,
        kinds=kinds | {kind: sliced(vectors) for kind, vectors in moments.items()},
        settings=_settings(models[0], _inner(states[0], stage_3)),
        lost=(*_lost(models[0]), *lost),
    )


def _require_all_ranks(folder: Path, states: Sequence[Mapping[str, Any]]) -> None:
    count = states[0]["partition_count"]
    count = count if isinstance(count, int) else max(count)
    if count != len(states):
        raise _missing(folder, f"files: {len(states)} of {count} *_optim_states.pt are there")


def _step_folder(path: Path) -> Path:
    if "://" in str(path) or not path.is_dir():
        raise _missing(path, "a local folder")
    latest = path / "latest"
    if latest.is_file():
        named = path / latest.read_text().strip()
        if named.parent != path or not named.is_dir():
            raise _missing(path, f"the folder {named.name} that its file `latest` names")
        return named
    return path


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The model's files and the optimizer's, by rank; refuses what cannot be put together."""
    names = sorted(entry.name for entry in folder.iterdir())
    layers = [name for name in names if re.match(r"layer_\d+.*model_states\.pt", name)]
    if layers:
        kind = "experts" if "expert" in layers[0] else "a pipeline"
        raise UserError(
            f"{folder} was saved by {kind} of DeepSpeed: {layers[0]}",
            rule="checkpoints of one module are read, with ZeRO stage 0 to 3",
            remedy="save the whole model from the program that trained it, then convert from-hf",
        )
    models = [match for match in map(_MODEL.fullmatch, names) if match]
    optimizers = [match for match in map(_OPTIMIZER.fullmatch, names) if match]
    if not models:
        raise _missing(folder, "mp_rank_00_model_states.pt or zero_pp_rank_0_mp_rank_00_...")
    cuts = {match.group(2) for match in (*models, *optimizers)}
    if len(cuts) > 1:
        raise UserError(
            f"{folder} was saved by {len(cuts)} tensor-parallel ranks",
            rule="DeepSpeed does not say how its tensors are cut, so they cannot be put together",
            remedy="save with one such rank, or use convert from-megatron for Megatron-LM's models",
        )

    def by_rank(matches: list[re.Match[str]]) -> list[Path]:
        ordered = sorted(matches, key=lambda match: int(match.group(1) or 0))
        ranks = [int(match.group(1) or 0) for match in ordered]
        if ranks != list(range(len(ranks))):
            raise _missing(folder, f"the files of ranks between {ranks}")
        return [folder / match.string for match in ordered]

    return by_rank(models), by_rank(optimizers)


def _missing(folder: Path, what: str) -> UserError:
    return UserError(
        f"{folder} lacks {what}",
        rule="a checkpoint of DeepSpeed is a folder with `latest` and global_stepN/, which holds "
        "*_model_states.pt and, with ZeRO, *_optim_states.pt of every rank",
        remedy="give the folder that save_checkpoint was given, copied whole",
    )


def _stages_1_2(
    shapes: Sequence[Mapping[str, Shape]],
    vectors: Sequence[Sequence[Tensor]],
    paddings: Sequence[Sequence[int]] | None,
) -> Iterator[tuple[str, list[Tensor]]]:
    """(name, views): each group is one vector, cut over the ranks.

    Args:
        vectors: by rank and group, 1-D.
    """
    for index, group in enumerate(shapes):
        position = 0
        parts = [rank[index].reshape(-1) for rank in vectors]
        for number, (name, shape) in enumerate(group.items()):
            numel = math.prod(shape)
            yield name, _cut(parts, position, numel, name)
            position += numel + (paddings[index][number] if paddings else 0)


def _cut(parts: Sequence[Tensor], start: int, numel: int, name: str) -> list[Tensor]:
    """Elements [start, start + numel) of the joined parts."""
    views, left, position = [], numel, start
    for part in parts:
        if left and position < len(part):
            count = min(left, len(part) - position)
            views.append(part[position : position + count])
            left -= count
            position += count
        position -= len(part)
    if left:
        raise _short(name, left)
    return views or [parts[0][:0]]


def _stage_3(
    shapes: Mapping[str, Shape], vectors: Sequence[Sequence[Tensor]]
) -> Iterator[tuple[str, list[Tensor]]]:
    """(name, views): each parameter is cut over the ranks, in equal parts that end in padding."""
    group = position = 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        share = -(-numel // len(vectors))
        while group < len(vectors[0]) and position >= vectors[0][group].numel():
            group, position = group + 1, 0
        if share and (group == len(vectors[0]) or position + share > vectors[0][group].numel()):
            raise _short(name, numel)
        views = []
        for rank, flats in enumerate(vectors):
            real = max(0, min(share, numel - rank * share))
            if real:
                views.append(flats[group].reshape(-1)[position : position + real])
        position += share
        yield name, views or [vectors[0][0].reshape(-1)[:0]]


def _short(name: str, left: int) -> UserError:
    return UserError(
        f"the files lack {left} elements of {name}",
        rule="the ranks' vectors hold every parameter of param_shapes",
        remedy="copy the checkpoint again, with the files of all ranks",
    )


def _inner(state: Mapping[str, Any], stage_3: bool) -> Any:
    """The state_dict of the torch optimizer inside."""
    return state.get("optimizer_state_dict" if stage_3 else "base_optimizer_state")


def _moments(
    inner: Sequence[Any], weights: Sequence[Sequence[Tensor]]
) -> tuple[dict[str, list[list[Tensor]]], int, list[str]]:
    """(kind -> vectors by rank and group, the optimizer's step, what is lost)."""
    groups = len(weights[0])
    rows = [each.get("state", {}) if isinstance(each, dict) else {} for each in inner]
    if any(list(row) != list(range(groups)) for row in rows):
        return {}, 0, ["the optimizer's moments: not stored group by group"]
    found: dict[str, list[list[Tensor]]] = {}
    lost = []
    for kind in dict.fromkeys(key for row in rows for group in row.values() for key in group):
        vectors = [[row[g].get(kind) for g in range(groups)] for row in rows]
        if kind == "step":
            continue
        fits = kind in MOMENTS and all(
            isinstance(vector, Tensor) and vector.numel() >= weight.numel()
            for ours, theirs in zip(vectors, weights, strict=True)
            for vector, weight in zip(ours, theirs, strict=True)
        )
        if fits:
            found[kind] = vectors
        else:
            lost.append(f"state {kind!r} of the optimizer")
    steps = {int(row[g].get("step", 0)) for row in rows for g in range(groups)}
    if found and len(steps) != 1:
        return {}, 0, [*lost, f"the optimizer's moments: groups are at the steps {sorted(steps)}"]
    return found, steps.pop() if found else 0, lost


def _frozen(models: Sequence[Mapping[str, Any]], stage_3: bool) -> dict[str, Parts]:
    """Parameters that were not trained: whole in stages 1 and 2, cut as all others in stage 3."""
    found = {}
    for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
        holders = models if stage_3 else models[:1]
        parts = [model["frozen_param_fragments"][name].reshape(-1) for model in holders]
        found[name] = Parts(tuple(shape), _cut(parts, 0, math.prod(shape), name))
    return found


def _without_zero(folder: Path, model: Mapping[str, Any]) -> Found:
    """Stage 0: the module's own tensors; fp32 masters and moments have no names there."""
    buffers = set(model.get("buffer_names") or ())
    module = {
        n: t for n, t in model["module"].items() if isinstance(t, Tensor) and n not in buffers
    }
    tensors = {n: Parts(tuple(t.shape), [t.reshape(-1)]) for n, t in module.items()}
    lost = []
    if model.get("optimizer"):
        lost = ["the optimizer's state: without ZeRO DeepSpeed stores it without names"]
    types = {t.dtype for t in module.values()}
    if types != {torch.float32}:
        lost.append("digits of the weights: the module's low-precision copy is what has names")
    return Found(
        program="deepspeed",
        where=str(folder),
        step=int(model.get("global_steps", 0)),
        updates=0,
        kinds={"master": tensors},
        settings=_settings(model, None),
        lost=(*_lost(model), *lost),
    )


def _lost(model: Mapping[str, Any]) -> list[str]:
    lost = ["position in the data, and random state: DeepSpeed stores neither"]
    if model.get("lr_scheduler"):
        lost.append(
            "state of the learning-rate scheduler: a schedule here is a function of the step"
        )
    lost += [f"client_state[{key!r}]" for key in model if key not in _KNOWN]
    if model.get("buffer_names"):
        lost.append(f"buffers: {', '.join(model['buffer_names'])}")
    return lost


def _settings(model: Mapping[str, Any], inner: Any) -> dict[str, Any]:
    groups = inner.get("param_groups", ()) if isinstance(inner, dict) else ()
    return {
        "deepspeed": model.get("ds_version"),
        "ds_config": model.get("ds_config"),
        "optimizer_groups": [
            {key: value for key, value in group.items() if key != "params"} for group in groups
        ],
    }
