"""Where the time and memory of a step go: by phase, module and kind of work, against the peak.

torch's profiler records the operations; hooks put the module's name around its forward. A backward
belongs to the module whose forward made its node: both carry the same sequence number. Times are
self times of operations on the CPU, or on the GPU where there is one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from megascale.kernels.library import PROFILED
from megascale.parallel import shared_memory
from megascale.training.state import TrainState
from megascale.training.step import StepParts, train_step

_MODULE, _PHASE = "module:", "phase:"
WAIT = "waiting for a collective"
_BACKWARD = "autograd::engine::evaluate_function"

PRODUCTS = "matrix products"
ATTENTION = "attention kernel"
COMMUNICATION = "communication"
_COUNTED = re.compile(rf"^{PROFILED}\w+ (\d+)$")  # compiled products, with their FLOPs
# first match decides; what matches nothing is elementwise work
_KINDS = (
    (COMMUNICATION, re.compile(rf"^(c10d::|record_param_comms|{WAIT})")),
    (ATTENTION, re.compile(rf"scaled_dot_product|flash_attention|^{PROFILED}attention")),
    (PRODUCTS, re.compile(rf"^aten::(mm|addmm|bmm|baddbmm|_?addmv|mv|linear)$|{_COUNTED.pattern}")),
    ("copies", re.compile(r"^aten::(copy_|fill_|zero_|cat|_to_copy|clone|index|embedding.*)$")),
    (
        "Python and dispatch",
        re.compile(r"^(module:|phase:|autograd::|Optimizer\.|Torch-Compiled|FSDP::)"),
    ),
)
_MOVED = ("gloo:", "nccl:")  # beside the step, on threads or streams of their own
_MEMORY = f"{shared_memory.BACKEND}:"  # within the step
OTHER = "elementwise and reductions"


@dataclass
class Share:
    """What one line of the profile took, for one step.

    Attributes:
        seconds: self time. flops: of its matrix products. kept_bytes: allocated and not freed in
            the forward: activations that wait for the backward.
    """

    seconds: float = 0.0
    flops: float = 0.0
    kept_bytes: float = 0.0


@dataclass
class Collective:
    """What one kind of collective took, for one step.

    Attributes:
        calls: on this rank. seconds: from a call to its end, beside the step, so that calls in
            flight together count twice; the time that the step stood still for collectives is the
            kind of work "communication".
    """

    calls: float = 0.0
    seconds: float = 0.0


@dataclass
class Profile:
    """A step's time in three divisions; each adds up to `seconds`.

    Attributes:
        phases, modules, kinds: name -> share. Modules have the layer's number replaced by `*`.
        collectives: kind -> what moves while the step goes on.
        steps: that were recorded. seconds: of one of them, as far as operations cover it.
        wall_seconds: of one, by the clock. model_flops: of one on this rank. peak: FLOP/s.
    """

    phases: dict[str, Share] = field(default_factory=lambda: defaultdict(Share))
    modules: dict[str, Share] = field(default_factory=lambda: defaultdict(Share))
    kinds: dict[str, Share] = field(default_factory=lambda: defaultdict(Share))
    collectives: dict[str, Collective] = field(default_factory=lambda: defaultdict(Collective))
    steps: int = 1
    seconds: float = 0.0
    wall_seconds: float = 0.0
    model_flops: float = 0.0
    peak: float = 1.0

    def gap(self) -> list[tuple[str, float]]:
        """What stands between the peak and the step: (reason, seconds), adding up to the step."""
        counted = (PRODUCTS, ATTENTION)  # what the model's FLOPs are spent in
        spent = sum(self.kinds[kind].seconds for kind in counted)
        ideal = self.model_flops / self.peak
        rows = [("the model's FLOPs at the peak of matrix products", ideal)]
        rows.append(("products and attention below the peak, or twice", spent - ideal))
        rows += [(k, s.seconds) for k, s in self.kinds.items() if k not in counted]
        rows.append(("outside of recorded operations", self.wall_seconds - self.seconds))
        return rows

    def as_json(self) -> dict[str, Any]:
        """All numbers."""
        divisions = {"phases": self.phases, "modules": self.modules, "kinds": self.kinds}
        return {
            "steps": self.steps,
            "wall_seconds": self.wall_seconds,
            "mfu": self.model_flops / self.peak / self.wall_seconds,
            "gap": dict(self.gap()),
            **{n: {k: vars(s) for k, s in shares.items()} for n, shares in divisions.items()},
            "collectives": {kind: vars(one) for kind, one in self.collectives.items()},
        }


def profile_steps(
    parts: StepParts, steps: int, trace: Path, flops_per_sample: float, peak: float
) -> Profile:
    """Run two steps to warm up, then `steps` under the profiler. Collective.

    Args:
        trace: where this rank's Chrome trace goes.
        flops_per_sample: see `Task.flops_per_sample`. peak: FLOP/s of one device.
    """
    state = TrainState()
    for _ in range(2):
        train_step(parts, state)
    activities = [ProfilerActivity.CPU]
    if parts.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    wall = 0.0
    with ExitStack() as stack:
        profiler = stack.enter_context(
            torch.profiler.profile(activities=activities, profile_memory=True, with_flops=True)
        )
        stack.enter_context(_named(parts))
        for _ in range(steps):
            wall += train_step(parts, state).step_time_s
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    profile = summarize(profiler.events(), steps, on_gpu=parts.device.type == "cuda")
    profile.wall_seconds = wall / steps
    samples = state.samples_seen / (steps + 2) / parts.mesh.world_size
    profile.model_flops, profile.peak = flops_per_sample * samples, peak
    return profile


@contextmanager
def _named(parts: StepParts) -> Iterator[None]:
    """Ranges around every module's forward and around the phases of a step."""
    handles = []
    for name, module in parts.engine.module.named_modules():
        label = _MODULE + re.sub(r"\.\d+(?=\.|$)", ".*", name)
        handles += _ranges(module, label)
    engine, loader = parts.engine, parts.loader
    phases = (
        (loader, "load", "load"),
        (engine, "forward_backward", "forward and backward"),
        (engine, "step", "optimizer"),
    )
    for owner, method, phase in phases:
        setattr(owner, method, _within(_PHASE + phase, getattr(owner, method)))
    wait = dist.Work.wait
    dist.Work.wait = _within(WAIT, wait)  # type: ignore[method-assign]
    try:
        yield
    finally:
        dist.Work.wait = wait  # type: ignore[method-assign]
        for owner, method, _ in phases:
            delattr(owner, method)
        for handle in handles:
            handle.remove()


