"""What `megascale submit` writes and refuses, without a cluster."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from megascale.cli.submit import _container
from megascale.config.load import load_config
from megascale.errors import UserError
from megascale.launcher import slurm_client
from megascale.launcher.batch_script import BatchJob, render
from megascale.launcher.slurm_client import Job, Slurm, outside_of_jobs
from megascale.launcher.submission import (
    Request,
    check_container,
    check_layout,
    check_name_is_free,
    check_paths,
    check_request,
    seconds_of,
    submission_lock,
)
from tests.integration.runs import ROOT, settings, write_config

EXAMPLE = BatchJob(
    name="gpt_tiny",
    config="configs/gpt_tiny.yaml",
    run="runs/gpt_tiny",
    checkpoints="runs/gpt_tiny/checkpoints",
    nodes=2,
    tasks_per_node=8,
    cpus_per_task=8,
    options={"gpus-per-node": "8", "time": "24:00:00"},
    environment_file="launch/env.sh",
    lead_s=300,
)
PARTITIONS = (
    "PartitionName=big Default=YES MaxNodes=UNLIMITED MaxTime=2-00:00:00 State=UP Nodes=a[1-4]\n"
    "PartitionName=small Default=NO MaxNodes=1 MaxTime=UNLIMITED State=UP Nodes=a1\n"
    "PartitionName=shut Default=NO MaxNodes=1 MaxTime=UNLIMITED State=DOWN Nodes=a1\n"
)
NODES = "\n".join(f"a{i}|{'down*' if i == 4 else 'idle'}|64|500000|gpu:a100:8" for i in range(1, 5))


def test_the_shipped_script_is_the_one_that_submit_writes() -> None:
    assert (ROOT / "launch" / "slurm" / "pretrain.sbatch").read_text() == render(EXAMPLE)


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_strange_paths_are_quoted(launcher: str, tmp_path: Path) -> None:
    job = BatchJob(
        "n", "c o.yaml", '/r/$x "y', "/c", 1, 2, launcher=launcher, overrides=("a.b='q'",)
    )
    script = tmp_path / "script"
    script.write_text(render(job))
    text = script.read_text()
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert '#SBATCH --output="/r/$x \\"y/logs/slurm_%j.out"' in text  # Slurm's quotes
    shown = subprocess.run(
        [
            "bash",
            "-c",
            f"source <(sed -n '/^config=/,/^spare/p' {script}); "
            'printf "%s|" "$config" "$run" "${overrides[@]}"',
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown == "c o.yaml|/r/$x \"y|a.b='q'|"
    assert f"--ntasks-per-node={2 if launcher == 'srun' else 1}" in text


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_pass_shellcheck() -> None:
    scripts = [*(ROOT / "launch").glob("slurm/*.sbatch"), *(ROOT / "launch").glob("*.sh")]
    scripts += [*(ROOT / "tools").glob("*.sh"), ROOT / ".ci" / "run"]
    done = subprocess.run(
        ["shellcheck", "--external-sources", *map(str, scripts)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("2-03:04:05", 183845)],
)
def test_times(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


def test_a_time_of_another_form_is_refused() -> None:
    with pytest.raises(UserError, match="two hours"):
        seconds_of("two hours")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """Slurm's programs, answered from files; `fails` counts how often the controller is away."""
    answers = {"scontrol": PARTITIONS, "sinfo": NODES, "sbatch": "17;cluster\n"}
    answers["squeue"] = json.dumps({"jobs": [_entry(7), _entry(5, job_state=["PENDING"])]})
    errors = [{"source": "slurm_load_jobs", "description": "Failed while looking for jobs"}]
    (tmp_path / "away.txt").write_text(json.dumps({"errors": errors, "jobs": []}))
    for name, answer in answers.items():
        (tmp_path / f"{name}.txt").write_text(answer)
        program = tmp_path / name
        program.write_text(
            "#!/bin/bash\n"
            f"cd {tmp_path}\n"
            f'echo "$0 $*" >>calls; env | grep -E "^(SLURM|SBATCH)_" >>environment\n'
            "left=$(cat fails 2>/dev/null || echo 0)\n"
            "if ((left)); then echo $((left - 1)) >fails\n"
            "[[ $* != --json ]] || { cat away.txt; exit 0; }\n"  # as Slurm 22.05 does
            "echo 'error: Unable to contact slurm controller (connect failure)' >&2; exit 1; fi\n"
            "[[ ! -e refusal ]] || { cat refusal >&2; exit 1; }\n"
            f"cat {name}.txt\n"
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return Slurm(sleep=lambda seconds: None)


def _entry(number: int, **changes: object) -> dict[str, object]:
    entry: dict[str, object] = {
        "job_id": number,
        "name": "mine",
        "user_name": "root",
        "job_state": "RUNNING",
        "state_reason": "None",
        "nodes": "a[1-2]",
        "comment": "megascale:/runs/mine",
        "restart_cnt": 2,
    }
    return {**entry, **changes}


def test_jobs_are_read_in_both_forms_of_the_json(slurm: Slurm) -> None:
    first, second = slurm.jobs()
    assert (first.number, first.state, second.state) == ("5", "PENDING", "RUNNING")
    assert second.run == "/runs/mine"
    assert second.restarts == 2


def test_a_controller_that_is_away_is_asked_again(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "fails").write_text("3")
    assert slurm.submit("script", "--hold") == "17"
    assert len((tmp_path / "calls").read_text().splitlines()) == 4
    (tmp_path / "fails").write_text("99")
    with pytest.raises(UserError, match="Unable to contact"):
        slurm.submit("script")


def test_no_jobs_is_not_what_a_controller_that_is_away_says(slurm: Slurm, tmp_path: Path) -> None:
    """Else a second submission of a run would be let through, and `logs -f` would end."""
    (tmp_path / "fails").write_text("3")
    assert len(slurm.jobs()) == 2
    (tmp_path / "fails").write_text("99")
    with pytest.raises(UserError, match="slurm_load_jobs: Failed while looking for jobs"):
        slurm.jobs()


def test_a_job_whose_number_was_lost_on_the_way_is_not_queued_twice(
    slurm: Slurm, tmp_path: Path
) -> None:
    """sbatch gives up on a slow controller, which has heard it all the same."""
    (tmp_path / "fails").write_text("1")
    assert slurm.submit("script", run="/runs/mine", known=["7"]) == "5"
    calls = [Path(line.split()[0]).name for line in (tmp_path / "calls").read_text().splitlines()]
    assert calls == ["sbatch", "squeue"]
    (tmp_path / "fails").write_text("1")
    assert slurm.submit("script", run="/runs/mine", known=["5", "7"]) == "17"


def test_only_a_job_in_a_state_without_return_is_over() -> None:
    """A job that is held after a requeue, or suspended, writes to its folder later."""
    job = Job("7", "mine", "root", "REQUEUE_HOLD", "", "a1", "megascale:/runs/mine")
    assert not job.is_over
    assert replace(job, state="NODE_FAIL").is_over


def test_a_refusal_is_not_tried_again(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "refusal").write_text("error: invalid account\n")
    with pytest.raises(UserError, match="invalid account"):
        slurm.submit("script")
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_a_surrounding_job_does_not_reach_sbatch(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "99")
    monkeypatch.setenv("SBATCH_PARTITION", "other")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    slurm.submit("script")
    assert (tmp_path / "environment").read_text() == "SLURM_CONF=/etc/slurm.conf\n"
    assert outside_of_jobs({"SRUN_CPUS_PER_TASK": "1", "HOME": "/"}) == {"HOME": "/"}


def test_without_slurm_it_says_where_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_client.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="no squeue here"):
        Slurm().jobs()


