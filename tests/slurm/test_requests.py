"""Requests that cannot work are refused before anything is queued; arrays; other launchers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.integration.runs import ROOT, make_tokenizer
from tests.slurm.conftest import TestBed


@pytest.mark.parametrize(
    ("options", "changes", "told"),
    [
        (("--nodes", 2, "--partition", "nowhere"), {}, "main, one, spare"),
        (("--nodes", 4), {}, "it has 3 nodes"),
        (("--nodes", 2, "--partition", "one"), {}, "it has 1 nodes"),
        (("--nodes", 2, "--time", "9:00:00", "--partition", "spare"), {}, "01:00:00"),
        (("--nodes", 1, "--ntasks-per-node", 4, "--cpus-per-task", 2), {}, "largest has 4 cpus"),
        (("--nodes", 1, "--gpus-per-node", 4), {"run__device": "cuda"}, "2 GPUs"),
        (("--nodes", 3), {}, "data_parallel_size"),
        (("--nodes", 2), {"data__path": "/nowhere/data"}, "no dataset /nowhere/data"),
        (("--nodes", 2), {"run__output_dir": "/proc/run"}, "/proc/run"),
    ],
)
def test_refused(
    bed: TestBed, options: tuple[object, ...], changes: dict[str, object], told: str
) -> None:
    text = bed.megascale("submit", bed.config("refused", **changes), *options, check=False)
    assert told in text
    assert "remedy" in text or "hint" in text
    assert "Traceback" not in text
    assert not bed.cluster.run("squeue", "-h").stdout


def test_a_dry_run_prints_the_script_and_queues_nothing(bed: TestBed) -> None:
    text = bed.megascale(
        *("submit", bed.config("dry"), "--nodes", 2, "--gpus-per-node", 2, "--account", "lab"),
        "--dry-run",
    )
    assert "#SBATCH --ntasks-per-node=2" in text
    assert "#SBATCH --gpus-per-node=2" in text
    assert "#SBATCH --account=lab" in text
    assert not bed.output("dry").exists()
    assert not bed.cluster.run("squeue", "-h").stdout


def test_a_controller_that_comes_back_is_waited_for(bed: TestBed) -> None:
    bed.cluster.stop_controller()
    pid = bed.cluster.folder / "slurmctld.pid"
    pid.unlink()
    bed.cluster.run("sh", "-c", "(sleep 3; slurmctld -f $SLURM_CONF) >/dev/null 2>&1 &")
    bed.megascale("jobs", "status")
    assert pid.exists()  # it answered when the controller was back


def test_an_array_of_shards(bed: TestBed, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    texts = []
    for number in range(5):
        text = tmp_path / f"text_{number}.txt"
        text.write_text(f"document {number}\n" * 20)
        texts.append(str(text))
    (tmp_path / "files").write_text("\n".join(texts) + "\n")
    script = ROOT / "launch" / "slurm" / "data_prep.sbatch"
    output = tmp_path / "corpus"
    job = bed.cluster.run(
        *("sbatch", "--parsable", "--array=0-1", "--cpus-per-task=1", "--time=5"),
        *("-o", tmp_path / "log_%a"),
        *(script, tmp_path / "files", tokenizer, output),
        PYTHON=sys.executable,
        PYTHONPATH=str(ROOT),
    ).stdout.strip()
    for task in (0, 1):
        state = bed.cluster.wait(f"{job}_{task}")
        assert state["JobState"] == "COMPLETED", (tmp_path / f"log_{task}").read_text()
    parts = sorted(path.name for path in output.iterdir())
    assert parts == ["part_00000", "part_00001"]
