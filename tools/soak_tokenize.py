"""Random kills of tokenize runs; see tools/soak.py."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

_REPORT = "report.json"  # holds times


def soak_tokenize(arguments: argparse.Namespace, folder: Path) -> int:
    """Kill, start again, compare; returns the exit code."""
    chance = random.Random(arguments.seed)
    source = arguments.input or "python-stdlib"
    tokenizer = folder / "tokenizer"
    prepare = [sys.executable, "-m", "data_prep"]
    train = ["train-tokenizer", "--input", source, "--output", str(tokenizer)]
    subprocess.run([*prepare, *train, "--vocab-size", "1024"], check=True)
    options = ["--input", source, "--tokenizer", str(tokenizer), "--shard-size", "300KB"]
    command = [*prepare, "tokenize", *options, "--workers", "2"]
    started = time.monotonic()
    subprocess.run([*command, "--output", str(folder / "whole")], check=True)
    whole_time = time.monotonic() - started
    wanted = _files(folder / "whole")
    log = folder / "log"
    counts: Counter[str] = Counter()
    while counts["kills"] < arguments.kills:
        outcome = _run(command, folder / "out", log, chance, whole_time)
        counts[outcome] += 1
        if outcome == "finished":
            counts["wrong"] += _files(folder / "out") != wanted
            shutil.rmtree(folder / "out")
        else:
            counts["kills"] += 1
            unfinished = folder / ".out.unfinished"
            counts["with shards done"] += any(unfinished.glob(".done/*.json"))
            counts["half-finished under its name"] += (folder / "out").exists() and (
                _files(folder / "out") != wanted
            )
    subprocess.run([*command, "--output", str(folder / "out")], check=True)
    counts["wrong"] += _files(folder / "out") != wanted
    print(
        f"{len(wanted)} files of {sum(map(len, wanted.values()))} bytes, {whole_time:.1f} s whole"
    )
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    bad = counts["wrong"] + counts["half-finished under its name"] + counts["failed"]
    return 1 if bad else 0


def _run(
    command: list[str], output: Path, log: Path, chance: random.Random, whole_time: float
) -> str:
    """One start, killed after a random time: "finished", or what was killed."""
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            [*command, "--output", str(output)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        process.wait(chance.random() * whole_time)
    except subprocess.TimeoutExpired:
        return _kill(process, chance)
    if process.returncode:
        print(log.read_text())
        return "failed"
    return "finished"


def _kill(process: subprocess.Popen[bytes], chance: random.Random) -> str:
    what = chance.choice(["all processes", "all processes", "the parent", "a worker"])
    if what == "all processes":
        os.killpg(process.pid, signal.SIGKILL)
    elif what == "the parent":
        process.kill()  # its workers must end by themselves
    else:
        workers = psutil.Process(process.pid).children(recursive=True)
        if workers:
            chance.choice(workers).kill()
        else:
            process.kill()
    process.wait(60)
    return what


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != _REPORT
    }
