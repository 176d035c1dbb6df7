"""What must hold before anything is queued: the request against the cluster and the file system."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megascale.config.schema import Config
from megascale.errors import UserError
from megascale.file_lock import FileLock
from megascale.launcher.batch_script import BatchJob
from megascale.launcher.preflight import check_tensor_groups
from megascale.launcher.slurm_client import Job, Slurm

_TIME = re.compile(r"^(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?$")
_UNUSABLE = ("down", "drain", "fail", "not_resp", "unknown", "maint")


@dataclass(frozen=True)
class Request:
    """What a user asks of `megascale submit`, beside the config.

    Attributes:
        excluded: machines that the run's earlier attempts found bad.
    """

    nodes: int
    tasks_per_node: int
    cpus_per_task: int
    gpus_per_node: int = 0
    spare_nodes: int = 0
    time: str | None = None
    partition: str | None = None
    lead_s: int = 120
    excluded: Sequence[str] = ()


def seconds_of(text: str) -> int:
    """Slurm's forms of a time: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S.

    Raises:
        UserError: another form.
    """
    match = _TIME.match(text)
    if not match:
        raise UserError(
            f"--time {text!r}",
            rule="a time is MINUTES, H:M:S or DAYS-H:M:S",
            remedy="for example --time 24:00:00",
        )
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match.group(1) is not None:  # D-H[:M[:S]]
        return ((days * 24 + first) * 60 + second) * 60 + third
    if match.group(4) is not None:  # H:M:S
        return (first * 60 + second) * 60 + third
    return first * 60 + second


def check_request(request: Request, slurm: Slurm) -> None:
    """Refuse what the cluster cannot give.

    Raises:
        UserError: no such partition, too many nodes, processors, GPUs or too much time.
    """
    partition, limits = _partition(request, slurm)
    nodes = [n for n in slurm.nodes(partition) if n["name"] not in request.excluded]
    usable = [n for n in nodes if not any(word in n["state"].lower() for word in _UNUSABLE)]
    total = request.nodes + request.spare_nodes
    asked = f"--nodes {request.nodes}"
    if request.spare_nodes:
        asked += f" --over-allocate {request.spare_nodes}"
    most = limits.get("MaxNodes", "UNLIMITED")
    if total > len(nodes) or (most.isdecimal() and total > int(most)):
        largest = min(len(nodes), int(most) if most.isdecimal() else len(nodes))
        raise UserError(
            f"{asked} in partition {partition}",
            rule=f"it has {len(nodes)} nodes"
            + (f" beside bad ones ({', '.join(request.excluded)})" if request.excluded else "")
            + (f", and a job may take {most} of them" if most.isdecimal() else ""),
            remedy=f"ask for at most {largest}, or for another partition",
        )
    cpus = request.tasks_per_node * request.cpus_per_task
    fitting = [n for n in nodes if int(n["cpus"]) >= cpus and _gpus(n) >= request.gpus_per_node]
    if len(fitting) < total:
        best = max(nodes, key=lambda n: (_gpus(n), int(n["cpus"])))
        raise UserError(
            f"{request.tasks_per_node} tasks of {request.cpus_per_task} cpus and "
            f"{request.gpus_per_node} GPUs on each of {total} nodes of {partition}",
            rule=f"{len(fitting)} of its nodes have that; the largest has {best['cpus']} cpus and "
            f"{_gpus(best)} GPUs",
            remedy="lower --ntasks-per-node, --cpus-per-task or --gpus-per-node",
        )
    if len(usable) < total:
        states = ", ".join(f"{n['name']} {n['state']}" for n in nodes if n not in usable)
        raise UserError(
            f"{asked} in partition {partition}",
            rule=f"only {len(usable)} of its nodes work: {states}",
            remedy="ask for fewer, or wait until they are back",
        )
    _check_time(request, partition, limits)


def check_container(slurm: Slurm) -> None:
    """Refuse an image where srun cannot start tasks in one.

    Raises:
        UserError: it has no option for it.
    """
    if "--container-image" not in slurm.call("srun", "--help"):
        raise UserError(
            "--container on a cluster whose srun knows no --container-image",
            rule="tasks start in an image by the plugin pyxis",
            remedy="leave --container out, or use Apptainer as docs/launch.md says",
        )


def _partition(request: Request, slurm: Slurm) -> tuple[str, Mapping[str, str]]:
    partitions = slurm.partitions()
    default = next((n for n, limits in partitions.items() if limits.get("Default") == "YES"), None)
    name = request.partition or default
    if name is None or name not in partitions:
        raise UserError(
            f"--partition {name}" if name else "no --partition, and the cluster has no default",
            rule=f"this cluster's partitions are {', '.join(sorted(partitions))}",
            remedy="choose one of these",
        )
    if partitions[name].get("State") != "UP":
        raise UserError(
            f"partition {name} is {partitions[name].get('State', 'in an unknown state')}",
            rule="a job starts in a partition that is UP",
            remedy="choose another, or wait",
        )
    return name, partitions[name]


def _check_time(request: Request, partition: str, limits: Mapping[str, str]) -> None:
    longest = limits.get("MaxTime", "UNLIMITED")
    if request.time is not None:
        seconds = seconds_of(request.time)
        if _TIME.match(longest) and seconds > seconds_of(longest):
            raise UserError(
                f"--time {request.time} in partition {partition}",
                rule=f"its longest time is {longest}",
                remedy="ask for less, with --chain K to go on in further jobs",
            )
        if seconds <= request.lead_s:
            raise UserError(
                f"--time {request.time} with --lead {request.lead_s}",
                rule="the run saves --lead seconds before the end of its time",
                remedy="ask for more time, or for a smaller lead",
            )


def _gpus(node: Mapping[str, str]) -> int:
    """GPUs of a node, from its gres such as gpu:a100:4(S:0-1)."""
    return sum(int(n) for n in re.findall(r"gpu(?::[^,:(]+)?:(\d+)", node["gres"]))


def check_layout(config: Config, request: Request) -> list[str]:
    """Warnings about tasks, devices and layout that agree only in number.

    Raises:
        UserError: more processes than GPUs on a machine, or the other way round; tensor-parallel
            groups that cross machines.
    """
    warnings = []
    tasks, gpus = request.tasks_per_node, request.gpus_per_node
    if config.run.device == "cuda" and not gpus:
        raise UserError(
            "run.device=cuda without --gpus-per-node",
            rule="each process needs a GPU of its own",
            remedy=f"add --gpus-per-node {tasks}",
        )
    if gpus and gpus != tasks and config.run.device != "cpu":
        raise UserError(
            f"--ntasks-per-node {tasks} with --gpus-per-node {gpus}",
            rule="there is one process for each GPU",
            remedy=f"--ntasks-per-node {gpus}, or leave it out",
        )
    parallel = config.parallel
    machines = [f"machine {rank // tasks}" for rank in range(request.nodes * tasks)]
    if len(machines) % parallel.tensor_parallel_size == 0:  # else the layout is refused by itself
        warnings.append(
            check_tensor_groups(
                machines,
                parallel.tensor_parallel_size,
                may_cross=parallel.tensor_parallel_across_machines,
            )
        )
    return [warning for warning in warnings if warning]


def check_paths(config: Config) -> None:
    """Refuse a dataset that is not there, or an output folder that cannot be written to.

    Raises:
        UserError: as said.
    """
    sources = list(config.data.source_paths)
    sources += [str(path) for path in config.data.validation.values()]
    for path in sources:
        if "://" not in path and not Path(path).exists() and not Path(f"{path}.bin").exists():
            raise UserError(
                f"there is no dataset {path}",
                rule="data.path is a prepared dataset's folder or a prefix of .bin and .idx, "
                "the same on every machine",
                remedy="prepare it first (python -m data_prep tokenize), or correct data.path",
            )
    output = Path(config.run.output_dir)
    if not output.absolute().as_posix().isprintable() or "\\" in str(output):
        raise UserError(
            f"run.output_dir {str(output)!r}",
            rule="Slurm takes no backslash, line break or the like in the name of a log",
            remedy="choose another run.output_dir",
        )
    with output_errors(output):
        (output / "logs").mkdir(parents=True, exist_ok=True)
        probe = output / "logs" / f".writable-{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()


@contextmanager
def output_errors(output: Path) -> Iterator[None]:
    """Turn what the file system refuses in the run's folder into a user's error."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to run.output_dir {output}: {error.strerror}",
            rule="a run needs a folder that it may write to, shared by all machines",
            remedy="choose another run.output_dir, or free space",
        ) from error


