"""MFU and memory, filled into each step's result before the other callbacks see it."""

from __future__ import annotations

from dataclasses import replace

from megascale.training.hardware import memory_bytes
from megascale.training.state import StepResult
from megascale.training.trainer import Trainer


class Throughput:
    """Adds what the step itself cannot know.

    Args:
        flops_per_sample: model FLOPs of forward and backward of one sample.
        peak: FLOP/s of one device.
    """

    def __init__(self, flops_per_sample: float, peak: float) -> None:
        self._flops_per_sample = flops_per_sample
        self._peak = peak

    def __call__(self, trainer: Trainer, result: StepResult) -> StepResult:
        """The result with mfu and memory_bytes."""
        parts = trainer.parts
        flops = self._flops_per_sample * result.global_batch_size
        peak = self._peak * parts.mesh.world_size
        mfu = flops / (result.step_time_s * peak)
        return replace(result, mfu=mfu, memory_bytes=memory_bytes(parts.device))
