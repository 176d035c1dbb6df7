"""Cutting an untouched model by a table: name pattern -> style.

The table (`Plan`) is data and belongs to the model family. It is the one source of truth for how
a tensor is split: this module applies it, checkpoints and the planner read the boxes that come
from it.

Styles:
    column      nn.Linear cut along its outputs; `unit` outputs stay together (a head). Those with
                the same parent read the same input
    row         nn.Linear cut along its inputs, likewise
    vocab       nn.Embedding cut along its ids
    head        a module whose own parameters, (V, D) or (V,), are cut along V, and that is given
                a tied weight cut likewise
    decoder     the same behind a `leave`: its input is whole on each rank in any case
    positions   nn.Embedding of few rows, whole on each rank, looked up for the own part of T
    sequence    a module with whole parameters inside the sequence-parallel region
    heads       a module with whole parameters that sees only the local heads
    drop_heads  a dropout over (H, ...): tell it which heads it sees
    drop_sequence  a dropout over (T, ...) inside the sequence-parallel region
    leave       the end of the sequence-parallel region in front of what all ranks compute alike
Sharding needs no padding: a vocabulary or width that the group does not divide is cut into parts
whose sizes differ by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch.distributed as dist
from torch import nn

from megascale.errors import UserError
from megascale.parallel.collectives import copy_to_group, gather_sequence, leave_sequence
from megascale.parallel.fragment import Box, whole_box
from megascale.parallel.layers import (
    ColumnParallelLinear,
    FanOut,
    ReplicatedParameters,
    RowParallelLinear,
    SequenceSlicedEmbedding,
    VocabParallelEmbedding,
)

Style = Literal[
    "column",
    "row",
    "vocab",
    "head",
    "decoder",
    "positions",
    "sequence",
    "heads",
    "drop_heads",
    "drop_sequence",
    "leave",
]


@dataclass(frozen=True)
class Rule:
    """One line of a plan.

    Attributes:
        style: how the module is cut.
        unit: features that must stay together (head width); 1 for any cut.
    """

    style: Style
    unit: int = 1


Plan = Mapping[str, Rule]
"""Pattern of module names (`*` stands for one dotted part) -> rule."""


@dataclass(frozen=True)
class Placement:
    """Where a rank's parameter lies in the global tensor.

    Attributes:
        global_shape: shape of the whole tensor.
        box: the half-open interval of each dimension that this rank holds.
        sharded: whether the ranks of the tensor-parallel group hold different parts.
        rule: the line of the plan that decided it, for messages ("" for replicated by default).
    """

    global_shape: tuple[int, ...]
    box: Box
    sharded: bool
    rule: str = ""

    def counts_on(self, tp_rank: int) -> bool:
        """Whether this rank speaks for it: of copies over the tensor-parallel group the first."""
        return self.sharded or tp_rank == 0


@dataclass(frozen=True)
class TensorGroup:
    """The ranks that share every matrix, as a module's cut needs them.

    Attributes:
        fans: parent module -> its column-parallel layers, which read the same input.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    sequence_parallel: bool
    fans: dict[str, FanOut] = field(default_factory=dict)


def interval(length: int, unit: int, rank: int, size: int, name: str) -> tuple[int, int]:
    """The part of `length` features, in whole units, that `rank` of `size` keeps.

    Raises:
        UserError: units of more than one feature (heads) that the group does not divide, or fewer
            units than ranks.
    """
    units = length // unit
    if (unit > 1 and units % size) or units < size:
        what = "heads" if unit > 1 else "rows"
        raise UserError(
            f"{name} has {units} {what} for parallel.tensor_parallel_size {size}",
            rule=f"the number of {what} must be "
            + ("a multiple of the group size" if unit > 1 else "at least the group size"),
            remedy=f"use a tensor_parallel_size that divides {units}"
            if unit > 1
            else f"use a tensor_parallel_size of at most {units}",
        )
    return rank * units // size * unit, (rank + 1) * units // size * unit


_Line = TypeVar("_Line")


def match(plan: Mapping[str, _Line], name: str) -> tuple[str, _Line] | None:
    """The plan's line for a module name, and its pattern."""
    for pattern, rule in plan.items():
        if re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), name):
            return pattern, rule
    return None


def matched(
    module: nn.Module, plan: Mapping[str, _Line]
) -> Iterator[tuple[str, nn.Module, str, _Line]]:
    """(name, submodule, pattern, line) of every submodule that the plan names.

    Raises:
        ValueError: at the end, for lines of the plan that fit no module.
    """
    used: set[str] = set()
    for name, child in list(module.named_modules()):
        found = match(plan, name)
        if found is not None:
            used.add(found[0])
            yield name, child, *found
    unused = set(plan) - used
    if unused:
        raise ValueError(f"plan lines that fit no module: {sorted(unused)}")


def whole_placements(module: nn.Module) -> dict[str, Placement]:
    """Placements of an uncut module."""
    return {
        name: Placement(tuple(p.shape), whole_box(tuple(p.shape)), sharded=False)
        for name, p in module.named_parameters()
    }


