"""A config's pipeline played in time, with stages as dear as their FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megascale.models.chunk import Chunk
from megascale.parallel.pipeline import PipelineLayout, StageCosts
from megascale.planner.timeline import ActionCosts, Timeline, play, schedule_orders


@dataclass(frozen=True)
class Simulation:
    """One step of a config's pipeline.

    Attributes:
        layout: of the pipeline. num_micro_batches: m. timeline: the step in time; an average
            stage's forward takes 1.
    """

    layout: PipelineLayout
    num_micro_batches: int
    timeline: Timeline

    @property
    def title(self) -> str:
        """What is drawn."""
        stages = len(self.layout.chunks) // self.layout.size
        return (
            f"{self.layout.schedule}: {self.layout.size} ranks, {stages} stage(s) a rank, "
            f"{self.num_micro_batches} micro-batches"
        )

    @property
    def plain_bubble(self) -> float:
        """(p - 1) / m: waiting over computing of 1F1B on equal stages."""
        return (self.layout.size - 1) / self.num_micro_batches

    def chunks(self, rank: int) -> Sequence[Chunk]:
        """The chunks of a rank's stages."""
        return [self.layout.chunks[stage] for stage in self.layout.stages_of(rank)]

    def as_json(self) -> dict[str, Any]:
        """The numbers, and every action with its start and end."""
        timeline = self.timeline
        ranks = range(timeline.size)
        return {
            "schedule": self.layout.schedule,
            "num_micro_batches": self.num_micro_batches,
            "bubble": timeline.bubble,
            "one_f_one_b_bubble": self.plain_bubble,
            "duration": timeline.duration,
            "idle": [timeline.idle(rank) for rank in ranks],
            "activations": [timeline.activations(rank) for rank in ranks],
            "layers": [[[c.begin, c.end] for c in self.chunks(rank)] for rank in ranks],
            "actions": [
                {**one.action._asdict(), "rank": one.rank, "start": one.start, "end": one.end}
                for one in timeline.placed
            ],
        }


def play_layout(layout: PipelineLayout, costs: StageCosts, num_micro_batches: int) -> Simulation:
    """Play a layout whose backward passes take twice as long as its forward passes."""
    whole = [costs.of(chunk.begin, chunk.end) for chunk in layout.chunks]
    average = sum(whole) / len(whole)
    actions = {stage: ActionCosts(*([cost / average] * 3)) for stage, cost in enumerate(whole)}
    timeline = play(schedule_orders(layout, num_micro_batches), actions)
    return Simulation(layout, num_micro_batches, timeline)
