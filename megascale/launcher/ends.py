"""What kind of end an attempt at a run had, told from markers and notes, and what follows from it.

Exit codes alone do not say: a rank that srun ended because another one failed has the same code as
one that was preempted. So ranks write what they know into the attempt's folder (`attempt.py`), and
this is read first; srun's words and exit code only where nothing was written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megascale.launcher.failure import Failure

REQUEUE_CODE = 75
"""Exit code of `attempt end` when the batch script is to requeue the job (EX_TEMPFAIL)."""


@dataclass(frozen=True)
class Kind:
    """A kind of end.

    Attributes:
        code: exit code of the batch script.
        again: whether another attempt may do better.
        meaning: in plain words, with what to do.
    """

    code: int
    again: bool
    meaning: str


KINDS: Mapping[str, Kind] = {
    "finished": Kind(0, False, "The run reached its end."),
    "user stop": Kind(
        0, False, "Someone asked it to stop; it saved first. Submit it again to go on."
    ),
    "time limit": Kind(0, True, "The job's time was nearly over; it saved and goes on."),
    "preempted": Kind(
        0,
        True,
        "Slurm took the nodes back (a preemption, a requeue by an administrator); it goes on later "
        "from its newest checkpoint.",
    ),
    "cancelled": Kind(0, False, "scancel ended it; submit it again to go on."),
    "config error": Kind(2, False, "The request cannot work; correct it and submit again."),
    "disk full": Kind(
        77,
        False,
        "A disk or a quota is full; free space and submit again. What was saved before is intact.",
    ),
    "numerical": Kind(
        65, False, "The numbers are no longer finite; another attempt would meet the same step."
    ),
    "out of memory": Kind(
        71,
        False,
        "A process needed more memory than there is: a smaller train.micro_batch_size, "
        "parallel.activation_recomputation, a higher zero_stage or more ranks help.",
    ),
    "node failure": Kind(72, True, "A machine or its network was lost; it goes on elsewhere."),
    "bad node": Kind(76, True, "A machine is not as the others; further attempts leave it out."),
    "hang": Kind(73, True, "A rank did not answer within parallel.collective_timeout_s."),
    "killed": Kind(
        74, True, "A process was killed from outside: memory of the machine, or an administrator."
    ),
    "error": Kind(1, False, "The program failed; the traceback says where."),
    "no progress": Kind(
        70, False, "Several attempts ended without a newer checkpoint; look at their reasons first."
    ),
}

_OUT_OF_MEMORY = re.compile(
    r"oom[-_]kill|out[- ]of[- ]memory|OutOfMemoryError|can't allocate memory|MemoryError", re.I
)
_NODE_LOST = re.compile(
    r"node failure|NODE_FAIL|error: Node .*(failed|unresponsive)|Communication connection failure|"
    r"Unable to confirm allocation|launch failed|credential revoked|Socket timed out on send/recv|"
    r"Job step aborted: .*Node",
    re.I,
)
_KILLED = re.compile(r"tasks? [\d,-]+: (Killed|Terminated)|signal (9|15)\b|SIGKILL", re.I)
_FIRST_END = re.compile(r"^srun: error: \S+ tasks? [\d,-]+: (Killed|Terminated|Exited).*", re.M)
"""What srun says of the ranks that ended first; it ends the others itself, at last by SIGKILL."""
_REFUSED = re.compile(r"tasks? [\d,-]+: Exited with exit code 2$", re.I | re.M)
_DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded")
"""A rank's own note often lies on the same disk, and is lacking then."""
_FIRST_ERROR = re.compile(r"^(\s*\d+: )?error: ", re.M)
_SILENT = re.compile(r"timed? ?out|timeout", re.I)


@dataclass(frozen=True)
class End:
    """How an attempt ended.

    Attributes:
        kind: a key of `KINDS`.
        text: what happened, first line first; with the first failing rank's traceback.
        rank: the rank that failed first, where one did.
        host: its machine.
    """

    kind: str
    text: str
    rank: int | None = None
    host: str = ""


def classify(
    code: int,
    outcome: Mapping[str, Any] | None,
    asked: str,
    notes: Mapping[int, Failure],
    log: str,
    state: str = "RUNNING",
) -> End:
    """The end of an attempt.

    Args:
        code: srun's exit code.
        outcome: what rank 0 wrote at a good end: {"kind", "step", "reason"}; None: nothing.
        asked: why the batch script asked the run to end; "" if it did not.
        notes: of the ranks that failed.
        log: what the attempt printed.
        state: of the job, by Slurm; REQUEUED: it ended the ranks to start the job again. The ranks
            of one that runs on got SIGTERM by a preemption with a time of grace, which the batch
            script is not told of.
    """
    alive = state in ("RUNNING", "")
    if outcome is not None:
        return _good_end(outcome, asked, alive or state == "REQUEUED")
    causes = sorted((n for n in notes.values() if not n.lost_peer), key=lambda n: n.time_s)
    if causes:
        first = causes[0]
        text = f"rank {first.rank} on {first.host} failed: {first.text}"
        trace = f"\n{first.trace}" if first.trace else ""
        return End(first.kind or "error", text + trace, first.rank, first.host)
    if _OUT_OF_MEMORY.search(log):
        return End("out of memory", _line_with(_OUT_OF_MEMORY, log))
    if _NODE_LOST.search(log):
        return End("node failure", _line_with(_NODE_LOST, log))
    if state == "REQUEUED":
        return End("preempted", "Slurm ended it to start it again, before it had saved")
    if not alive:
        return End("cancelled", f"it was {state.lower()} before it had saved")
    ended = _FIRST_END.search(log)
    if ended and ended.group(1) == "Killed":
        return End("killed", ended.group())
    lost = sorted(notes.values(), key=lambda n: n.time_s)
    if lost:
        first = lost[0]
        kind = "hang" if _SILENT.search(first.text) else "node failure"
        text = f"rank {first.rank} on {first.host} lost another rank: {first.text.splitlines()[0]}"
        return End(kind, text, first.rank, first.host)
    if _REFUSED.search(log):  # before it could leave a note, or where there is no folder for it
        text = _text_from(_FIRST_ERROR, log) or _line_with(_REFUSED, log)
        return End("disk full" if _DISK_FULL.search(text) else "config error", text)
    if _KILLED.search(log) or code in (137, 9, 143, 15):
        return End("killed", _line_with(_KILLED, log) or f"exit code {code}")
    return End("error", f"exit code {code}, and no rank said why\n{_tail(log)}")


def _good_end(outcome: Mapping[str, Any], asked: str, goes_on: bool) -> End:
    step, reason = outcome["step"], outcome["reason"]
    if outcome["kind"] == "finished":
        return End("finished", f"at step {step}" + (f": {reason}" if reason else ""))
    by_signal = "preempted" if goes_on else "cancelled"
    kind = asked or (by_signal if "SIGTERM" in reason else "user stop")
    return End(kind, f"saved and ended at step {step} ({reason})")


def _line_with(pattern: re.Pattern[str], log: str) -> str:
    return next((line for line in log.splitlines() if pattern.search(line)), "")


def _text_from(pattern: re.Pattern[str], log: str, lines: int = 3) -> str:
    """An error with its rule and remedy: the first line that matches, and those after it."""
    match = pattern.search(log)
    return "" if match is None else "\n".join(log[match.start() :].splitlines()[:lines])


def _tail(log: str, lines: int = 20) -> str:
    return "\n".join(log.splitlines()[-lines:])
