"""The global batch size as a function of the samples consumed."""

from __future__ import annotations

from dataclasses import dataclass

from megascale.config.schema import TrainConfig


@dataclass(frozen=True)
class BatchSizeSchedule:
    """A batch size that is constant, or grows in equal steps over the first samples of a run.

    The rule is that of Megatron-LM's --rampup-batch-size: of the (final - start) / increment
    increases each lasts an equal share of `samples`. It reads the samples consumed and nothing
    else, so a resumed run continues with the right size, and the order of samples is that of a
    run without a ramp.

    Attributes:
        final: the size after the ramp.
        start: the size of the first step; None: no ramp.
        increment: what is added at a time; divides final - start.
        samples: samples after which `final` is reached.
    """

    final: int
    start: int | None = None
    increment: int = 1
    samples: int = 1

    def at(self, samples_seen: int) -> int:
        """Samples of the step that begins at sample `samples_seen`."""
        if self.start is None or samples_seen >= self.samples:
            return self.final
        increases = (self.final - self.start) // self.increment
        return self.start + samples_seen * increases // self.samples * self.increment

    def samples_after(self, steps: int, seen: int = 0) -> int:
        """Samples consumed after `steps` more steps, of a run that has seen `seen` samples."""
        for done in range(steps):
            size = self.at(seen)
            if size == self.final:
                return seen + (steps - done) * size
            seen += size
        return seen


def batch_size_schedule(train: TrainConfig) -> BatchSizeSchedule:
    """The schedule of a run's settings."""
    ramp = train.batch_size_ramp
    if ramp is None:
        return BatchSizeSchedule(train.global_batch_size)
    return BatchSizeSchedule(train.global_batch_size, ramp.start, ramp.increment, ramp.samples)
