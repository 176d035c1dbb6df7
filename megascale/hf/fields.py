"""The kinds of rows that join fields of a config.json with fields of ModelConfig.

A field reads part of a config.json into settings of ours, and writes them back. `read` raises
Unsupported for a value that this program cannot compute. `write` gets settings with nothing left
null (see `resolved`) and may write the nearest thing: whether a model can be written as a family
is found out by reading back what was written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megascale.config.schema import ModelConfig

Values = Mapping[str, Any]


class Unsupported(Exception):
    """A field of a config.json has a value that cannot be computed here."""


class Field(Protocol):
    """One row of a family's table."""

    @property
    def names(self) -> tuple[str, ...]:
        """The fields of config.json that it looks at."""
        ...

    def read(self, theirs: Values) -> dict[str, Any]:
        """Settings of ModelConfig, from the whole config.json."""
        ...

    def write(self, ours: Values) -> dict[str, Any]:
        """Fields of config.json, from all settings."""
        ...


def resolved(model: ModelConfig) -> dict[str, Any]:
    """The settings of a model with what null stands for filled in, to compare or write."""
    values = model.model_dump()
    values.update(
        head_dim=model.head_width,
        num_kv_heads=model.resolved_num_kv_heads,
        ffn_hidden_size=model.resolved_ffn_hidden_size,
        attention_dropout=model.resolved_attention_dropout,
        query_scaling=model.query_scaling or float(model.head_width),
    )
    for name in ("qkv_bias", "attention_output_bias", "mlp_bias"):
        values[name] = model.bias if values[name] is None else values[name]
    return values


def simplified(settings: Values) -> dict[str, Any]:
    """The same model with null wherever null means what is given."""
    model = ModelConfig(**settings)
    wanted = resolved(model)
    for name, value in wanted.items():
        without = model.model_copy(update={name: None})
        nullable = ModelConfig.model_fields[name].default is None
        if nullable and value is not None and resolved(without)[name] == value:
            model = without
    return model.model_dump()


@dataclass(frozen=True)
class Same:
    """One field of theirs is one or several settings of ours.

    Attributes:
        theirs: name in config.json.
        ours: the setting, or several that always have the same value.
        default: what transformers takes when config.json lacks the field.
        values: their value -> ours, where the two spell it differently; the first of several
            spellings is written.
    """

    theirs: str
    ours: str | tuple[str, ...]
    default: Any
    values: Mapping[Any, Any] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """See `Field.names`."""
        return (self.theirs,)

    def read(self, theirs: Values) -> dict[str, Any]:
        """See `Field.read`."""
        value = theirs.get(self.theirs, self.default)
        if self.values is not None:
            if value not in self.values:
                known = ", ".join(map(repr, self.values))
                raise Unsupported(f"{self.theirs} = {value!r}; supported: {known}")
            value = self.values[value]
        names = (self.ours,) if isinstance(self.ours, str) else self.ours
        return dict.fromkeys(names, value)

    def write(self, ours: Values) -> dict[str, Any]:
        """See `Field.write`."""
        value = ours[self.ours if isinstance(self.ours, str) else self.ours[0]]
        if self.values is not None:
            spellings = (their for their, our in self.values.items() if our == value)
            value = next(spellings, self.default)
        elif isinstance(value, float) and value.is_integer() and isinstance(self.default, int):
            value = int(value)  # transformers' configs are strict: 256.0 is no integer to them
        return {self.theirs: value}


@dataclass(frozen=True)
class Always:
    """What every model of the family has, without a field that says so."""

    settings: Values

    @property
    def names(self) -> tuple[str, ...]:
        """See `Field.names`."""
        return ()

    def read(self, theirs: Values) -> dict[str, Any]:
        """See `Field.read`."""
        return dict(self.settings)

    def write(self, ours: Values) -> dict[str, Any]:
        """See `Field.write`."""
        return {}


@dataclass(frozen=True)
class Only:
    """A field that changes the computation, of which one value is supported (null, too)."""

    theirs: str
    value: Any

    @property
    def names(self) -> tuple[str, ...]:
        """See `Field.names`."""
        return (self.theirs,)

    def read(self, theirs: Values) -> dict[str, Any]:
        """See `Field.read`."""
        value = theirs.get(self.theirs)
        if value is not None and value != self.value:
            raise Unsupported(f"{self.theirs} = {value!r}; supported: {self.value!r}")
        return {}

    def write(self, ours: Values) -> dict[str, Any]:
        """See `Field.write`."""
        return {self.theirs: self.value}


