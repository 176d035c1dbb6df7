"""Recipes: the shipped ones, a small one end to end, killed and restarted, and on executors."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.recipe.load import load_recipe
from data_prep.recipe.phases import RunAs
from data_prep.recipe.run import run_recipe, summary_lines
from data_prep.scale_out import Executor, SlurmOptions, run_on_datatrove
from megascale.data.corpus import TokenCorpus
from megascale.data.manifest import DatasetManifest
from megascale.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs" / "data").glob("*.yaml"))

SMALL = """
output: {output}
steps:
  - read:
      inputs:
        - {{name: docs, path: "{root}/docs/*.md"}}
      documents: paragraph
      shard_bytes: 40000
  - clean:
      rules: [normalize, length: {{min_characters: 40}}, scrub]
  - dedup: {{self_test: false}}
  - decontaminate:
      against: [{{name: readme, path: {root}/README.md}}]
      documents: paragraph
  - train-tokenizer: {{vocab_size: 400}}
  - tokenize: {{shard_bytes: 30000, backend: tokenizers}}
"""


def _write(tmp_path: Path, name: str) -> Path:
    path = tmp_path / f"{name}.yaml"
    path.write_text(SMALL.format(output=tmp_path / name, root=ROOT))
    return path


def _files(folder: Path) -> dict[str, bytes]:
    """All but reports and what names the output's path."""
    named = ("report.json", "report.txt", "manifest.json", "recipe.json")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in named and "logs" not in path.parts
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the small recipe, run in one go."""
    folder = tmp_path_factory.mktemp("recipe")
    recipe = load_recipe(_write(folder, "out"))
    report = run_recipe(recipe, RunAs(1), lambda line: None)
    assert list(report["steps"]) == [
        *("01_read", "02_clean", "03_dedup", "04_decontaminate"),
        *("05_train_tokenizer", "06_tokenize"),
    ]
    return folder / "out"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.steps[0].name == "read"
    assert recipe.steps[-1].name == "tokenize"
    assert recipe.phases()


def test_there_are_shipped_recipes() -> None:
    assert {path.stem for path in SHIPPED} >= {"english_text", "python_stdlib", "bert_sentences"}


def test_a_recipe_ends_in_a_dataset_and_a_report(finished: Path) -> None:
    corpus = TokenCorpus.open(finished / "06_tokenize", verify=True)
    report = json.loads((finished / "report.json").read_text())
    counts = {name: step.get("counts", {}) for name, step in report["steps"].items()}
    assert counts["01_read"]["documents"] > 100
    assert counts["02_clean"]["documents"] == counts["01_read"]["documents"]
    assert counts["03_dedup"]["documents"] == counts["02_clean"]["kept"]
    assert counts["06_tokenize"]["documents"] == counts["04_decontaminate"]["kept"]
    assert counts["06_tokenize"]["tokens"] == corpus.num_tokens
    table = (finished / "report.txt").read_text().splitlines()
    assert table == summary_lines(report)
    assert table[1].split() == [
        "01_read",
        *(str(counts["01_read"][key]) for key in ("documents", "text_bytes")),
    ]
    assert any("rejected by length.short" in line for line in table)
    assert any(line.startswith("04_decontaminate: readme: ") for line in table)


def test_a_second_run_does_nothing_and_a_changed_step_is_refused(finished: Path) -> None:
    told: list[str] = []
    before = _files(finished)
    path = finished.parent / "out.yaml"
    run_recipe(load_recipe(path), RunAs(1), told.append)
    assert told
    assert all(line.endswith("was done already") for line in told)
    changed = finished.parent / "changed.yaml"
    changed.write_text(path.read_text().replace("min_characters: 40", "min_characters: 41"))
    with pytest.raises(UserError, match="02_clean exists and was made from other input"):
        run_recipe(load_recipe(changed), RunAs(1), told.append)
    assert _files(finished) == before


def test_killed_at_any_time_it_goes_on(finished: Path, tmp_path: Path) -> None:
    """SIGKILL at some moments of a run in a process of its own."""
    path = _write(tmp_path, "killed")
    command = [sys.executable, "-m", "data_prep", "run", str(path), "--workers", "1"]
    for seconds in (1.0, 2.0):
        try:
            subprocess.run(command, cwd=ROOT, capture_output=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            continue
    run_recipe(load_recipe(path), RunAs(1), lambda line: None)
    assert _files(tmp_path / "killed") == _files(finished)
    hidden = [e.name for e in (tmp_path / "killed").iterdir() if e.name.startswith(".")]
    assert all(name.endswith(".lock") for name in hidden), hidden


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(
        """
outptu: x
steps:
  - claen: {}
  - clean: {rules: [gofer_quality, {length: {min_chars: 3}}, {language: {min_score: 2}}]}
  - read: {shard_bytes: 0}
  - dedup: {near: {threshold: 1.5, bins: 100}, lnies: true}
  - decontaminate: {against: [a.txt], ngram: 5}
  - tokenize: {}
