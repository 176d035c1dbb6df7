"""Rotary positions in a config.json: transformers 5's `rope_parameters` and the older fields.

Both spellings are written, so that older programs, too, compute the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megascale.hf.fields import Unsupported, Values

_KNOWN = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
}
_SCALING = {"default": "none", "linear": "linear", "llama3": "llama3"}


def _scaling(parameters: Values, theirs: Values, where: str) -> dict[str, Any]:
    """Settings of ours for one set of rope parameters, without its theta."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _SCALING:
        raise Unsupported(f"{where}.rope_type = {kind!r}; supported: {', '.join(_SCALING)}")
    unknown = sorted(k for k, value in parameters.items() if k not in _KNOWN and value is not None)
    if unknown:
        raise Unsupported(f"{where}: {', '.join(unknown)}")
    factor = float(parameters.get("factor") or 1.0)
    if kind == "default" or (kind == "linear" and factor == 1):
        return {}
    settings = {"rope_scaling": _SCALING[kind], "rope_scaling_factor": factor}
    if kind == "llama3":
        length = parameters.get("original_max_position_embeddings")
        settings.update(
            rope_low_freq_factor=float(parameters["low_freq_factor"]),
            rope_high_freq_factor=float(parameters["high_freq_factor"]),
            rope_original_length=length or theirs.get("max_position_embeddings"),
        )
    return settings


def _written_scaling(ours: Values) -> dict[str, Any]:
    """rope_type and its numbers."""
    if ours["rope_scaling"] == "none":
        return {"rope_type": "default"}
    values = {"rope_type": ours["rope_scaling"], "factor": ours["rope_scaling_factor"]}
    if ours["rope_scaling"] == "llama3":
        values.update(
            low_freq_factor=ours["rope_low_freq_factor"],
            high_freq_factor=ours["rope_high_freq_factor"],
            original_max_position_embeddings=ours["rope_original_length"],
        )
    return values


@dataclass(frozen=True)
class Rope:
    """One rotation for all layers.

    Attributes:
        theta: the older field for the base.
        fraction: the older field for the rotated part of a head; "" where the family has none.
        default_fraction: what transformers takes without one.
    """

    theta: str = "rope_theta"
    fraction: str = ""
    default_fraction: float = 1.0

    @property
    def names(self) -> tuple[str, ...]:
        """See `Field.names`."""
        named = (self.theta, self.fraction) if self.fraction else (self.theta,)
        return ("rope_parameters", "rope_scaling", "partial_rotary_factor", *named)

    def read(self, theirs: Values) -> dict[str, Any]:
        """See `Field.read`."""
        where = "rope_scaling" if theirs.get("rope_scaling") else "rope_parameters"
        parameters = theirs.get(where) or {}
        older = theirs.get(self.fraction, theirs.get("partial_rotary_factor"))
        given = parameters.get("partial_rotary_factor", older)
        fraction = self.default_fraction if given is None else given
        if not self.fraction and fraction != 1:
            raise Unsupported(f"partial_rotary_factor = {fraction}; supported: 1.0")
        theta = parameters.get("rope_theta", theirs.get(self.theta)) or 10000.0
        return {
            "rope_theta": float(theta),
            "rotary_fraction": float(fraction),
            **_scaling(parameters, theirs, where),
        }

    def write(self, ours: Values) -> dict[str, Any]:
        """See `Field.write`."""
        theta, scaling = ours["rope_theta"], _written_scaling(ours)
        parameters = {**scaling, "rope_theta": theta}
        values: dict[str, Any] = {self.theta: theta}
        if self.fraction:
            parameters["partial_rotary_factor"] = values[self.fraction] = ours["rotary_fraction"]
        values["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
        return {**values, "rope_parameters": parameters}


@dataclass(frozen=True)
class RopeByLayerType:
    """One rotation for windowed layers and another for the others (Gemma 3)."""

    @property
    def names(self) -> tuple[str, ...]:
        """See `Field.names`."""
        return ("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq")

    def read(self, theirs: Values) -> dict[str, Any]:
        """See `Field.read`."""
        nested = theirs.get("rope_parameters") or {}
        local = nested.get("sliding_attention") or {}
        full = {**(nested.get("full_attention") or {}), **(theirs.get("rope_scaling") or {})}
        if local.get("rope_type", "default") != "default":
            kind = local["rope_type"]
            raise Unsupported(
                f"rope_parameters.sliding_attention.rope_type = {kind!r}; supported: default"
            )
        theta = full.get("rope_theta", theirs.get("rope_theta")) or 1e6
        local_theta = local.get("rope_theta", theirs.get("rope_local_base_freq")) or 1e4
        types = theirs.get("layer_types")
        windowed = types is None or "sliding_attention" in types
        return {
            "rope_theta": float(theta),
            "rope_local_theta": float(local_theta) if windowed else None,
            **_scaling(full, theirs, "rope_parameters.full_attention"),
        }

    def write(self, ours: Values) -> dict[str, Any]:
        """See `Field.write`."""
        scaling = _written_scaling(ours)
        theta, local = ours["rope_theta"], ours["rope_local_theta"] or ours["rope_theta"]
        return {
            "rope_theta": theta,
            "rope_local_base_freq": local,
            "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
            "rope_parameters": {
                "full_attention": {**scaling, "rope_theta": theta},
                "sliding_attention": {"rope_type": "default", "rope_theta": local},
            },
        }
