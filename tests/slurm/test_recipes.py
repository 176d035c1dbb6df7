"""A recipe of data_prep on the cluster: datatrove's arrays, each waiting for the one before."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from data_prep.recipe.load import load_recipe
from data_prep.recipe.phases import RunAs
from data_prep.recipe.run import run_recipe
from megascale.data.manifest import DatasetManifest
from tests.integration.runs import ROOT
from tests.slurm.cluster import wait_until
from tests.slurm.conftest import TestBed

RECIPE = """
output: {output}
steps:
  - read:
      inputs: [{{name: docs, path: "{root}/docs/*.md"}}]
      documents: paragraph
      shard_bytes: 60000
  - clean: {{rules: [normalize, length: {{min_characters: 40}}]}}
  - dedup: {{self_test: false}}
  - train-tokenizer: {{vocab_size: 400}}
  - tokenize: {{shard_bytes: 60000, backend: tokenizers}}
"""


def test_a_recipe_by_datatroves_slurm_executor(bed: TestBed, tmp_path: Path) -> None:
    """The same tokens and counts as on one machine; shards were made on more than one."""
    path, output = tmp_path / "spread.yaml", tmp_path / "spread"
    path.write_text(RECIPE.format(output=output, root=ROOT))
    bed.cluster.run(
        *(sys.executable, "-m", "data_prep", "run", path),
        *("--executor", "slurm", "--partition", "main", "--tasks", 2, "--workers", 2),
        *("--mem-gb", 1),
        PYTHONPATH=str(ROOT),
        HOME=str(tmp_path),  # datatrove keeps its job files below it
    )
    jobs = bed.cluster.run("squeue", "-h", "-o", "%i %j %T %E").stdout

    def over() -> bool:
        return not bed.cluster.run("squeue", "-h", "-o", "%i").stdout.strip()

    wait_until(over, 300, lambda: bed.cluster.run("squeue").stdout + _logs(output))
    assert (output / "report.json").is_file(), jobs + _logs(output)

    path.write_text(RECIPE.format(output=tmp_path / "here", root=ROOT))
    here = run_recipe(load_recipe(path), RunAs(1), lambda line: None)
    there = json.loads((output / "report.json").read_text())
    assert [step["counts"] for step in there["steps"].values()] == [
        step["counts"] for step in here["steps"].values()
    ]
    assert _fingerprint(output) == _fingerprint(tmp_path / "here")
    made = {name: step["shards"] for name, step in there["steps"].items() if "shards" in step}
    assert made["01_read"]["all"] > 2
    assert made["01_read"]["made_by_this_run"] == 0, "the finishing task made none"
    first = sorted((output / "logs" / "01_read_shards" / "slurm_logs").iterdir())
    assert len(first) == 2, "two tasks of an array"


def _fingerprint(recipe: Path) -> str:
    (folder,) = recipe.glob("*_tokenize")
    return DatasetManifest.load(folder).fingerprint


def _logs(output: Path) -> str:
    paths = sorted((output / "logs").rglob("*.out"))
    return "\n".join(f"{path}:\n{path.read_text(errors='replace')[-2000:]}" for path in paths)
