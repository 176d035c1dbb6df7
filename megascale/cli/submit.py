"""`megascale submit CONFIG --nodes N`: check a request, write its batch script, queue it."""

from __future__ import annotations

import secrets
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from megascale.cli.config import ConfigFile, Overrides, all_checks
from megascale.config.load import dump_config, load_config
from megascale.config.schema import Config
from megascale.errors import UserError
from megascale.launcher.bad_nodes import read_bad_nodes
from megascale.launcher.batch_script import BatchJob, render
from megascale.launcher.slurm_client import Slurm
from megascale.launcher.submission import (
    Request,
    chain_options,
    check_container,
    check_layout,
    check_name_is_free,
    check_paths,
    check_request,
    output_errors,
    script_path,
    submission_lock,
)

_ENVIRONMENT_FILE = Path(__file__).resolve().parents[2] / "launch" / "env.sh"
Count = Annotated[int, typer.Option(min=1)]
Text = Annotated[str | None, typer.Option()]


def submit(
    config: ConfigFile,
    nodes: Annotated[int, typer.Option(min=1, help="Machines to train on.")],
    overrides: Overrides = None,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each machine.")] = 0,
    ntasks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Processes on each; default: the GPUs, or 1.")
    ] = None,
    cpus_per_task: Count = 1,
    time: Annotated[str | None, typer.Option(help="Longest time, e.g. 24:00:00.")] = None,
    partition: Text = None,
    account: Text = None,
    qos: Text = None,
    constraint: Text = None,
    container: Annotated[
        str | None, typer.Option(help="Image to train in, with pyxis (srun --container-image).")
    ] = None,
    lead: Annotated[
        int, typer.Option(min=1, help="Seconds before the end of the time at which it saves.")
    ] = 120,
    chain: Annotated[int, typer.Option(min=1, help="Jobs, each going on after the other.")] = 1,
    over_allocate: Annotated[
        int, typer.Option(min=0, help="More machines, of which the worst are left out.")
    ] = 0,
    attempts: Annotated[
        int, typer.Option(min=1, help="Attempts without progress until it is given up.")
    ] = 5,
    launcher: Annotated[str, typer.Option(help="srun (a task a rank) or torchrun.")] = "srun",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, and print the batch script.")
    ] = False,
) -> None:
    """Train on a Slurm cluster: everything that can be refused is refused before it is queued."""
    if launcher not in ("srun", "torchrun"):
        raise UserError(
            f"--launcher {launcher}", rule="it is srun or torchrun", remedy="choose one of these"
        )
    tasks = ntasks_per_node or gpus_per_node or 1
    checked = load_config(config, overrides or (), checks=all_checks(), world_size=nodes * tasks)
    run = Path(checked.run.output_dir).absolute()
    request = Request(
        nodes=nodes,
        tasks_per_node=tasks,
        cpus_per_task=cpus_per_task,
        gpus_per_node=gpus_per_node,
        spare_nodes=over_allocate,
        time=time,
        partition=partition,
        lead_s=lead,
        excluded=read_bad_nodes(run),
    )
    for warning in check_layout(checked, request):
        typer.echo(f"warning: {warning}", err=True)
    options = {
        **_named(time=time, partition=partition, account=account, qos=qos, constraint=constraint),
        **({"gpus-per-node": str(gpus_per_node)} if gpus_per_node else {}),
        **({"exclude": ",".join(request.excluded)} if request.excluded else {}),
    }
    job = BatchJob(
        name=run.name,
        config=str(run / "submitted.yaml"),
        run=str(run),
        checkpoints=_absolute(checked.checkpoint.folder or f"{run}/checkpoints"),
        nodes=nodes,
        tasks_per_node=request.tasks_per_node,
        cpus_per_task=cpus_per_task,
        python=sys.executable,
        train_python="python" if container else sys.executable,
        submission=secrets.token_hex(4),
        options=options,
        lead_s=lead,
        most_attempts=attempts,
        requeue_at_limit=chain == 1,
        spare_nodes=over_allocate,
        container=_container(container, checked, run) if container else (),
        environment_file=str(_ENVIRONMENT_FILE) if _ENVIRONMENT_FILE.exists() else "",
        launcher=launcher,
    )
    if dry_run:
        _check_cluster(request, job, needed=False)
        typer.echo(render(job), nl=False)
        return
    check_paths(checked)
    lock = submission_lock(job.name, run)
    try:
        _check_cluster(request, job, needed=True)
        _queue(job, checked, chain)
    finally:
        lock.release()


def _check_cluster(request: Request, job: BatchJob, needed: bool) -> None:
    """The request against the cluster; without one a dry run says that it did not look."""
    if not needed and shutil.which("scontrol") is None:
        typer.echo("warning: no Slurm here; the request was not compared with a cluster", err=True)
        return
    slurm = Slurm()
    check_request(request, slurm)
    if job.container:
        check_container(slurm)
    check_name_is_free(job.name, job.run, slurm.jobs())


def _queue(job: BatchJob, checked: Config, chain: int) -> None:
    """Write config and script into the run's folder and queue the links of the chain."""
    script = script_path(job)
    with output_errors(Path(job.run)):
        Path(job.config).write_text(dump_config(checked))
        script.write_text(render(job))
    slurm = Slurm()
    numbers: list[str] = []
    try:
        for _ in range(chain):
            options = chain_options(numbers[-1] if numbers else None)
            numbers.append(slurm.submit(str(script), *options, run=job.run, known=numbers))
    except UserError:
        if numbers:  # half a chain is not what was asked for
            slurm.cancel(numbers)
        raise
    for number in numbers:
        typer.echo(f"submitted job {number}: run {job.name}, output in {job.run}")
    typer.echo(f"megascale jobs status {job.name} | logs -f | why | stop | cancel", err=True)


def _named(**options: str | None) -> dict[str, str | None]:
    return {name: value for name, value in options.items() if value is not None}


def _absolute(folder: str) -> str:
    return folder if "://" in folder else str(Path(folder).absolute())


def _container(image: str, config: Config, run: Path) -> tuple[str, ...]:
    """srun's pyxis options: the image, and the folders that a run reads and writes."""
    data, saving = config.data, config.checkpoint
    named = [*data.source_paths, *map(str, data.validation.values()), data.tokenizer]
    named += [data.cache_dir, saving.folder, saving.staging_dir, saving.init_from]
    inside = {_mounted(Path(name).absolute()) for name in named if name and "://" not in name}
    folders = dict.fromkeys([Path.cwd(), run, *sorted(inside)])
    mounts = ",".join(f"{folder}:{folder}" for folder in folders)
    return (
        f"--container-image={image}",
        f"--container-mounts={mounts}",
        f"--container-workdir={Path.cwd()}",
    )


def _mounted(path: Path) -> Path:
    """The folder above: a prefix is no folder, and one yet to be made cannot be mounted."""
    return path if path.parent == Path(path.anchor) else path.parent
