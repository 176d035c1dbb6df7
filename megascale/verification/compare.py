"""Comparing a recorded run with the single process, and naming what is wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megascale.verification.distances import Distances, distances
from megascale.verification.layout import Layout
from megascale.verification.norm_cause import norm_cause
from megascale.verification.record import START, RunRecord, places
from megascale.verification.update_cause import update_cause

# A gradient that is zero in exact arithmetic (key biases: softmax does not see a shift) is pure
# rounding; a tensor counts as at least this part of the whole gradient's norm. With a tolerance of
# 1e-5 a difference then matters from 1e-9 of the norm on, 1/60 of fp32's rounding of it: after 200
# steps key biases of one model differed by 4.5e-10.
NOISE = 1e-4


EARLY_STEPS = 5


@dataclass(frozen=True)
class Tolerance:
    """How far a layout may be from the single process; relative unless said otherwise.

    Attributes:
        loss, norm: of each step.
        gradient: root mean square of the difference over that of the gradient, each tensor.
        late: after EARLY_STEPS steps a gradient may be so many times further off.
        weight: absolute, in units of the learning rate times 1000 (1e-5 at lr 1e-3).
        output: mean and root mean square of a module's output, over the latter.
        tensor_steps: gradients and weights count in so many first steps only; None: in all.
    """

    loss: float
    norm: float
    gradient: float
    weight: float
    output: float
    late: float = 1.0
    tensor_steps: int | None = None


# What is off by more on an engine that has fp64 is run there once more, which decides exactly.
FP32 = Tolerance(loss=1e-5, norm=1e-5, gradient=1e-5, weight=1e-5, output=1e-5)
# Each update adds rounding to the weights, and small gradients show it: after 13 to 20 steps single
# tensors of one model were 1.0e-5 to 1.7e-5 off in every layout, with losses and weights within
# 2e-7. DeepSpeed has no fp64 that could tell; losses, norms and weights keep their limit.
FP32_ALONE = replace(FP32, late=10.0)
# No allowance for anything but fp64's own rounding, of which 1e-14 was seen after 20 steps.
FP64 = Tolerance(loss=1e-12, norm=1e-12, gradient=1e-12, weight=1e-12, output=1e-12)
# One bf16 rounding is 2^-9. Single tensors drift apart from step to step (after 200 steps they are
# different points near the same curve), losses and norms do not: docs/numerics.md
BF16 = Tolerance(loss=2e-2, norm=5e-2, gradient=5e-2, weight=2e-3, output=2e-2, tensor_steps=3)

TOLERANCES = {"fp64": FP64, "fp32": FP32, "bf16": BF16, "fp16": BF16}
"""By precision.dtype; of fp32 on DeepSpeed: FP32_ALONE."""

ROUNDING = 1e-3
"""Larger differences in fp32 are no rounding, whatever fp64 says."""


@dataclass(frozen=True)
class Difference:
    """The first thing that is not the same.

    Attributes:
        step: 1-based; 0 when the whole run failed.
        what: "initial weight", "samples", "output", "loss", "gradient norm", "gradient", "weight"
            or "replicas".
        tensor: its name (of a module for "output"), "" for scalars.
        size: the difference in the units of its tolerance.
        cause: what such a difference usually comes from.
        line: the line of the plan that cuts the tensor.
    """

    step: int
    what: str
    tensor: str
    size: float
    cause: str
    line: str


@dataclass(frozen=True)
class Verdict:
    """Outcome of one layout.

    Attributes:
        loss, norm, gradient, weight: the largest differences seen.
        first: the first difference beyond the tolerance, None when all agree.
    """

    loss: float
    norm: float
    gradient: float
    weight: float
    first: Difference | None

    @property
    def may_be_rounding(self) -> bool:
        """Whether all is the same but for numbers that are off a little."""
        first = self.first
        return first is None or (first.what in _NUMBERS and first.size < ROUNDING)


_NUMBERS = ("loss", "gradient norm", "gradient", "weight", "output")


def compare(
    found: RunRecord,
    expected: RunRecord,
    layout: Layout,
    tolerance: Tolerance,
    micro: int,
    lr: float,
) -> Verdict:
    """Compare step by step; tensors in backward order, so that the first named is the source.

    Args:
        micro: micro-batches a rank runs in each step, for naming factors.
        lr: peak learning rate, which scales what a difference of weights means.
    """
    worst = {"loss": 0.0, "norm": 0.0, "gradient": 0.0, "weight": 0.0}
    first: Difference | None = None
    away = distances(found, expected)
    for step in range(len(expected.losses)):
        whole = tolerance.tensor_steps is None or step < tolerance.tensor_steps
        with_tensors = whole and expected.has_tensors(step)
        checks = _step_differences(found, expected, away, step, lr, with_tensors)
        for what, tensor, size in checks:
            key = {"gradient norm": "norm"}.get(what, what)
            limit = getattr(tolerance, key, 0.0)
            if what == "gradient" and step >= EARLY_STEPS:
                limit *= tolerance.late
            if key in worst:
                worst[key] = _larger(worst[key], size)
            if first is None and not size <= limit:
                cause, line = _cause(found, expected, step, what, tensor, layout, micro)
                first = Difference(step + 1, what, tensor, size, cause, line)
    return Verdict(first=first, **worst)


def _larger(a: float, b: float) -> float:
    """max in which NaN wins: Python's max would hide it."""
    return b if not b <= a else a


