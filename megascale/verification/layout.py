"""Layouts as people write them ("tp=2,dp=2,zero=1"), and the enumeration of all legal ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields

from megascale.config.problems import ConfigError
from megascale.errors import UserError

SCHEDULES = ("1f1b", "gpipe", "interleaved", "interleaved_zero_bubble", "zbv", "dualpipev")
RECOMPUTE = ("none", "selective", "full")
METHODS = ("auto", "ulysses", "ring")
ENGINES = ("auto", "deepspeed", "torch")


@dataclass(frozen=True)
class Layout:
    """How the work of one run is divided.

    Attributes:
        dp, tp, cp: data-, tensor- and context-parallel size.
        sp: sequence parallelism, 0 or 1.
        pp, vpp, schedule: pipeline-parallel size, stages a rank, and order of the passes.
        zero: ZeRO stage.
        engine: auto, deepspeed or torch.
        recompute: none, selective or full.
        method: how a cut sequence is attended over: auto, ulysses or ring.
    """

    dp: int = 1
    tp: int = 1
    sp: int = 0
    cp: int = 1
    pp: int = 1
    vpp: int = 1
    schedule: str = "1f1b"
    zero: int = 0
    engine: str = "auto"
    recompute: str = "none"
    method: str = "auto"

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.dp * self.tp * self.cp * self.pp

    def overrides(self) -> list[str]:
        """The settings of the config that make this layout."""
        return [
            f"parallel.tensor_parallel_size={self.tp}",
            f"parallel.sequence_parallel={'true' if self.sp else 'false'}",
            f"parallel.pipeline_parallel_size={self.pp}",
            f"parallel.virtual_pipeline_stages={self.vpp}",
            f"parallel.pipeline_schedule={self.schedule}",
            *(["parallel.layers_per_stage=null"] if self.pp == 1 else []),
            f"parallel.context_parallel_size={self.cp}",
            *([f"parallel.context_parallel_method={self.method}"] if self.cp > 1 else []),
            f"parallel.zero_stage={self.zero}",
            f"parallel.engine={self.engine}",
            f"parallel.activation_recomputation={self.recompute}",
            "parallel.activation_memory_mb=null",
        ]

    def __str__(self) -> str:
        shown = [f"dp={self.dp}", f"tp={self.tp}"]
        shown += ["sp=1"] if self.sp else []
        shown += [f"pp={self.pp}", f"schedule={self.schedule}"] if self.pp > 1 else []
        shown += [f"vpp={self.vpp}"] if self.vpp > 1 else []
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


_CHOICES = {
    "engine": ENGINES,
    "recompute": RECOMPUTE,
    "method": METHODS,
    "schedule": SCHEDULES,
}
_RANGES = {
    **dict.fromkeys(("dp", "tp", "cp", "pp", "vpp"), "at least 1"),
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
    for dp, tp, cp, pp in itertools.product(_divisors(nproc), repeat=4):
        if dp * tp * cp * pp != nproc:
            continue
        for method, (schedule, vpp), sp, zero, engine, mode in itertools.product(
            METHODS[1:] if cp > 1 else METHODS[:1],
            _PIPELINES if pp > 1 else _PIPELINES[:1],
            (0, 1),
            range(4),
            ENGINES[1:],
            RECOMPUTE,
        ):
            layout = Layout(dp, tp, sp, cp, pp, vpp, schedule, zero, engine, mode, method)
            if layout == SINGLE:
                continue
            try:
                check(layout)
            except ConfigError:
                continue
            yield layout


# each schedule with its smallest number of stages a rank
_PIPELINES = (
    ("1f1b", 1),
    ("gpipe", 1),
    ("interleaved", 2),
    ("interleaved_zero_bubble", 2),
    ("zbv", 2),
    ("dualpipev", 2),
)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def pairwise(layouts: Iterable[Layout]) -> list[Layout]:
    """A few of `layouts` in which every pair of values that occurs in them occurs, too.

    Greedy: the layout with the most pairs that are not covered yet comes next.
    """
    waiting = {layout: _pairs(layout) for layout in layouts}
    missing = set().union(*waiting.values()) if waiting else set()
    chosen = []
    while missing:
        best = max(waiting, key=lambda layout: len(waiting[layout] & missing))
        chosen.append(best)
        missing -= waiting.pop(best)
    return chosen


def _pairs(layout: Layout) -> set[tuple[tuple[str, object], ...]]:
    values = [(field.name, getattr(layout, field.name)) for field in fields(Layout)]
    return set(itertools.combinations(values, 2))