@dataclass(frozen=True)
class Dropouts:
    """Several probabilities of theirs that are one of ours."""

    theirs: tuple[str, ...]
    default: float

    @property
    def names(self) -> tuple[str, ...]:
        """See `Field.names`."""
        return self.theirs

    def read(self, theirs: Values) -> dict[str, Any]:
        """See `Field.read`."""
        given = {name: theirs.get(name, self.default) for name in self.theirs}
        if len(set(given.values())) > 1:
            shown = ", ".join(f"{name} = {value}" for name, value in given.items())
            raise Unsupported(f"{shown}; supported: the same for all of them")
        return {"dropout": next(iter(given.values()))}

    def write(self, ours: Values) -> dict[str, Any]:
        """See `Field.write`."""
        return dict.fromkeys(self.theirs, ours["dropout"])


@dataclass(frozen=True)
class LayerTypes:
    """Which layers see a window only: `sliding_window` with `layer_types` or a pattern.

    Attributes:
        default_window, default_layers: transformers' defaults for sliding_window and
            num_hidden_layers.
        default_interval: every n-th layer is global where config.json names no layer_types; None:
            see `switch`.
        switch: a field without which no layer is windowed (Qwen), or "".
        pattern: an older field for the interval, or "".
        start: an older field for the number of first layers that are global, or "".
    """

    default_window: int
    default_layers: int
    default_interval: int | None = None
    switch: str = ""
    pattern: str = ""
    start: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """See `Field.names`."""
        optional = (self.switch, self.pattern, self.start, f"_{self.pattern}")
        return ("sliding_window", "layer_types", *(name for name in optional if name.strip("_")))

    def read(self, theirs: Values) -> dict[str, Any]:
        """See `Field.read`."""
        window = theirs.get("sliding_window", self.default_window)
        if self.switch and not theirs.get(self.switch, False):
            window = None
        is_global = self._global_layers(theirs)
        if window is None or all(is_global):
            return {"sliding_window": None, "global_layer_interval": None}
        if not any(is_global):
            return {"sliding_window": window, "global_layer_interval": None}
        interval = is_global.index(True) + 1
        if is_global != [(layer + 1) % interval == 0 for layer in range(len(is_global))]:
            raise Unsupported(
                f"layer_types: the layers {[i for i, g in enumerate(is_global) if g]} of "
                f"{len(is_global)} see all tokens; supported: every n-th one does"
            )
        return {"sliding_window": window, "global_layer_interval": interval}

    def _global_layers(self, theirs: Values) -> list[bool]:
        count = theirs.get("num_hidden_layers", self.default_layers)
        types = theirs.get("layer_types")
        if types is not None:
            unknown = set(types) - {"full_attention", "sliding_attention"}
            if unknown:
                raise Unsupported(f"layer_types: {', '.join(sorted(unknown))}")
            return [name == "full_attention" for name in types]
        if self.start:
            return [layer < theirs.get(self.start, count) for layer in range(count)]
        interval = theirs.get(self.pattern, self.default_interval) if self.pattern else None
        interval = interval or self.default_interval
        return [interval is not None and (layer + 1) % interval == 0 for layer in range(count)]

    def write(self, ours: Values) -> dict[str, Any]:
        """See `Field.write`."""
        window, interval = ours["sliding_window"], ours["global_layer_interval"]
        is_global = [
            window is None or (interval is not None and (layer + 1) % interval == 0)
            for layer in range(ours["num_layers"])
        ]
        names = ["full_attention" if each else "sliding_attention" for each in is_global]
        values: dict[str, Any] = {"sliding_window": window, "layer_types": names}
        if self.switch:
            values[self.switch] = window is not None
        if self.start:
            values[self.start] = is_global.count(True)
        return values


def table(*groups: Field | Sequence[Field]) -> tuple[Field, ...]:
    """A family's rows, of single fields and of lists that families share."""
    rows: list[Field] = []
    for group in groups:
        rows.extend(group if isinstance(group, Sequence) else (group,))
    return tuple(rows)
