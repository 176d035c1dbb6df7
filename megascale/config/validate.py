"""A raw tree against the schema: every problem at once, and a Config even when there are some.

Cross-field checks need a Config. Where a value is invalid its default stands in, and the path is
remembered, so that a check which reads it can be left out and all the others still run.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megascale.config.problems import ABSENT, Problem, closest, did_you_mean, show_value
from megascale.config.schema import Config, Section, leaf_fields, section_of
from megascale.config.yaml_text import parse_yaml

_RULES = {
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "tuple_type": "must be a list",
    "model_type": "must be a mapping of names to values",
    "finite_number": "must be a finite number",
    "greater_than": "must be > {gt}",
    "greater_than_equal": "must be >= {ge}",
    "less_than": "must be < {lt}",
    "less_than_equal": "must be <= {le}",
    "too_short": "must have at least {min_length} item(s)",
    "too_long": "must have at most {max_length} item(s)",
    "missing": "must be given: it has no default",
    "invalid_key": "names must be text",
}


class Paths:
    """Dotted paths whose value is unknown; a section's path stands for all that is in it."""

    def __init__(self) -> None:
        self._paths: set[str] = set()

    def add(self, *paths: str) -> None:
        self._paths.update(paths)

    def touch(self, path: str) -> bool:
        """Whether the value at a path, or a part of it, is unknown."""
        return any(
            path == unknown or path.startswith(unknown + ".") or unknown.startswith(path + ".")
            for unknown in self._paths
        )


def validate(raw: Mapping[Any, Any]) -> tuple[Config, list[Problem], Paths]:
    """Build a Config from plain data.

    Args:
        raw: mapping of sections; absent sections take their defaults.

    Returns:
        The Config (with defaults, or a field's example where it has none, in place of invalid
        values), the problems found, and the paths whose intended value is not known.
    """
    tree = dict(raw)
    for name, field in Config.model_fields.items():
        if section_of(field) is not None:
            tree.setdefault(name, {})
    unknown = Paths()
    try:
        return Config.model_validate(tree), [], unknown
    except ValidationError as error:
        problems = []
        for detail in error.errors(include_url=False):
            if _counts_valid_items_only(detail):
                continue
            problem, suspects = _problem(detail)
            problems.append(problem)
            unknown.add(*suspects)
        return Config.model_validate(_repaired(Config, tree, unknown, "")), problems, unknown


def suggestions(name: str, model: type[Section], prefix: str) -> list[str]:
    """Paths that somebody may have meant by an unknown `name` in the section at `prefix`.

    The siblings that contain it or one that looks like it, the same name in other sections, else
    what looks most like it anywhere in the tree.
    """
    sibling = closest(name, model.model_fields)
    around = [other for other in model.model_fields if len(name) > 3 and name in other]
    found = [prefix + other for other in around[:3] or ([sibling] if sibling else [])]
    by_name: dict[str, list[str]] = {}
    for path, _ in leaf_fields():
        by_name.setdefault(path.rpartition(".")[2], []).append(path)
    found += by_name.get(name, [])
    if not found:
        elsewhere = closest(name, by_name, cutoff=0.7)
        found = by_name[elsewhere] if elsewhere else []
    return list(dict.fromkeys(found))


def unknown_name(
    path: str, name: str, value: object, model: type[Section], prefix: str
) -> tuple[Problem, list[str]]:
    """The problem of a name that no field has, and the paths that were probably meant."""
    meant = suggestions(name, model, prefix)
    place = prefix.rstrip(".") or "the top level"
    rule = f"there is no setting of this name in {place}"
    names = ", ".join(model.model_fields)
    return Problem(path, value, rule, did_you_mean(meant) or f"{place} has: {names}"), meant


def _problem(detail: ErrorDetails) -> tuple[Problem, list[str]]:
    """One pydantic error as a Problem, and the paths whose intended value is unknown by it."""
    loc, kind, value = detail["loc"], detail["type"], detail["input"]
    owner, field, prefix, leaf = _locate(loc)
    path = _dotted(loc)
    if kind == "extra_forbidden":
        problem, meant = unknown_name(path, str(loc[-1]), value, owner, prefix)
        return problem, [*meant, leaf]
    if kind == "missing":
        value = ABSENT
    annotation = _annotation_at(field, loc)
    choices = _literals(annotation)
    if choices:
        rule = f"must be one of {', '.join(choices)}"
        close = closest(value, choices, cutoff=0.67) if isinstance(value, str) else None
        hint = did_you_mean([close] if close else []) or _describe(path, field)
    else:
        known = _RULES.get(kind)
        rule = known.format(**detail.get("ctx", {})) if known else detail["msg"]
        if kind.endswith("_type") and type(None) in get_args(annotation):
            rule += ", or null"
        hint = _type_hint(kind, value, field) or _describe(path, field)
    return Problem(path, value, rule, hint), [leaf]