"""
    )
    with pytest.raises(UserError) as refused:
        load_recipe(path)
    told = str(refused.value)
    for expected in (
        "outptu: ",
        "did you mean output?",
        "steps[0]",
        "did you mean clean?",
        "steps[1].clean: (not given)",
        "a step `read` must come before it",
        "steps[1].clean.rules[0]",
        "did you mean gopher_quality?",
        "rules[1].length.min_chars",
        "did you mean min_characters?",
        "rules[2].language.min_score",
        "steps[2].read.inputs: (not given)",
        "steps[2].read.shard_bytes: 0",
        "steps[3].dedup.near.threshold",
        "must be a power of two",
        "steps[3].dedup.lnies",
        "steps[5].tokenize.tokenizer",
    ):
        assert expected in told, (expected, told)
    path.write_text(
        SMALL.format(output="x", root=ROOT).replace(
            "documents: paragraph\n  - train", "ngram: 5\n  - train"
        )
    )
    with pytest.raises(UserError, match=r"steps\[3\]\.decontaminate"):
        load_recipe(path)
    path.write_text("output: x\nsteps: []\n")
    with pytest.raises(UserError, match="at least one step"):
        load_recipe(path)


def test_datatroves_local_executor_gives_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    path = _write(tmp_path, "spread")
    run_on_datatrove(path, load_recipe(path), Executor.LOCAL, tasks=3, workers=1)
    assert _files(tmp_path / "spread") == _files(finished)
    ours, theirs = (
        DatasetManifest.load(f / "06_tokenize") for f in (finished, tmp_path / "spread")
    )
    assert theirs.fingerprint == ours.fingerprint
    table = (tmp_path / "spread" / "report.txt").read_text()
    assert table == (finished / "report.txt").read_text()


def _fake_command(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def test_slurm_jobs_wait_for_one_another_and_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs as sbatch gets them: their order is checked, and the tasks of the first are run."""
    commands = tmp_path / "bin"
    commands.mkdir()
    _fake_command(
        commands,
        "sbatch",
        f"id=$(ls {tmp_path}/job.* 2>/dev/null | wc -l)\n"
        f'echo "$@" > {tmp_path}/arguments.$id; cp "${{@: -1}}" {tmp_path}/job.$id\n'
        'echo "Submitted batch job $id"',
    )
    _fake_command(commands, "srun", 'while [[ $1 != launch* ]]; do shift; done; exec "$@"')
    _fake_command(commands, "scontrol", "echo localhost")
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    path = tmp_path / "r.yaml"
    text = SMALL.format(output=tmp_path / "out", root=ROOT)
    path.write_text(text[: text.index("  - clean")])
    slurm = SlurmOptions(partition="cpu", time="00:10:00", memory_gb=3)
    run_on_datatrove(path, load_recipe(path), Executor.SLURM, 2, 2, slurm)
    jobs = {}
    for number in range(len(list(tmp_path.glob("job.*")))):
        script = (tmp_path / f"job.{number}").read_text()
        if "launch_pickled_pipeline" in script:  # others put datatrove's statistics together
            jobs[number] = script
    names = [script.split("--job-name=")[1].split()[0] for script in jobs.values()]
    assert names == ["01_read_shards", "01_read_finish", "report"]
    for before, number in zip(jobs, list(jobs)[1:], strict=False):
        assert f"--dependency=afterok:{before}" in (tmp_path / f"arguments.{number}").read_text()
    first = next(iter(jobs.values()))
    for line in ("--partition=cpu", "--time=00:10:00", "--mem-per-cpu=3G", "--array=0-1%2"):
        assert f"#SBATCH {line}" in first
    environment = {**os.environ, "SLURM_NODELIST": "localhost", "RUN_OFFSET": "0"}
    environment |= {"SLURM_JOB_ID": "1", "SLURM_ARRAY_JOB_ID": "1", "SLURM_NODEID": "0"}
    for task in range(2):
        environment["SLURM_ARRAY_TASK_ID"] = str(task)
        command = ["bash", str(tmp_path / f"job.{next(iter(jobs))}")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    report = run_recipe(load_recipe(path), RunAs(1), lambda line: None)  # as the jobs that follow
    shards = report["steps"]["01_read"]["shards"]
    assert (shards["made_by_this_run"], shards["all"] > 2) == (0, True)


def test_executors_refuse_what_cannot_work(finished: Path) -> None:
    path = finished.parent / "out.yaml"
    recipe = load_recipe(path)
    for arguments, what in (
        ((Executor.SLURM, 2, 1), "without --partition"),
        ((Executor.LOCAL, 0, 1), "--tasks 0"),
        ((Executor.LOCAL, 2, 1, SlurmOptions(), True), "--overwrite with --executor"),
    ):
        with pytest.raises(UserError, match=what):
            run_on_datatrove(path, recipe, *arguments)
