"""Which layers lie on which pipeline rank, and what each schedule asks of a layout.

Layers are cut into stages, runs of layers that one rank computes in one go:

    loop    stage s on rank s mod p        with v stages a rank: 0 1 2 3 | 0 1 2 3 | ...
    v       2 p stages, there and back     0 1 2 3 | 3 2 1 0: first and last share a rank

The schedules themselves are torch.distributed.pipelining's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megascale.models.chunk import Chunk


@dataclass(frozen=True)
class Schedule:
    """One order of forward and backward passes.

    Attributes:
        torch_class: its class in torch.distributed.pipelining.schedules.
        placement: how stages lie on ranks.
        stages_per_rank: smallest and largest v; None for no largest.
        splits_backward: whether gradients of inputs and of weights are computed apart.
        whole_rounds: whether the micro-batches must come in equal rounds of about p.
        fill: micro-batches must be at least this times the number of ranks.
        source: where it is described.
    """

    torch_class: str
    placement: Literal["loop", "v"]
    stages_per_rank: tuple[int, int | None]
    splits_backward: bool
    whole_rounds: bool
    fill: int
    source: str

    def takes(self, num_micro_batches: int, size: int) -> bool:
        """Whether it can run this many micro-batches on `size` ranks."""
        if num_micro_batches < self.fill * size:
            return False
        rounds = max(1, num_micro_batches // size)
        return not self.whole_rounds or num_micro_batches % rounds == 0

    def rule(self, size: int) -> str:
        """In words, what `takes` asks."""
        rules = []
        if self.fill:
            rules.append(f"at least {self.fill} x {size} ranks = {self.fill * size}")
        if self.whole_rounds:
            rules.append(f"a multiple of max(1, micro-batches // {size} ranks)")
        return " and ".join(rules)


SCHEDULES: dict[str, Schedule] = {
    "gpipe": Schedule("ScheduleGPipe", "loop", (1, 1), False, False, 0, "arXiv:1811.06965"),
    "1f1b": Schedule("Schedule1F1B", "loop", (1, 1), False, False, 1, "arXiv:2006.09503"),
    "interleaved": Schedule(
        "ScheduleInterleaved1F1B", "loop", (2, None), False, True, 0, "arXiv:2104.04473"
    ),
    "interleaved_zero_bubble": Schedule(
        "ScheduleInterleavedZeroBubble", "loop", (1, None), True, True, 0, "arXiv:2401.10241"
    ),
    "zbv": Schedule("ScheduleZBVZeroBubble", "v", (2, 2), True, False, 0, "arXiv:2401.10241"),
    "dualpipev": Schedule("ScheduleDualPipeV", "v", (2, 2), True, False, 2, "arXiv:2412.19437"),
}


class Action(NamedTuple):
    """One computation of a schedule.

    Attributes:
        kind: "F" forward, "B" whole backward, "I" its input half, "W" its weight half.
        stage: global number of the stage. micro_batch: its number in the step.
    """

    kind: str
    stage: int
    micro_batch: int


@dataclass(frozen=True)
class StageCosts:
    """What the parts of a model cost, in any one unit (FLOPs a token).

    Attributes:
        layers: by global index.
        first: what precedes the first layer. last: what follows the last one (the head).
    """

    layers: tuple[float, ...]
    first: float = 0.0
    last: float = 0.0

    def of(self, begin: int, end: int) -> float:
        """Cost of a stage of the layers [begin, end), with the ends of the model in it."""
        ends = (self.first if begin == 0 else 0) + (self.last if end == len(self.layers) else 0)
        return sum(self.layers[begin:end]) + ends


def balance(costs: StageCosts, num_stages: int) -> list[int]:
    """Layers of each stage: the dearest stage as cheap as can be, then the others even.

    Args:
        num_stages: at most the number of layers; every stage gets at least one.
    """
    dearest = _cut(costs, num_stages, math.inf, max)[0]
    return _cut(costs, num_stages, dearest, lambda total, cost: total + cost * cost)[1]


def _cut(costs: StageCosts, num_stages: int, limit: float, add) -> tuple[float, list[int]]:  # type: ignore[no-untyped-def]
    """(value, layers of each stage) of the cut with the smallest value.

    Args:
        limit: no stage may cost more. add: (value of the stages before, cost of one) -> value.
    """
    num_layers = len(costs.layers)
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]  # by stages, by layers: value, from
    for stage in range(1, num_stages + 1):
        row: dict[int, tuple[float, int]] = {}
        ends = range(stage, num_layers - (num_stages - stage) + 1)
        for end in ends if stage < num_stages else (num_layers,):
            for begin, (value, _) in best[-1].items():
                cost = costs.of(begin, end) if begin < end else math.inf
                if cost <= limit and begin < end:
                    total = add(value, cost)
                    if end not in row or total < row[end][0]:
                        row[end] = (total, begin)
        best.append(row)
    counts, end = [], num_layers
    for row in reversed(best[1:]):
        begin = row[end][1]
        counts.append(end - begin)
        end = begin
    return best[-1][num_layers][0], counts[::-1]


def cut_chunks(layers_per_stage: Sequence[int]) -> tuple[Chunk, ...]:
    """The chunks of consecutive stages with these numbers of layers."""
    ends = [sum(layers_per_stage[: i + 1]) for i in range(len(layers_per_stage))]
    return tuple(Chunk(b, e, ends[-1]) for b, e in zip([0, *ends], ends, strict=False))


@dataclass(frozen=True)
class PipelineLayout:
    """A pipeline over the pp axis.

    Attributes:
        schedule: key of SCHEDULES. size: p, ranks. chunks: of each stage, first to last.
        hidden_size: D. sequence_shards: ranks over which the T of a stage's output is cut.
        tied_weight: the parameter that the first and the last stage share.
    """

    schedule: str
    size: int
    chunks: tuple[Chunk, ...]
    hidden_size: int
    sequence_shards: int = 1
    tied_weight: str | None = None

    def rank_of(self, stage: int) -> int:
        """The pp rank that computes a stage."""
        if SCHEDULES[self.schedule].placement == "v":
            return min(stage, len(self.chunks) - 1 - stage)
        return stage % self.size

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a pp rank, in the order of the model."""
        return [stage for stage in range(len(self.chunks)) if self.rank_of(stage) == rank]

    @property
    def last_rank(self) -> int:
        """The pp rank that computes the loss."""
        return self.rank_of(len(self.chunks) - 1)

    @property
    def copied_weight(self) -> str | None:
        """The tied weight where two ranks hold it: the first stage's owns it, the last copies."""
        return self.tied_weight if self.last_rank != 0 else None
