"""A pipeline schedule played in time: who computes what when, and who waits.

    rank 0   F0 F1 F2 F3 .. .. B0 B1 B2 B3
    rank 1   .. F0 F1 F2 F3 B0 B1 B2 B3 ..

The order of each rank's actions is torch.distributed.pipelining's own; an action starts when its
rank is free and what it needs has arrived.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch.distributed.pipelining import schedules

from megascale.parallel.pipeline import SCHEDULES, Action, PipelineLayout

Orders = Mapping[int, Sequence[Action]]
_KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


@dataclass(frozen=True)
class ActionCosts:
    """Time of one stage's actions, in any one unit.

    Attributes:
        forward: F. input_backward: I. weight_backward: W. A whole backward is I and W together.
    """

    forward: float = 1.0
    input_backward: float = 1.0
    weight_backward: float = 1.0

    def of(self, kind: str) -> float:
        """Time of an action of this kind."""
        both = self.input_backward + self.weight_backward
        costs = (self.forward, both, self.input_backward, self.weight_backward)
        return dict(zip("FBIW", costs, strict=True))[kind]


@dataclass(frozen=True)
class Placed:
    """An action in time: `rank` computes it from `start` to `end`."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A step of a pipeline in time.

    Attributes:
        placed: all actions. size: ranks.
    """

    placed: tuple[Placed, ...]
    size: int

    @property
    def duration(self) -> float:
        """From the first start to the last end."""
        return max(one.end for one in self.placed)

    def busy(self, rank: int) -> float:
        """Time in which a rank computes."""
        return sum(one.end - one.start for one in self.placed if one.rank == rank)

    def idle(self, rank: int) -> float:
        """Time in which a rank waits."""
        return self.duration - self.busy(rank)

    @property
    def bubble(self) -> float:
        """Waiting over computing, of all ranks: (p - 1) / m for 1F1B and GPipe."""
        busy = sum(self.busy(rank) for rank in range(self.size))
        return (self.duration * self.size - busy) / busy

    def activations(self, rank: int) -> int:
        """Most stages' activations that a rank keeps at once, counted in forwards of one stage."""
        return max(map(sum, self.moments(rank)))

    def moments(self, rank: int) -> set[tuple[int, ...]]:
        """The states of a rank: of each of its stages in order, how many forwards' activations it
        keeps, which it does until the weights' gradients are computed.
        """
        own = sorted((one for one in self.placed if one.rank == rank), key=lambda one: one.start)
        kept = dict.fromkeys(sorted({one.action.stage for one in own}), 0)
        seen = set()
        for one in own:
            kept[one.action.stage] += {"F": 1, "B": -1, "W": -1, "I": 0}[one.action.kind]
            seen.add(tuple(kept.values()))
        return seen


def schedule_orders(layout: PipelineLayout, num_micro_batches: int) -> dict[int, list[Action]]:
    """What each rank does in which order: read from torch's schedule, without any process.

    Raises:
        ValueError: the schedule does not take this number of micro-batches.
    """
    kind = SCHEDULES[layout.schedule]
    schedule_class = getattr(schedules, kind.torch_class)
    orders = {}
    for rank in range(layout.size):
        stages: Any = [_stand_in(layout, stage, rank) for stage in layout.stages_of(rank)]
        single = kind.stages_per_rank == (1, 1)
        schedule = schedule_class(stages[0] if single else stages, num_micro_batches)
        if layout.schedule == "1f1b":
            orders[rank] = _one_forward_one_backward(rank, layout.size, num_micro_batches)
            continue
        order = (schedule._get_pipeline_order() if single else schedule.pipeline_order)[rank]
        orders[rank] = [action for one in order if one is not None for action in _actions(one)]
    return orders


def _one_forward_one_backward(rank: int, size: int, num_micro_batches: int) -> list[Action]:
    """What torch's 1F1B does; the order that it states (2.13) numbers the last rank's wrongly."""
    warm_up = min(num_micro_batches, size - rank)
    order = [Action("F", rank, i) for i in range(warm_up)]
    for i in range(num_micro_batches):
        order.append(Action("B", rank, i))
        if warm_up + i < num_micro_batches:
            order.append(Action("F", rank, warm_up + i))
    return order


def _stand_in(layout: PipelineLayout, stage: int, rank: int) -> SimpleNamespace:
    """What torch's schedules ask of a stage to draw up their order."""
    return SimpleNamespace(
        stage_index=stage,
        num_stages=len(layout.chunks),
        group_size=layout.size,
        group_rank=rank,
        is_first=stage == 0,
        is_last=stage == len(layout.chunks) - 1,
        submod=None,
        has_backward=True,
    )


def _actions(action: Any) -> list[Action]:
    """A computation of torch's in our terms; an overlapped pair is two, a collective none."""
    if action.sub_actions:
        return [small for part in action.sub_actions for small in _actions(part)]
    kind = _KINDS.get(action.computation_type.name)
    return [] if kind is None else [Action(kind, action.stage_index, action.microbatch_index)]


def play(
    orders: Orders, costs: Mapping[int, ActionCosts] | None = None, transfer: float = 0.0
) -> Timeline:
    """Place every action as early as its rank's order and its inputs allow.

    Args:
        orders: each rank's actions in order.
        costs: by stage; None: every action takes 1, a whole backward 2.
        transfer: time between the end of an action and its result's arrival on another rank.

    Raises:
        ValueError: the orders wait for each other.
    """
    ranks = {(a.stage, a.kind == "F"): rank for rank, order in orders.items() for a in order}
    last = max(stage for stage, _ in ranks)
    done: dict[tuple[str, int, int], float] = {}
    free = dict.fromkeys(orders, 0.0)
    waiting = {rank: list(order) for rank, order in orders.items()}
    placed: list[Placed] = []
    while any(waiting.values()):
        before = len(placed)
        for rank, actions in waiting.items():
            while actions:
                start = _ready(actions[0], rank, done, ranks, last, transfer)
                if start is None:
                    break
                action = actions.pop(0)
                begin = max(start, free[rank])
                cost = (costs or {}).get(action.stage, ActionCosts()).of(action.kind)
                free[rank] = begin + cost
                done["F" if action.kind == "F" else "W" if action.kind == "W" else "I",
                     action.stage, action.micro_batch] = free[rank]  # fmt: skip
                placed.append(Placed(rank, action, begin, free[rank]))
        if len(placed) == before:
            raise ValueError(f"the ranks wait for each other: {waiting}")
    return Timeline(tuple(placed), len(orders))


def _ready(
    action: Action,
    rank: int,
    done: Mapping[tuple[str, int, int], float],
    ranks: Mapping[tuple[int, bool], int],
    last: int,
    transfer: float,
) -> float | None:
    """When what `action` needs is there; None: not known yet."""
    kind, stage, micro_batch = action
    if kind == "F":
        needs = [("F", stage - 1)] if stage else []
    elif kind == "W":
        needs = [("I", stage)]
    else:
        needs = [("F", stage)] + ([("I", stage + 1)] if stage < last else [])
    times = []
    for needed, where in needs:
        time = done.get((needed, where, micro_batch))
        if time is None:
            return None
        times.append(time + (transfer if ranks[where, needed == "F"] != rank else 0.0))
    return max(times, default=0.0)