def _step_differences(
    found: RunRecord,
    expected: RunRecord,
    away: Distances,
    step: int,
    lr: float,
    with_tensors: bool,
) -> list[tuple[str, str, float]]:
    """(what, tensor, size) of one step in the order in which an error would spread."""
    rows = [] if step else _start_differences(expected, away)
    rows += [
        ("samples", "", float(found.samples[step] != expected.samples[step])),
        *_output_differences(found, expected, step),
        ("replicas", "", float(not found.agree[step])),
        ("loss", "", _relative(found.losses[step], expected.losses[step])),
    ]
    names = list(reversed(expected.names)) if with_tensors else []
    norm = expected.norms[step]
    at = expected.rows("grad").index(step) if names else 0
    for name in names:
        key = "grad", name
        rows.append(("replicas", name, float(away.drift[key][at])))
        size = max(float(away.size[key][at]), NOISE * norm)
        rows.append(("gradient", name, float(away.l2[key][at]) / size))
    rows.append(("gradient norm", "", _relative(found.norms[step], norm)))
    at = expected.rows("master").index(step) if names else 0
    for name in names:
        key = "master", name
        rows.append(("replicas", name, float(away.drift[key][at])))
        rows.append(("weight", name, float(away.largest[key][at]) / max(1.0, lr * 1000)))
    return rows


def _start_differences(expected: RunRecord, away: Distances) -> list[tuple[str, str, float]]:
    """Weights are drawn by name: before the first step they are the same to the last bit."""
    rows = []
    at = expected.rows("master").index(START)
    for name in expected.names:
        rows.append(("replicas", name, float(away.drift["master", name][at])))
        rows.append(("initial weight", name, float(away.largest["master", name][at])))
    return rows


def _output_differences(
    found: RunRecord, expected: RunRecord, step: int
) -> list[tuple[str, str, float]]:
    """Of the outputs of modules, in the order of the forward."""
    rows = []
    ours, theirs = (r.outputs[step] if step < len(r.outputs) else {} for r in (found, expected))
    for name, (mean, size) in theirs.items():
        if name in ours:
            our_mean, our_size = ours[name]
            off = _larger(abs(our_mean - mean), abs(our_size - size))
            rows.append(("output", name, off / max(size, 1e-30)))
    return rows


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / max(abs(expected), 1e-30)


def _l2(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values.astype(np.float64)).sum()))


def _drift(record: RunRecord, step: int, kind: str, name: str) -> float:
    """1 when ranks that hold the same elements disagree on them, else 0; bits are compared."""
    seen: dict[tuple, np.ndarray] = {}
    for _, part, values in record.copies(step, kind, name):
        place = (part.box, part.start, part.numel)
        if not np.array_equal(seen.setdefault(place, values), values):
            return 1.0
    return 0.0


def _cause(
    found: RunRecord,
    expected: RunRecord,
    step: int,
    what: str,
    tensor: str,
    layout: Layout,
    micro: int,
) -> tuple[str, str]:
    """(explanation, plan line) of a difference."""
    if what == "samples":
        return "ranks read other samples, or in another order", ""
    if what in ("loss", "gradient norm"):
        field = "losses" if what == "loss" else "norms"
        ours, theirs = getattr(found, field)[step], getattr(expected, field)[step]
        ratio = ours / theirs if theirs else float("nan")
        named = _factor(ratio, layout, micro)
        if what == "loss":
            own = (
                "nothing differs before it: its own sums, its labels, or a stale weight of the head"
            )
            return named or own, ""
        named = named or norm_cause(found, expected, step, layout)
        return named or "no gradient differs before it: look at its own reduction", ""
    if what == "replicas" and not tensor:
        return (
            "ranks report different losses: a missing sum over data- or context-parallel ranks",
            "",
        )
    if what == "output":
        ours, theirs = (record.outputs[step][tensor][1] for record in (found, expected))
        line = next((p.line for p in found.ranks[0].values() if _inside(p.name, tensor)), "")
        return _output_cause(ours / max(theirs, 1e-300), layout, step), line
    if what == "initial weight":
        step = START
    kind = "grad" if what == "gradient" else "master"
    if what == "replicas":
        kind, step = _where_copies_drift(found, step, tensor)
    parts = [part for _, part, _ in found.copies(step, kind, tensor)]
    line = parts[0].line if parts else ""
    if what == "replicas":
        return (
            f"copies on different ranks differ: {_missing_sync(found, step, kind, tensor, layout)}",
            line,
        )
    ours, theirs = found.whole(step, kind, tensor), expected.whole(step, kind, tensor)
    if not np.isfinite(ours).all():
        return "not finite (or held by no rank)", line
    if what == "weight" and expected.has_tensors(step - 1 if step else step):
        named = update_cause(found, expected, step, tensor)
        if named:
            return named, line
    scale = float(ours @ theirs / max(theirs @ theirs, 1e-300))
    rest = _l2(ours - scale * theirs) / max(_l2(ours), 1e-300)
    if rest < 1e-3 and abs(scale - 1) > 1e-3:
        return _factor(scale, layout, micro) or f"scaled by {scale:.4g}", line
    wrong = _wrong_ranks(found, step, kind, tensor, theirs)
    if 0 < len(wrong) < len(parts):
        return f"only the slice of rank(s) {', '.join(map(str, wrong))} differs: a bad cut", line
    again = ""
    if what == "gradient" and layout.recompute != "none":
        again = "; all outputs agree: what the backward computes again may be something else"
    return (
        f"other values (relative {_l2(ours - theirs) / max(_l2(theirs), 1e-300):.1e}){again}",
        line,
    )