def submission_lock(name: str, output: Path) -> FileLock:
    """Held while a run is looked for and queued, so that two at once do not both find it free.

    Raises:
        UserError: somebody is submitting this run.
    """

    def refuse(holder: str) -> UserError:
        return UserError(
            f"run {name} is being submitted by {holder}",
            rule="two jobs of one run would write over each other",
            remedy="wait for it, or choose another run.output_dir",
        )

    with output_errors(output):
        return FileLock(output / ".submit.lock", refuse)


def check_name_is_free(name: str, run: str, jobs: Sequence[Job]) -> None:
    """Refuse a second submission of a run that waits or runs.

    Raises:
        UserError: there is a job of the same name and user, or of the same folder.
    """
    users = (str(os.getuid()), _user_name())
    for job in jobs:
        if job.is_over:
            continue
        same_folder = job.run and os.path.realpath(job.run) == os.path.realpath(run)
        if same_folder or (job.name == name and job.run and job.user in users):
            raise UserError(
                f"run {name} is already {job.state.lower()}: job {job.number} of {job.run}",
                rule="two jobs of one run would write over each other",
                remedy=f"megascale jobs stop {name}, wait for it, or choose another run.output_dir",
            )


def _user_name() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container without this user
        return str(os.getuid())


def chain_options(previous: str | None) -> tuple[str, ...]:
    """sbatch options of a link of a chain: it begins when the one before has ended, however."""
    return () if previous is None else (f"--dependency=afterany:{previous}",)


def script_path(job: BatchJob) -> Path:
    """Where the batch script of a run is kept."""
    return Path(job.run) / "pretrain.sbatch"
