"""Random kills, many times: what the enumerated points of the tests cannot promise.

    python -m tools.soak checkpoint CONFIG --kills 100
    python -m tools.soak tokenize --kills 50

checkpoint: a run on 2 processes saves at every second step; after a random time all its processes
get SIGKILL. Each time: the checkpoints that were there still are (but for what keep_last lets go),
the newest is intact, and the resumed run's losses are those of a run that was never killed.

tokenize: a run with 2 workers is killed after a random time (all of its processes, only the parent,
or only a worker) and started again until it is done; then each byte is that of a run that was never
killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megascale.checkpoint.manager import CheckpointFolder
from megascale.checkpoint.reader import CheckpointReader
from megascale.checkpoint.storage import SPARE_NAME
from megascale.errors import UserError
from tools.soak_tokenize import soak_tokenize


def main() -> None:
    """Run the soak and print its figures; exit code 1 when anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["checkpoint", "tokenize"])
    parser.add_argument("config", nargs="?", help="checkpoint: what is trained")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--input", help="tokenize: text (default: python-stdlib)")
    arguments = parser.parse_args()
    if arguments.what == "checkpoint" and arguments.config is None:
        parser.error("checkpoint needs a config")
    with tempfile.TemporaryDirectory(prefix="megascale-soak-") as folder:
        work = soak if arguments.what == "checkpoint" else soak_tokenize
        sys.exit(work(arguments, Path(folder)))


def soak(arguments: argparse.Namespace, folder: Path) -> int:
    """Kill, look, continue; returns the exit code."""
    chance = random.Random(arguments.seed)
    output = folder / "run"
    command = [sys.executable, "-m", "megascale", "train", arguments.config, *arguments.overrides]
    command += [f"run.output_dir={output}", "train.max_steps=1000000", "schedule.name=constant"]
    command += ["schedule.min_lr=0", "checkpoint.save_interval=2", "checkpoint.keep_last=3"]
    command += ["--nproc", "2"]
    lost, newest, halves = 0, 0, 0
    losses: dict[int, float] = {}
    for kill in range(arguments.kills):
        _run_and_kill([*command, *(["--resume"] if newest else [])], output, chance, newest)
        found = CheckpointFolder(str(output / "checkpoints"))
        hidden = {name for name in found.storage.folders() if name.startswith(".")} - {SPARE_NAME}
        halves += bool(hidden)
        steps = found.steps()
        intact = [step for step in steps if _is_intact(found.path(step))]
        if steps != intact or (newest and max(intact, default=0) < newest):
            lost += 1
            print(f"kill {kill}: steps {steps}, intact {intact}, before {newest}", flush=True)
        newest = max(intact, default=0)
        lost += _changed(losses, output / "metrics.jsonl")
        if kill % 10 == 9 or kill == arguments.kills - 1:
            print(
                f"{kill + 1} kills, {halves} in the middle of a save, newest step {newest}, "
                f"{lost} lost",
                flush=True,
            )
    return 1 if lost else 0


def _run_and_kill(command: list[str], output: Path, chance: random.Random, newest: int) -> None:
    with open(output.parent / "log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    folder = output / "checkpoints"
    while process.poll() is None:  # until it has saved something new: it is in full swing
        names = os.listdir(folder) if folder.exists() else []
        done = [int(name.removeprefix("step_")) for name in names if name.startswith("step_")]
        if max(done, default=0) > newest:
            break
        time.sleep(0.01)
    time.sleep(chance.random() * 0.5)
    if process.poll() is not None:
        raise SystemExit((output.parent / "log").read_text())
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _is_intact(path: str) -> bool:
    try:
        return CheckpointReader(path).damage() is None
    except UserError:
        return False


def _changed(losses: dict[int, float], metrics: Path) -> int:
    """Steps that were trained twice with another loss."""
    wrong = 0
    for line in metrics.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # torn by the kill
        if losses.setdefault(row["step"], row["loss"]) != row["loss"]:
            wrong += 1
            print(f"step {row['step']}: loss {row['loss']}, before {losses[row['step']]}")
    return wrong


if __name__ == "__main__":
    main()
