"""Loss scaling for fp16: one scaler that drives both engines.

fp16 has no exponent for small gradients, so the loss is multiplied by a scale before the backward
and the gradients are divided by it in fp32 (arXiv:1710.03740). A dynamic scale is halved when a
gradient overflows (that step is skipped) and doubled after a window of steps without overflow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megascale.errors import UserError

_FACTOR = 2.0
_PREFIX = "loss_scaler."


@dataclass(frozen=True)
class LossScaling:
    """How the loss is scaled; the default is not at all.

    Attributes:
        initial_scale: the scale of the first step, and of all steps when it is not dynamic.
        dynamic: whether the scale follows the overflows.
        window: steps without overflow after which the scale is doubled.
        hysteresis: overflows until the scale is halved; the count starts anew when it is doubled.
        min_scale: the scale is never halved below it.
    """

    initial_scale: float = 1.0
    dynamic: bool = False
    window: int = 1000
    hysteresis: int = 1
    min_scale: float = 1.0


class LossScaler:
    """The scale in force and what decides the next one; the same on every rank.

    Attributes:
        scale: multiply the loss by it, divide the gradients by it.
    """

    def __init__(self, scaling: LossScaling) -> None:
        self.scale = scaling.initial_scale
        self._scaling = scaling
        self._good_steps = 0
        self._tolerated = scaling.hysteresis

    def update(self, *, overflow: bool) -> None:
        """Choose the scale of the next step; `overflow` must be the same on all ranks.

        Raises:
            UserError: an overflow at the smallest scale: no scale is small enough.
        """
        if not self._scaling.dynamic:
            return
        if overflow:
            self._good_steps = 0
            if self._tolerated > 1:
                self._tolerated -= 1
                return
            if self.scale <= self._scaling.min_scale:
                raise _too_small(self.scale)
            self.scale = max(self.scale / _FACTOR, self._scaling.min_scale)
            return
        self._good_steps += 1
        if self._good_steps == self._scaling.window:
            self.scale *= _FACTOR
            self._good_steps = 0
            self._tolerated = self._scaling.hysteresis

    def state_dict(self) -> dict[str, float]:
        """JSON numbers for the checkpoint, by the same names whatever engine runs."""
        if not self._scaling.dynamic:
            return {}
        return {
            f"{_PREFIX}scale": self.scale,
            f"{_PREFIX}good_steps": self._good_steps,
            f"{_PREFIX}tolerated": self._tolerated,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Inverse of `state_dict`; the state of a run without dynamic scaling changes nothing."""
        if self._scaling.dynamic and f"{_PREFIX}scale" in state:
            self.scale = float(state[f"{_PREFIX}scale"])
            self._good_steps = int(state[f"{_PREFIX}good_steps"])
            self._tolerated = int(state[f"{_PREFIX}tolerated"])


def _too_small(scale: float) -> UserError:
    return UserError(
        f"a gradient overflows in fp16 with the loss scale {scale:g}",
        rule="precision.min_loss_scale is the smallest scale; the weights were not changed",
        remedy="resume from the last checkpoint with a lower optimizer.lr, or use "
        "precision.dtype=bf16",
    )
