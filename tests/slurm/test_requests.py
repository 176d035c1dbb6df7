"""Requests that cannot work are refused before anything is queued; arrays; other launchers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.integration.runs import ROOT, make_tokenizer
from tests.slurm.conftest import TestBed

Numbers = list[tuple[float, ...]]


REFUSED: list[tuple[tuple[object, ...], dict[str, object], str]] = [
    (("--nodes", 2, "--partition", "nowhere"), {}, "main, one, spare"),
    (("--nodes", 6), {"train__global_batch_size": 12}, "it has 4 nodes\n"),
    (("--nodes", 2, "--partition", "one"), {}, "it has 1 nodes"),
    (("--nodes", 2, "--time", "9:00:00", "--partition", "spare"), {}, "01:00:00"),
    (("--nodes", 2, "--time", "0:30"), {}, "--lead 120"),
    (("--nodes", 1, "--ntasks-per-node", 4, "--cpus-per-task", 2), {}, "largest has 4 cpus"),
    (("--nodes", 1, "--gpus-per-node", 4), {"run__device": "cuda"}, "2 GPUs"),
    (("--nodes", 2), {"run__device": "cuda"}, "--gpus-per-node 1"),
    (("--nodes", 3), {}, "data_parallel_size"),
    (("--nodes", 2), {"data__path": "/nowhere/data"}, "no dataset /nowhere/data"),
    (("--nodes", 2), {"run__output_dir": "/proc/run"}, "/proc/run"),
    (("--nodes", 2, "--container", "image.sqsh"), {}, "pyxis"),
    (("--nodes", 2, "--constraint", "h100"), {}, "Invalid feature specification"),
]


@pytest.fixture(scope="module")
def answers(_bed: TestBed) -> list[tuple[int, str]]:
    """What `submit` answers to each of REFUSED, and the doctor when asked for too much."""
    lines: list[list[object]] = []
    for number, (options, changes, _) in enumerate(REFUSED):
        lines.append(["submit", _bed.config(f"refused_{number}", **changes), *options])
    lines.append(["doctor", "--cluster", "--nodes", 9])
    told = _bed.many(lines)
    assert not _bed.cluster.run("squeue", "-h").stdout
    return told


@pytest.mark.parametrize("number", range(len(REFUSED) + 1))
def test_refused_before_it_is_queued(answers: list[tuple[int, str]], number: int) -> None:
    code, text = answers[number]
    *_, told = [*REFUSED, ("it has 4 nodes\n",)][number]
    assert told in text
    assert code == 2
    assert "remedy" in text or "hint" in text
    assert "Traceback" not in text


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


def test_a_controller_that_comes_back_is_waited_for(bed: TestBed, undisturbed: Numbers) -> None:
    """squeue gives up after 4 s, and lists no job then; what is submitted is queued once."""
    bed.cluster.stop_controller()
    bed.cluster.run("sh", "-c", "(sleep 7; slurmctld -f $SLURM_CONF) >/dev/null 2>&1 &")
    submit = ["submit", bed.config("once"), "--nodes", 2]
    (code, told), (_, status), (_, cancelled) = bed.many(
        [submit, ["jobs", "status"], ["jobs", "cancel", "once"]]
    )
    assert code == 0, told
    assert told.count("submitted job") == status.count("  once  ") == 1
    assert "  undisturbed  " in status
    assert cancelled.startswith("cancelled ")


def test_a_spare_machine_replaces_one_that_does_not_answer(bed: TestBed) -> None:
    config = bed.config("spare", steps=1, parallel__tensor_parallel_size=1)
    options = ("--nodes", 1, "--over-allocate", 1)
    (job,) = bed.submit(config, *options, TEST_SILENT="node1")
    bed.finish("spare", job)
    assert "node1: did not answer" in bed.log("spare")
    assert " on node2\n" in bed.log("spare")
    assert "machines left out: node1" in bed.megascale("jobs", "status", "spare")


def test_a_machine_with_another_version_is_left_out_of_the_next_attempt(bed: TestBed) -> None:
    """Three machines, of which one is odd: the job is requeued without it, and trains."""
    changes = {"parallel__tensor_parallel_size": 1, "train__global_batch_size": 6}
    config = bed.config("odd", steps=1, **changes)
    (job,) = bed.submit(config, "--nodes", 3, TEST_ODD="node2")
    bed.finish("odd", job)
    assert bed.kinds("odd") == ["bad node", "finished"]
    first, second = bed.attempts("odd")
    assert first.end is not None
    assert "node2: rank 1 has numpy 0.1" in first.end.text
    assert second.begin.nodes == "node[1,3-4]"
    four = {**changes, "train__global_batch_size": 8}
    ((code, told),) = bed.many([["submit", bed.config("odd", **four), "--nodes", 4]])
    assert (code, "it has 3 nodes beside bad ones (node2)" in told) == (2, True), told


def test_the_doctor_looks_at_the_cluster(bed: TestBed) -> None:
    text = bed.megascale(
        *("doctor", bed.config("doctor"), "--cluster", "--nodes", 2, "--device", "cpu")
    )
    assert "node1: torch" in text
    assert "node2: torch" in text
    assert "all-reduce along tp (2 ranks)" in text


def test_the_deepspeed_launcher_on_the_cluster(bed: TestBed, undisturbed: Numbers) -> None:
    """Its SlurmRunner sets neither ranks nor address: both come from the step."""
    program = bed.folder / "program.py"
    program.write_text("from megascale.cli.main import main\n\nmain()\n")
    (bed.folder / "slots").write_text("node1 slots=1\nnode2 slots=1\n")
    script = bed.folder / "deepspeed.sbatch"
    deepspeed = Path(sys.executable).with_name("deepspeed")
    script.write_text(
        "#!/bin/bash\n"
        f"{deepspeed} --launcher slurm --hostfile {bed.folder}/slots --no_ssh_check "
        f"--master_addr node1 {program} train {bed.config('deepspeed')}\n"
    )
    log = bed.folder / "deepspeed.log"
    job = bed.cluster.run(
        *("sbatch", "--parsable", "-N2", "--ntasks-per-node=1", "-o", log, script),
        PYTHONPATH=f"{bed.folder}:{ROOT}",
        PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin",
    ).stdout.strip()
    assert bed.cluster.wait(job)["JobState"] == "COMPLETED", log.read_text()
    assert bed.numbers("deepspeed") == undisturbed


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