def test_a_request_that_fits(slurm: Slurm) -> None:
    check_request(Request(3, 8, 8, gpus_per_node=8, time="1-12:00:00"), slurm)
    check_request(Request(1, 8, 8, partition="small", time="90-0"), slurm)


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (Request(1, 1, 1, partition="gone"), "big, shut, small"),
        (Request(1, 1, 1, partition="shut"), "is DOWN"),
        (Request(2, 1, 1, partition="small"), "may take 1"),
        (Request(5, 1, 1), "it has 4 nodes"),
        (Request(4, 1, 1, excluded=["a4"]), "it has 3 nodes beside bad ones (a4)"),
        (Request(3, 1, 1, spare_nodes=2), "--over-allocate 2"),
        (Request(4, 1, 1), r"a4 down"),
        (Request(1, 9, 8), "largest has 64 cpus"),
        (Request(1, 9, 1, gpus_per_node=9), "8 GPUs"),
        (Request(1, 1, 1, time="3-0"), "2-00:00:00"),
        (Request(1, 1, 1, time="2", lead_s=120), "--lead 120"),
    ],
)
def test_a_request_that_does_not_fit(slurm: Slurm, request_: Request, told: str) -> None:
    with pytest.raises(UserError) as caught:
        check_request(request_, slurm)
    assert told in str(caught.value)
    assert caught.value.remedy