def _within(label: str, function: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return function(*args, **kwargs)

    return call


def _ranges(module: nn.Module, label: str) -> list[Any]:
    opened: list[record_function] = []

    def enter(*_: Any) -> None:
        opened.append(record_function(label))
        opened[-1].__enter__()

    def leave(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    return [
        module.register_forward_pre_hook(enter, prepend=True),
        module.register_forward_hook(leave, always_call=True),
    ]


def summarize(events: Sequence[Any], steps: int, *, on_gpu: bool) -> Profile:
    """The three divisions of recorded events (`torch.profiler.profile.events()`)."""
    profile = Profile(steps=steps)
    made_by = {
        event.sequence_nr: module
        for event in events
        if event.sequence_nr >= 0 and not _enclosing(event, (_BACKWARD,))
        if (module := _module_of(event))
    }
    for event in events:
        if event.name.startswith((*_MOVED, _MEMORY)):
            collective = profile.collectives[event.name.partition(":")[2]]
            collective.calls += 1 / steps
            collective.seconds += event.time_range.elapsed_us() * 1e-6 / steps
        if event.name.startswith(_MOVED):
            continue
        phase, module = _place(event, made_by)
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kind = COMMUNICATION if _enclosing(event, (_MEMORY,)) else _kind(event.name)
        seconds = time * 1e-6 / steps
        flops = _flops(event) / steps if kind == PRODUCTS else 0.0
        memory = event.self_device_memory_usage if on_gpu else event.self_cpu_memory_usage
        kept = memory / steps if phase == "forward" else 0.0
        profile.seconds += seconds
        for shares, key in (
            (profile.phases, phase),
            (profile.modules, module),
            (profile.kinds, kind),
        ):
            share = shares[key]
            share.seconds += seconds
            share.flops += flops
            share.kept_bytes += kept
    return profile


def _flops(event: Any) -> int:
    counted = _COUNTED.match(event.name)
    return int(counted[1]) if counted else event.flops or 0


def _kind(name: str) -> str:
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), OTHER)


def _ancestors(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _enclosing(event: Any, beginnings: Iterable[str]) -> Any:
    """The nearest of an event and its ancestors whose name begins so; None without one."""
    wanted = tuple(beginnings)
    return next((e for e in _ancestors(event) if e.name.startswith(wanted)), None)


def _module_of(event: Any) -> str:
    found = _enclosing(event, (_MODULE,))
    return "" if found is None else found.name.removeprefix(_MODULE) or "(whole model)"


def _place(event: Any, made_by: dict[int, str]) -> tuple[str, str]:
    """(phase, module) of an event."""
    found = _enclosing(event, (_MODULE, _BACKWARD, _PHASE))
    if found is None:
        return "between the phases", "(no module)"
    if found.name.startswith(_BACKWARD):
        return "backward", made_by.get(found.sequence_nr, "(no module)")
    if found.name.startswith(_MODULE):
        again = _enclosing(found, (_BACKWARD,)) is not None
        return "forward again, for the backward" if again else "forward", _module_of(event)
    phase = found.name.removeprefix(_PHASE)
    # what is around the model's calls: gradients are added, scaled and reduced
    return ("gradients" if phase == "forward and backward" else phase), "(no module)"