def _counts_valid_items_only(detail: ErrorDetails) -> bool:
    """Whether a list is called too short only because items in it are invalid by themselves."""
    return detail["type"] == "too_short" and len(detail["input"]) >= detail["ctx"]["min_length"]


def _locate(loc: Sequence[int | str]) -> tuple[type[Section], FieldInfo | None, str, str]:
    """Where a pydantic location lies in the tree.

    Returns:
        The model that owns the last name, its field there (None for an unknown name), the dotted
        prefix of that model, and the path of the setting or section that the location is in.
    """
    owner: type[Section] = Config
    model: type[Section] | None = Config
    field: FieldInfo | None = None
    prefix, leaf, inside_leaf = "", "", False
    for depth, part in enumerate(loc):
        if not isinstance(part, str) or part.startswith("<") or model is None:
            continue
        owner, prefix = model, _dotted(loc[:depth])
        prefix = f"{prefix}." if prefix else ""
        field = owner.model_fields.get(part)
        if not inside_leaf:
            leaf = prefix + part
        inside_leaf = inside_leaf or field is None or section_of(field) is None
        model = _section_in(field.annotation) if field else None
    return owner, field, prefix, leaf


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that an annotation is or holds, e.g. WeightedPath of a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)


def _annotation_at(field: FieldInfo | None, loc: Sequence[int | str]) -> Any:
    """The annotation of a field itself; nothing for an item inside its list."""
    return field.annotation if field is not None and isinstance(loc[-1], str) else None


def _literals(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [choice for part in get_args(annotation) for choice in _literals(part)]
    return []


def _dotted(loc: Sequence[int | str]) -> str:
    """`data.path[1].weight` of a location; names in <> only tell which form a value has."""
    path = ""
    for part in loc:
        if isinstance(part, str) and part.startswith("<"):
            continue
        if isinstance(part, int) and not isinstance(part, bool) and path:
            path += f"[{part}]"
        else:
            path += f".{part}" if path else str(part)
    return path


def _type_hint(kind: str, value: object, field: FieldInfo | None) -> str:
    """What to write instead of a value of the wrong type, where that can be told."""
    if kind == "string_type" and isinstance(value, (bool, int, float)):
        return "put it in quotes if it is meant as text"
    if kind not in ("int_type", "float_type", "bool_type"):
        return ""
    if isinstance(value, str):
        parsed, problems = parse_yaml(value, "")
        if not problems and isinstance(parsed, (bool, int, float)):
            return "write it without quotes"
    if kind == "int_type" and isinstance(value, float) and math.isfinite(value):
        return f"write {int(value)}" if value.is_integer() else ""
    if value is None and field is not None:
        return f"leave it out to take its default, {_shown_default(field)}"
    return ""


def _shown_default(field: FieldInfo) -> str:
    return show_value(field.get_default(call_default_factory=False))


def _describe(path: str, field: FieldInfo | None) -> str:
    if field is None or section_of(field) is not None:
        return ""
    about = " ".join((field.description or "").split())
    if field.examples:
        return f"{about} Example: {path}: {field.examples[0]}"
    return about if field.is_required() else f"{about} Default: {_shown_default(field)}"


def _repaired(
    model: type[Section], raw: Mapping[Any, Any], unknown: Paths, prefix: str
) -> dict[str, Any]:
    """The valid part of a tree, with an example for what is required and missing or invalid."""
    valid: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        section, value = section_of(field), raw.get(name)
        if section is not None:
            part = value if isinstance(value, Mapping) else {}
            valid[name] = _repaired(section, part, unknown, f"{prefix}{name}.")
        elif name in raw and not unknown.touch(prefix + name):
            valid[name] = value
        elif field.is_required():
            valid[name] = (field.examples or [None])[0]
    return valid