def parallelize(module: nn.Module, plan: Plan, tensor: TensorGroup) -> dict[str, Placement]:
    """Cut `module` in place over the ranks of `tensor`; it may be on the meta device.

    Returns:
        where each parameter of the cut module lies, by its (unchanged) name.

    Raises:
        UserError: sizes that cannot be cut.
        ValueError: a line of the plan that fits no module.
    """
    placements = whole_placements(module)
    for name, child, pattern, rule in matched(module, plan):
        new = _CUTTERS[rule.style](child, rule, tensor, name)
        if new is not child:
            replace_module(module, name, new)
        _record(placements, name, child, new, f"{pattern}: {rule.style}", tensor, rule)
    assert placements.keys() == dict(module.named_parameters()).keys()
    return placements


def _record(
    placements: dict[str, Placement],
    name: str,
    old: nn.Module,
    new: nn.Module,
    line: str,
    tensor: TensorGroup,
    rule: Rule,
) -> None:
    """Write down where the parameters of a cut module lie."""
    for key, parameter in new.named_parameters(prefix=name, recurse=False):
        before = placements[key]
        box = []
        for size, local in zip(before.global_shape, parameter.shape, strict=True):
            if size == local:
                box.append((0, size))
            else:
                box.append(interval(size, rule.unit, tensor.rank, tensor.size, key))
        sharded = tuple(box) != before.box
        placements[key] = Placement(before.global_shape, tuple(box), sharded, line)


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the submodule of this dotted name is."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, new)


def _column(child: nn.Module, rule: Rule, tensor: TensorGroup, name: str) -> nn.Module:
    assert isinstance(child, nn.Linear), name
    rows = interval(child.out_features, rule.unit, tensor.rank, tensor.size, name)
    fan = tensor.fans.setdefault(name.rpartition(".")[0], FanOut())
    return ColumnParallelLinear(child, rows, tensor.group, tensor.sequence_parallel, fan)


def _row(child: nn.Module, rule: Rule, tensor: TensorGroup, name: str) -> nn.Module:
    assert isinstance(child, nn.Linear), name
    columns = interval(child.in_features, rule.unit, tensor.rank, tensor.size, name)
    return RowParallelLinear(child, columns, tensor.group, tensor.sequence_parallel)


def _vocab(child: nn.Module, rule: Rule, tensor: TensorGroup, name: str) -> nn.Module:
    assert isinstance(child, nn.Embedding), name
    rows = interval(child.num_embeddings, rule.unit, tensor.rank, tensor.size, name)
    return VocabParallelEmbedding(child, rows, tensor.group, tensor.sequence_parallel)


def _head(child: nn.Module, rule: Rule, tensor: TensorGroup, name: str) -> nn.Module:
    """The module stays; its input is gathered (or its gradient summed), its parameters are cut."""
    for key, whole in list(child.named_parameters(recurse=False)):
        begin, end = interval(whole.shape[0], rule.unit, tensor.rank, tensor.size, name)
        setattr(child, key, nn.Parameter(whole.detach()[begin:end].clone()))
    cut_input = tensor.sequence_parallel and rule.style == "head"
    enter = gather_sequence if cut_input else copy_to_group

    def gather_input(_: nn.Module, args: tuple) -> tuple:
        return (enter(args[0], tensor.group), *args[1:])

    child.register_forward_pre_hook(gather_input)
    return child


def _positions(child: nn.Module, rule: Rule, tensor: TensorGroup, name: str) -> nn.Module:
    assert isinstance(child, nn.Embedding), name
    if not tensor.sequence_parallel:
        return child
    return SequenceSlicedEmbedding(child, tensor.group)


def _sequence(child: nn.Module, rule: Rule, tensor: TensorGroup, name: str) -> nn.Module:
    return ReplicatedParameters(child, tensor.group) if tensor.sequence_parallel else child


def _heads(child: nn.Module, rule: Rule, tensor: TensorGroup, name: str) -> nn.Module:
    return ReplicatedParameters(child, tensor.group)


def _drop_heads(child: nn.Module, rule: Rule, tensor: TensorGroup, name: str) -> nn.Module:
    child.set_shard(0, tensor.rank, tensor.size)  # type: ignore[operator]
    return child


def _drop_sequence(child: nn.Module, rule: Rule, tensor: TensorGroup, name: str) -> nn.Module:
    if tensor.sequence_parallel:
        child.set_shard(0, tensor.rank, tensor.size)  # type: ignore[operator]
    return child


def _leave(child: nn.Module, rule: Rule, tensor: TensorGroup, name: str) -> nn.Module:
    if tensor.sequence_parallel:
        child.register_forward_hook(lambda _, args, out: leave_sequence(out, tensor.group))
    return child


_Cutter = Callable[[nn.Module, Rule, TensorGroup, str], nn.Module]
_CUTTERS: dict[Style, _Cutter] = {
    "column": _column,
    "row": _row,
    "vocab": _vocab,
    "head": _head,
    "decoder": _head,
    "positions": _positions,
    "sequence": _sequence,
    "heads": _heads,
    "drop_heads": _drop_heads,
    "drop_sequence": _drop_sequence,
    "leave": _leave,
}
