"""Small datasets, configs and `megascale` processes for the tests of whole runs."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data_prep.documents import DocumentUnit
from data_prep.tokenize import TokenizeOptions, tokenize
from data_prep.train_tokenizer import TrainTokenizerOptions, train_tokenizer
from megascale.config.yaml_text import dump_yaml
from megascale.launcher.allocator import OPT_OUT

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 150
_LAUNCHER_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def make_tokenizer(folder: Path, vocab_size: int = 270) -> Path:
    """A byte-level BPE of `vocab_size` trained on a few lines; returns its folder."""
    text = folder / "for_tokenizer.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, again and again.\n" * 40)
    train_tokenizer([str(text)], folder / "tokenizer", TrainTokenizerOptions(vocab_size))
    return folder / "tokenizer"


def make_middle_tokenizer(tokenizer: Path) -> Path:
    """The same tokenizer with the three tokens of fill-in-the-middle beside it."""
    folder = tokenizer.parent / f"{tokenizer.name}_middle"
    shutil.copytree(tokenizer, folder)
    model = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model.add_special_tokens([f"<|fim_{part}|>" for part in ("prefix", "suffix", "middle")])
    model.save(str(folder / "tokenizer.json"))
    return folder


def make_dataset(folder: Path, tokenizer: Path, *, documents: int = 60, shift: int = 0) -> Path:
    """A prepared dataset of small documents of digits and words; `shift` changes the text."""
    text = folder / "text.txt"
    lines = [
        f"{(i * 37 + shift) % 101} the quick fox {i * i + shift} ends." for i in range(documents)
    ]
    text.write_text("\n".join(lines) + "\n")
    tokenize([str(text)], folder / "data", tokenizer, TokenizeOptions(documents=DocumentUnit.LINE))
    return folder / "data"


def settings(data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A config that trains in seconds; `changes` are whole values by "section__name"."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"output_dir": str(output), "seed": 5},
        "model": {
            "num_layers": 2,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "seq_length": 16,
        },
        "data": {"path": str(data), "split": [0.9, 0.1]},
        "train": {"global_batch_size": 4, "micro_batch_size": 2, "max_steps": 4},
        "optimizer": {"lr": 1e-2},
        "schedule": {"name": "cosine", "warmup_steps": 1, "min_lr": 1e-3},
        "checkpoint": {"save_interval": 2},
        "logging": {"log_interval": 1, "tensorboard": False},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        tree.setdefault(section, {})[key] = value
    return tree


def write_config(path: Path, tree: Mapping[str, Any]) -> Path:
    """Write `tree` as a config file."""
    path.write_text(dump_yaml(dict(tree)))
    return path


@dataclass(frozen=True)
class Done:
    """A finished process."""

    code: int
    stdout: str
    output: str

    def refusal(self) -> str:
        """The message of a run that ended as a mistake of the user has to end."""
        assert self.code == 2, self.output
        assert "Traceback" not in self.output, self.output
        assert "error: " in self.output, self.output
        assert "rule" in self.output, self.output
        return self.output


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without what a launcher around the tests may have set.

    With the system's allocator: which other one is installed, and said so, is the machine's matter.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_NAMES}
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), OPT_OUT: "default"}
    return {**kept, **own, **more}


def run(
    *arguments: object,
    launcher: Sequence[object] = (sys.executable, "-m", "megascale"),
    cwd: Path = ROOT,
    **environment: str,
) -> Done:
    """Run a `megascale` command line to its end."""
    done = subprocess.run(
        [str(part) for part in (*launcher, *arguments)],
        cwd=cwd,
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    return Done(done.returncode, done.stdout, done.stdout + done.stderr)


def start(*arguments: object, log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start a `megascale` command line in its own session; its output goes to `log`."""
    with open(log, "wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "megascale", *map(str, arguments)],
            cwd=ROOT,
            env=clean_environment(**environment),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def call(*arguments: object) -> Done:
    """The `megascale` command line in this process, for one rank; its environment is restored."""
    from megascale.cli.main import main

    out, both = io.StringIO(), io.StringIO()
    before = dict(os.environ)
    code = 0
    try:
        with redirect_stdout(_Tee(out, both)), redirect_stderr(both):
            main([str(part) for part in arguments])
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return Done(code, out.getvalue(), both.getvalue())


class _Tee(io.TextIOBase):
    def __init__(self, *streams: io.StringIO) -> None:
        self._streams = streams

    def write(self, text: str) -> int:
        for stream in self._streams:
            stream.write(text)
        return len(text)


def run_data_prep(*arguments: object, expect: int = 0, limit_kib: int | None = None) -> str:
    """Run `python -m data_prep` to the exit code `expect`; stdout + stderr.

    Args:
        limit_kib: bound of the size of any file that it writes.
    """
    command = [sys.executable, "-m", "data_prep", *map(str, arguments)]
    if limit_kib is not None:
        limited = f'trap "" XFSZ; ulimit -f {limit_kib}; exec "$@"'
        command = ["bash", "-c", limited, "bash", *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert "Traceback" not in output, output
    assert done.returncode == expect, output
    return output
