"""What settings are made of: strict, bounded types, and the base of every section."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_COUNT = 2**31 - 1
"""Largest count or size: it fits the 32-bit integers of the file formats."""


def to_tuple(value: Any) -> Any:
    """YAML knows lists only; the frozen tree holds tuples."""
    return tuple(value) if isinstance(value, list) else value


def _to_pair(value: Any) -> Any:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise PydanticCustomError("pair", "must be a list of exactly two numbers")
    return tuple(value)


def _text(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("text", "must not be empty")
    return _unicode(value)


def _unicode(value: str) -> str:
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise PydanticCustomError("text", "must be valid UTF-8 without NUL characters")
    return value


def _sums_to_one(fractions: tuple[float, ...]) -> tuple[float, ...]:
    total = sum(fractions)
    if abs(total - 1.0) > 1e-6:
        raise PydanticCustomError(
            "split_sum", "the fractions must sum to 1; these sum to {total}", {"total": total}
        )
    return fractions


Text = Annotated[str, Field(min_length=1), AfterValidator(_text)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
CountOrZero = Annotated[int, Field(ge=0, le=MAX_COUNT)]
SampleNumber = Annotated[int, Field(ge=0, le=2**53)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Pair = Annotated[tuple[Rate, Rate], BeforeValidator(_to_pair)]
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Split = Annotated[
    tuple[Fraction, ...],
    Field(min_length=1, max_length=3),
    BeforeValidator(to_tuple),
    AfterValidator(_sums_to_one),
]

Texts = Annotated[tuple[Annotated[str, AfterValidator(_unicode)], ...], BeforeValidator(to_tuple)]


def _distinct_names(named: dict[str, str]) -> dict[str, str]:
    taken = sorted({"train", "valid", "test"} & set(named))
    if taken:
        raise PydanticCustomError(
            "named_paths", "{name} is the name of a part of data.split", {"name": taken[0]}
        )
    return named


NamedPaths = Annotated[
    dict[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")], Text],
    AfterValidator(_distinct_names),
]


class Section(BaseModel):
    """Base of every section: strict, frozen, no unknown names."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )
