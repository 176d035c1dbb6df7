"""Repeat the experiments behind refusals: train what the capability table refuses, and compare.

    python -m tools.refused

Each experiment runs with the table's rows out of force, beside the single process on the same tiny
GPT (plain SGD without clipping, which hides nothing). The figures stand in docs/layouts.md. A row
of the table whose experiment comes out the same as the single process has lost its reason.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import typer

from megascale.cli.process import distributed_process
from megascale.config.load import load_config
from megascale.config.schema import Config
from megascale.config.yaml_text import dump_yaml
from megascale.data.token_file import TokenFileWriter, token_dtype
from megascale.engine import capabilities
from megascale.launcher.failure import read_notes
from megascale.launcher.forked import preload
from megascale.launcher.local import launch_local
from megascale.verification.compare import FP32, compare
from megascale.verification.layout import SINGLE, Layout, parse_layouts
from megascale.verification.record import read_record, record_run

_STEPS = 3
_VOCAB = 96
_WAIT_S = 120
"""An experiment that takes longer hangs."""


@dataclass(frozen=True)
class Experiment:
    """A refused layout.

    Attributes:
        changes: of the config, on both sides.
    """

    layout: Layout
    changes: tuple[str, ...] = ()


def _experiments() -> list[Experiment]:
    deepspeed = "dp=2,pp=2,engine=deepspeed"
    split = ("interleaved_zero_bubble", "zbv", "dualpipev")
    texts = [f"{deepspeed},zero={zero}" for zero in (2, 3)]
    texts += [
        f"dp=2,pp=2,engine=torch,zero={zero},schedule={name},vpp=2"
        for name in split
        for zero in (2, 3)
    ]
    found = [Experiment(one) for one in parse_layouts(";".join(texts))]
    (first_stage,) = parse_layouts(f"{deepspeed},zero=1")
    by_layer = ("optimizer.layer_lr_decay=0.9",)
    (plain,) = parse_layouts("dp=2,engine=deepspeed,zero=1")
    found.append(Experiment(first_stage, changes=by_layer))
    for name in ("lamb", "adafactor", "muon"):
        found.append(Experiment(plain, changes=(f"optimizer.name={name}",)))
    (sharded,) = parse_layouts("dp=2,engine=torch,zero=1")
    for name in ("adafactor", "muon"):
        found.append(Experiment(sharded, changes=(f"optimizer.name={name}",)))
    return found


def main() -> None:
    """Run all experiments; one line each."""
    preload(["megascale.training.assemble", "megascale.engine.deepspeed_engine"], on_gpu=True)
    with tempfile.TemporaryDirectory(prefix="refused-") as name:
        folder = Path(name)
        config = _write_config(folder)
        for experiment in _experiments():
            asked = " ".join((str(experiment.layout), *experiment.changes))
            print(f"{asked}: {_run(config, experiment, folder)}", flush=True)


def _write_config(folder: Path) -> Path:
    rng = np.random.default_rng(7)
    with TokenFileWriter(folder / "corpus", token_dtype(_VOCAB)) as writer:
        for _ in range(300):
            start = rng.integers(0, _VOCAB)
            steps = rng.integers(0, 3, rng.integers(20, 120))
            writer.add_document([(start + np.cumsum(steps)) % _VOCAB])
    size = {"num_layers": 8, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16}
    tree = {
        "model": {**size, "vocab_size": _VOCAB},
        "data": {"path": str(folder / "corpus"), "split": [0.9, 0.1]},
        "train": {"global_batch_size": 8, "micro_batch_size": 1, "max_steps": 20},
        "optimizer": {"name": "sgd", "lr": 0.02, "grad_clip": 0.0},
        "parallel": {"collective_timeout_s": 30},
    }
    path = folder / "config.yaml"
    path.write_text(dump_yaml(tree))
    return path


def _run(config: Path, experiment: Experiment, folder: Path) -> str:
    """What an experiment shows; the single process is run once for all with the same changes."""
    places = []
    for layout in (SINGLE, experiment.layout):
        out = folder / " ".join((str(layout), *experiment.changes))
        places.append(out)
        if layout == SINGLE and out.exists():
            continue
        asked = json.dumps([str(config), str(layout), experiment.changes, str(out)])
        code = launch_local([asked], layout.world_size, out / "logs", _rank)
        if code:
            return f"ends with code {code}: {_error(out / 'logs', layout.world_size)}"
    expected = read_record(places[0], 1)
    found = read_record(places[1], experiment.layout.world_size)
    checked = _load(config, experiment.layout, experiment.changes)
    micro = checked.train.global_batch_size // experiment.layout.dp
    verdict = compare(found, expected, experiment.layout, FP32, micro, checked.optimizer.lr)
    figures = f"loss {verdict.loss:.1e}, norm {verdict.norm:.1e}, gradients {verdict.gradient:.1e}"
    figures += f", weights {verdict.weight:.1e}"
    if verdict.first is None:
        return f"same, {figures}"
    first = verdict.first
    return f"DIFFERS, {figures}; step {first.step}, {first.what} of {first.tensor}: {first.cause}"


def _error(logs: Path, num_ranks: int) -> str:
    """The first exception of the first failing rank, in one line."""
    notes = read_notes(logs, num_ranks).values()
    if not notes:
        return "it told nothing"
    note = min(notes, key=lambda note: note.lost_peer)
    text = note.trace or note.text  # a pipeline names its own error last, and the cause first
    named = re.findall(r"^(?:\w+\.)*(\w*(?:Error|Exception)): *(.*)", text, re.M)
    words = ": ".join(named[0]) if named else text
    return " ".join(words.split())[:160]


def _rank(arguments: Sequence[str]) -> None:
    """What each rank runs."""
    signal.alarm(_WAIT_S)
    config, text, changes, folder = json.loads(arguments[0])
    (layout,) = parse_layouts(text)
    with mock.patch.object(capabilities, "REFUSALS", ()):
        checked = _load(Path(config), layout, changes)
        with distributed_process("cpu", checked.parallel.collective_timeout_s) as device:
            record_run(checked, device, _STEPS, Path(folder), count_sent=False)


def _load(config: Path, layout: Layout, changes: Sequence[str]) -> Config:
    asked = [*changes, *layout.overrides()]
    return load_config(config, asked, checks=(), world_size=layout.world_size)


if __name__ == "__main__":
    try:
        main()
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