def _inside(parameter: str, module: str) -> bool:
    return parameter.rpartition(".")[0] == module


def _output_cause(ratio: float, layout: Layout, step: int) -> str:
    named = ""
    if layout.tp > 1 and abs(ratio / layout.tp - 1) < 1e-2:
        named = f"x tp ({layout.tp}): a doubled reduction; "
    elif layout.tp > 1 and abs(ratio * layout.tp - 1) < 1e-2:
        named = f"x 1/tp (1/{layout.tp}): a missing reduction; "
    seam = ""
    if layout.cp > 1:
        seam = (
            ", or its mask, its positions or its dropout masks at a seam of the sequence "
            f"({2 * layout.cp} chunks over cp={layout.cp} ranks)"
        )
    if step:  # in the steps before, the same module put out the right numbers
        return (
            f"{named}root mean square x {ratio:.4g}, all outputs before it and all weights after "
            "the step before agree: this module computes with a stale weight or another input"
        )
    return (
        f"{named}root mean square x {ratio:.4g}, and all outputs before it agree: a reduction, a "
        f"cut, a mask or an input of this module{seam}"
    )


def _where_copies_drift(found: RunRecord, step: int, tensor: str) -> tuple[str, int]:
    """(kind, step) of the first copies that differ."""
    if not step and _drift(found, START, "master", tensor):
        return "master", START
    return ("grad" if _drift(found, step, "grad", tensor) else "master"), step


def _missing_sync(found: RunRecord, step: int, kind: str, tensor: str, layout: Layout) -> str:
    """Which synchronisation is missing where copies of a tensor differ."""
    per_stage = layout.world_size // layout.pp
    stages = {rank // per_stage for rank, _, _ in found.copies(step, kind, tensor)}
    if len(stages) > 1:
        held = " and ".join(map(str, sorted(stages)))
        return f"the gradients of a weight that pipeline ranks {held} share are not summed"
    return "a missing synchronisation"


def _wrong_ranks(
    found: RunRecord, step: int, kind: str, tensor: str, theirs: np.ndarray
) -> list[int]:
    wrong = []
    for rank, part, values in found.copies(step, kind, tensor):
        right = theirs[places(part)]
        if _l2(values - right) > 1e-4 * max(_l2(right), 1e-300):
            wrong.append(rank)
    return wrong


def _factor(ratio: float, layout: Layout, micro: int) -> str:
    """Name a factor by the sizes of the layout; "" when it is none of them."""
    causes = [
        (layout.tp, f"x tp ({layout.tp}): a doubled reduction over the tensor-parallel group"),
        (1 / layout.tp, f"x 1/tp (1/{layout.tp}): a missing reduction over the group"),
        (layout.cp, f"x cp ({layout.cp}): a doubled sum over the context-parallel ranks"),
        (1 / layout.cp, f"x 1/cp (1/{layout.cp}): a missing sum over the context-parallel ranks"),
        (layout.dp, f"x dp ({layout.dp}): summed over replicas where the mean is meant"),
        (1 / layout.dp, f"x 1/dp (1/{layout.dp}): averaged twice, or a replica is missing"),
        (micro, f"x micro-batches ({micro}): the loss is not divided by their number"),
        (1 / micro, f"x 1/micro-batches (1/{micro}): divided twice, or only one counted"),
    ]
    fitting = [text for value, text in causes if value != 1 and abs(ratio / value - 1) < 1e-2]
    return ", or ".join(fitting)
