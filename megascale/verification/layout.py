"""Layouts as people write them ("tp=2,dp=2,zero=1"), and the enumeration of all legal ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

from megascale.config.problems import ConfigError
from megascale.errors import UserError

RECOMPUTE = ("none", "selective", "full")
METHODS = ("auto", "ulysses", "ring")
ENGINES = ("auto", "deepspeed", "torch")


@dataclass(frozen=True)
class Layout:
    """How the work of one run is divided.

    Attributes:
        dp, tp, cp: data-, tensor- and context-parallel size.
        sp: sequence parallelism, 0 or 1.
        zero: ZeRO stage.
        engine: auto, deepspeed or torch.
        recompute: none, selective or full.
        method: how a cut sequence is attended over: auto, ulysses or ring.
    """

    dp: int = 1
    tp: int = 1
    sp: int = 0
    cp: int = 1
    zero: int = 0
    engine: str = "auto"
    recompute: str = "none"
    method: str = "auto"

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.dp * self.tp * self.cp

    def overrides(self) -> list[str]:
        """The settings of the config that make this layout."""
        return [
            f"parallel.tensor_parallel_size={self.tp}",
            f"parallel.sequence_parallel={'true' if self.sp else 'false'}",
            f"parallel.context_parallel_size={self.cp}",
            *([f"parallel.context_parallel_method={self.method}"] if self.cp > 1 else []),
            f"parallel.zero_stage={self.zero}",
            f"parallel.engine={self.engine}",
            f"parallel.activation_recomputation={self.recompute}",
        ]

    def __str__(self) -> str:
        shown = [f"dp={self.dp}", f"tp={self.tp}"]
        shown += ["sp=1"] if self.sp else []
        shown += [f"cp={self.cp}"] if self.cp > 1 else []
        shown += [f"zero={self.zero}", f"engine={self.engine}"]
        shown += [f"recompute={self.recompute}"] if self.recompute != "none" else []
        shown += [f"method={self.method}"] if self.method != "auto" else []
        return ",".join(shown)


SINGLE = Layout(engine="torch")
"""The reference: one process, the replicated torch engine, nothing recomputed."""


def parse_layouts(text: str) -> list[Layout]:
    """Layouts separated by `;`, each `key=value` pairs separated by `,`.

    Raises:
        UserError: an unknown key or a value that the key cannot have.
    """
    return [_parse(part.strip()) for part in text.split(";") if part.strip()]


def _parse(text: str) -> Layout:
    known = {field.name: field for field in fields(Layout)}
    values: dict[str, int | str] = {}
    for pair in text.split(","):
        key, equals, value = (piece.strip() for piece in pair.partition("="))
        if key not in known or not equals:
            raise UserError(
                f"layout {text!r}: {pair.strip()!r}",
                rule=f"a layout is key=value pairs with the keys {', '.join(known)}",
                remedy='for example "dp=4;tp=2,dp=2,zero=1"',
            )
        choices = _CHOICES.get(key)
        if choices is not None and value in choices:
            values[key] = value
        elif choices is None and value.isdigit() and _in_range(key, int(value)):
            values[key] = int(value)
        else:
            allowed = ", ".join(choices) if choices else _RANGES[key]
            raise UserError(
                f"layout {text!r}: {key}={value}",
                rule=f"{key} is {allowed}",
                remedy=f"correct the value of {key}",
            )
    return Layout(**values)  # type: ignore[arg-type]


_CHOICES = {"engine": ENGINES, "recompute": RECOMPUTE, "method": METHODS}
_RANGES = {
    "dp": "at least 1",
    "tp": "at least 1",
    "cp": "at least 1",
    "sp": "0 or 1",
    "zero": "0 to 3",
}


def _in_range(key: str, value: int) -> bool:
    low, high = {"sp": (0, 1), "zero": (0, 3)}.get(key, (1, 1 << 20))
    return low <= value <= high


def legal_layouts(nproc: int, check: Callable[[Layout], object]) -> Iterator[Layout]:
    """Every layout of exactly `nproc` processes that the config and the engines allow.

    Args:
        check: raises ConfigError for a layout that is not legal (load_config with its overrides).
    """
    tensor_sizes = [n for n in range(1, nproc + 1) if nproc % n == 0]
    contexts = [(cp, method) for cp in tensor_sizes for method in METHODS if _names(cp, method)]
    for tp, (cp, method), sp, zero, engine, mode in itertools.product(
        tensor_sizes, contexts, (0, 1), range(4), ENGINES[1:], RECOMPUTE
    ):
        if nproc % (tp * cp):
            continue
        layout = Layout(nproc // (tp * cp), tp, sp, cp, zero, engine, mode, method)
        if layout == SINGLE:
            continue
        try:
            check(layout)
        except ConfigError:
            continue
        yield layout


def _names(cp: int, method: str) -> bool:
    """Whether `auto` lists a method by name: each one where it matters, "auto" where not."""
    return (method == "auto") == (cp == 1)
