"""Which tensor of a file is which parameter: exactly the right ones, or a list of what is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from megascale.checkpoint.name_lists import folded
from megascale.errors import UserError
from megascale.hf.family import Entry, Family
from megascale.hf.layouts import Shape
from megascale.hf.source import TensorSource


@dataclass(frozen=True)
class Match:
    """What the files hold of a model.

    Attributes:
        stored: name in the family's rows -> name in the files.
        drawn: parameters of ours that belong to heads which the files lack.
        left_out: tensors of the files that belong to heads which the model lacks.
    """

    stored: Mapping[str, str]
    drawn: tuple[str, ...]
    left_out: tuple[str, ...]


def match_tensors(
    source: TensorSource,
    family: Family,
    entries: Sequence[Entry],
    shapes: Mapping[str, Shape],
    heads: int,
    described: str = "its config.json",
) -> Match:
    """Find every tensor of `entries` in the files.

    Args:
        shapes: our parameters' shapes by name.
        heads: number of query heads.
        described: what says which tensors these are, for errors.

    Raises:
        UserError: tensors that are missing, too many, of another shape or quantized; all are
            listed. Heads that are missing as a whole are no mistake.
    """
    wanted = {e.theirs: e.layout.shape([shapes[n] for n in e.ours], heads) for e in entries}
    tied = {name: _holder(entries, ours) for name, ours in family.copies.items()}
    copies = {name: theirs for name, theirs in tied.items() if theirs and name not in wanted}
    found, copied, left_out, extra = _sorted_names(source, family, wanted, copies)
    for name, theirs in copies.items():
        if name in copied and theirs not in found:
            found[theirs] = copied.pop(name)
    absent = _absent_heads(family, entries, found)
    lines = [f"missing: {n}" for n in wanted if n not in found and n not in absent]
    lines += [f"not in the model: {name}" for name in extra]
    for name, stored in found.items():
        if source.shape(stored) != wanted[name]:
            there, expected = source.shape(stored), wanted[name]
            lines.append(f"{name}: the file has {there}, by {described} it is {expected}")
        elif not source.dtype(stored).is_floating_point:
            lines.append(f"{name}: quantized ({source.dtype(stored)})")
    if lines:
        raise _refusal(source, family, lines, described)
    for name, stored in copied.items():
        _check_tied(source, stored, found[copies[name]], described)
    drawn = tuple(ours for entry in entries if entry.theirs in absent for ours in entry.ours)
    return Match(found, drawn, tuple(left_out))


def _holder(entries: Sequence[Entry], ours: str) -> str:
    """Their name of the tensor that is a parameter of ours; "" without it."""
    return next((entry.theirs for entry in entries if entry.ours == (ours,)), "")


def _sorted_names(
    source: TensorSource, family: Family, wanted: Mapping[str, Shape], copies: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str], list[str], list[str]]:
    """(wanted, second copies) by canonical name, and the names of heads to leave out, and others.

    Copies of what the model lacks are left out with it.
    """
    found: dict[str, str] = {}
    copied: dict[str, str] = {}
    left_out, extra = [], []
    known = family.head_tensors() | set(wanted) | set(family.copies)
    for name in source.names():
        canonical = family.canonical_name(name, known)
        if canonical in wanted:
            found[canonical] = name
        elif canonical in copies:
            copied[canonical] = name
        elif canonical in known:
            left_out.append(name)
        elif not family.is_skipped(name):
            extra.append(name)
    return found, copied, left_out, extra


def _absent_heads(
    family: Family, entries: Sequence[Entry], found: Mapping[str, str]
) -> frozenset[str]:
    """Their names of the heads of which the files hold nothing."""
    absent: set[str] = set()
    for pattern in family.heads:
        names = {entry.theirs for entry in entries if fnmatchcase(entry.ours[0], pattern)}
        if not names & set(found):
            absent |= names
    return frozenset(absent)


def _refusal(source: TensorSource, family: Family, lines: list[str], described: str) -> UserError:
    return UserError(
        f"the tensors of {source.where} are not those of {described}:\n    "
        + "\n    ".join(folded(lines)),
        rule=f"by {described} it is a {family.model_type}, which has exactly one tensor of each "
        "name and shape",
        remedy=f"check {described} (vocab_size, tie_word_embeddings, ...) and copy the files again",
    )


def _check_tied(source: TensorSource, copy: str, original: str, described: str) -> None:
    """A tied model may hold a tensor a second time, if it is the same."""
    alike = source.shape(copy) == source.shape(original)
    alike = alike and source.dtype(copy) == source.dtype(original)
    same = alike and all(
        torch.equal(a, b) for a, b in zip(source.blocks(copy), source.blocks(original), strict=True)
    )
    if not same:
        raise UserError(
            f"{source.where}: {copy} differs from {original}, and tie_word_embeddings is true",
            rule="tied weights are one tensor",
            remedy=f"set tie_word_embeddings to false in {described}",
        )
