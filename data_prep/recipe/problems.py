"""Settings of a step against their model, with every problem told by its path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megascale.config.problems import ABSENT, Problem, closest, did_you_mean
from megascale.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


def build(model: type[Model], raw: Any, path: str) -> tuple[Model | None, list[Problem]]:
    """A model out of plain data, or what is wrong with it.

    Args:
        raw: a mapping; None stands for an empty one.
        path: where it stands, as `steps[1].clean`.
    """
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        rule = "must be a mapping of settings"
        return None, [Problem(path, raw, rule, f"it has: {', '.join(model.model_fields)}")]
    try:
        return model.model_validate(raw), []
    except ValidationError as error:
        return None, [_problem(detail, model, path) for detail in error.errors(include_url=False)]


def of_error(path: str, value: Any, error: UserError) -> Problem:
    """A refusal of ours as a problem at a path."""
    return Problem(path, value, error.rule or error.what, error.remedy)


def unknown_name(path: str, name: object, value: Any, names: list[str], what: str) -> Problem:
    """The problem of a name that is none of `names`."""
    found = closest(name, names)
    hint = did_you_mean([found] if found else []) or f"there are: {', '.join(names)}"
    return Problem(path, value, f"there is no {what} of this name", hint)


def _problem(detail: ErrorDetails, model: type[BaseModel], path: str) -> Problem:
    where = path + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in detail["loc"])
    value = detail["input"]
    if detail["type"] == "extra_forbidden":
        owner = _owner(model, detail["loc"])
        name = str(detail["loc"][-1])
        return unknown_name(where, name, value, list(owner.model_fields), "setting")
    if detail["type"] == "missing":
        field = _owner(model, detail["loc"]).model_fields.get(str(detail["loc"][-1]))
        hint = f"example: {field.examples[0]}" if field is not None and field.examples else ""
        return Problem(where, ABSENT, "must be given: it has no default", hint)
    return Problem(where, value, detail["msg"].removeprefix("Value error, "))


def _owner(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The model that holds the last name of a location."""
    owner: Any = model
    for part in location[:-1]:
        field = owner.model_fields.get(part) if isinstance(part, str) else None
        inner = _model_in(field.annotation) if field is not None else None
        owner = inner or owner
    return owner


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    parts = getattr(annotation, "__args__", ())
    return next((found for part in parts if (found := _model_in(part))), None)