def test_a_second_submission_of_a_run_is_refused() -> None:
    job = Job("7", "mine", "root", "RUNNING", "", "a1", "megascale:/runs/mine")
    with pytest.raises(UserError, match="already running: job 7"):
        check_name_is_free("other", "/runs/../runs/mine", [job])
    over = Job("7", "mine", "root", "COMPLETED", "", "a1", "megascale:/runs/mine")
    strange = Job("8", "mine", "root", "RUNNING", "", "a1", "")
    check_name_is_free("mine", "/runs/mine", [over, strange])


def test_two_submissions_at_once(tmp_path: Path) -> None:
    lock = submission_lock("mine", tmp_path)
    with pytest.raises(UserError, match="run mine is being submitted by"):
        submission_lock("mine", tmp_path)
    lock.release()
    submission_lock("mine", tmp_path).release()


def test_a_container_needs_pyxis(slurm: Slurm, tmp_path: Path) -> None:
    help_ = tmp_path / "srun"
    help_.write_text("#!/bin/sh\necho '  --container=path  OCI bundle'\n")
    help_.chmod(0o755)
    with pytest.raises(UserError, match="knows no --container-image"):
        check_container(slurm)
    help_.write_text("#!/bin/sh\necho '  --container-image=[USER@]IMAGE  [pyxis] the image'\n")
    check_container(slurm)


def test_a_container_sees_what_the_run_reads_and_writes(tmp_path: Path) -> None:
    tree = settings(tmp_path / "corpus" / "part", tmp_path / "run")
    tree["data"]["validation"] = {"other": "/elsewhere/held_out"}
    tree["checkpoint"] |= {"folder": "/lustre/kept/mine", "staging_dir": "/scratch"}
    config = load_config(write_config(tmp_path / "c.yaml", tree))
    _, mounts, _ = _container("image", config, tmp_path / "run")
    folders = [Path.cwd(), tmp_path / "run", "/elsewhere", "/lustre/kept", "/scratch"]
    expected = {f"{folder}:{folder}" for folder in [*folders, tmp_path / "corpus"]}
    assert set(mounts.removeprefix("--container-mounts=").split(",")) == expected


def test_tasks_and_devices(tmp_path: Path) -> None:
    tree = settings(tmp_path, tmp_path / "run", parallel__tensor_parallel_size=2)
    config = load_config(write_config(tmp_path / "c.yaml", tree))
    with pytest.raises(UserError, match=r"cross machines .ranks 0 on machine 0, 1 on machine 1"):
        check_layout(config, Request(2, 1, 1))
    tree["parallel"]["tensor_parallel_across_machines"] = True
    allowed = load_config(write_config(tmp_path / "allowed.yaml", tree))
    (warning,) = check_layout(allowed, Request(2, 1, 1))
    assert "cross machines" in warning
    assert not check_layout(config, Request(2, 4, 1, gpus_per_node=4))
    with pytest.raises(UserError, match="--ntasks-per-node 4 with --gpus-per-node 8"):
        check_layout(config, Request(2, 4, 1, gpus_per_node=8))


def test_paths(tmp_path: Path) -> None:
    def check(data: Path, output: Path) -> None:
        check_paths(load_config(write_config(tmp_path / "c.yaml", settings(data, output))))

    (tmp_path / "data").mkdir()
    check(tmp_path / "data", tmp_path / "run")
    with pytest.raises(UserError, match="no dataset"):
        check(tmp_path / "gone", tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        check(tmp_path / "data", tmp_path / "file" / "run")
