"""`megascale doctor`: is this machine, or this cluster, fit for a training?"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megascale.cli.config import all_checks
from megascale.cli.process import distributed_process
from megascale.config.load import load_config
from megascale.config.schema import Config
from megascale.launcher.attempt import write_json
from megascale.launcher.bad_nodes import add_bad_nodes
from megascale.launcher.environment import process_info, world_size_of
from megascale.launcher.preflight import Facts, Finding, compare, gather_facts
from megascale.launcher.slurm_client import Slurm
from megascale.launcher.submission import Request, check_request

if TYPE_CHECKING:
    import torch.distributed as dist

Number = Annotated[int, typer.Option(min=1)]


def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Measure along its axes.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.NAME=VALUE]...")
    ] = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="On machines of a Slurm cluster, by srun.")
    ] = False,
    nodes: Number = 2,
    ntasks_per_node: Number = 1,
    partition: Annotated[str | None, typer.Option()] = None,
    run: Annotated[
        Path | None, typer.Option(help="Leave bad machines out of this run's next attempts.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="Only this machine: write what is found into this folder.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Check versions, devices, space, clocks, names and speeds; exit code 1 if a run would fail.

    Alone it looks at this machine; under torchrun or srun at all ranks, and how fast they exchange
    numbers along each axis of CONFIG's layout; with --cluster it starts that by srun.
    """
    if cluster:
        check_request(Request(nodes, ntasks_per_node, 1, partition=partition), Slurm())
        raise typer.Exit(_on_cluster(nodes, ntasks_per_node, partition))
    checked = None
    if config is not None:
        size = world_size_of(None)
        checked = load_config(config, overrides or (), checks=all_checks(), world_size=size)
    output = Path(checked.run.output_dir) if checked else Path.cwd()
    if record is not None:
        facts = _measured_facts(0, output, device)
        record.mkdir(parents=True, exist_ok=True)
        write_json(record / f"{facts.host}.json", dataclasses.asdict(facts))
        return
    _examine(checked, output, device, run)


def _on_cluster(nodes: int, tasks: int, partition: str | None) -> int:
    """Run this command again as the tasks of a step."""
    skip = {"--cluster": 0, "--nodes": 1, "--ntasks-per-node": 1, "--partition": 1}
    rest, words = [], iter(sys.argv[1:])
    for word in words:
        name, _, value = word.partition("=")
        if name not in skip:
            rest.append(word)
        elif skip[name] and not value:
            next(words, None)
    where = [f"--partition={partition}"] if partition else []
    command = ["srun", f"--nodes={nodes}", f"--ntasks-per-node={tasks}", *where]
    return subprocess.run(
        [*command, "--kill-on-bad-exit=1", sys.executable, "-m", "megascale", *rest], check=False
    ).returncode


def _measured_facts(rank: int, output: Path, device_name: str) -> Facts:
    """What this machine is, and how fast it multiplies."""
    import torch

    from megascale.launcher.measurements import device_names, product_seconds
    from megascale.launcher.rendezvous import choose_device

    device = choose_device(device_name, process_info())
    facts = gather_facts(rank, output, device_names())
    torch.manual_seed(0)
    return dataclasses.replace(facts, product_s=product_seconds(device))


def _examine(config: Config | None, output: Path, device_name: str, run: Path | None) -> None:
    """All ranks of this start, together."""
    from megascale.launcher.measurements import all_reduce_speed, everybodys

    info = process_info()
    name = config.run.device if config else device_name
    with distributed_process(name, 120) as device:
        facts = _measured_facts(info.rank, output, name)
        gathered = everybodys(facts)
        lines = []
        for axis, group in _axes(config, device.type).items():
            speed = all_reduce_speed(axis, group, device)
            lines.append(
                f"all-reduce along {axis} ({speed.size} ranks): {1e6 * speed.latency_s:.0f} us, "
                f"{speed.bytes_per_s / 1e6:.0f} MB/s"
            )
        findings = compare(gathered)
        if info.rank == 0:
            _print(gathered, lines, findings)
            bad = sorted({f.host for f in findings if f.is_bad_node})
            if run is not None and bad:
                add_bad_nodes(run, bad)
        failed = any(finding.is_error for finding in findings)
    if failed:
        raise typer.Exit(1)


def _axes(config: Config | None, device_type: str) -> dict[str, dist.ProcessGroup]:
    """The groups of more than one rank, by axis; without a config all ranks."""
    import torch.distributed as dist

    if config is None:
        world = dist.distributed_c10d._get_default_group()
        return {"all": world} if dist.get_world_size() > 1 else {}
    from megascale.parallel.mesh import build_mesh

    mesh = build_mesh(
        device_type,
        tensor_parallel_size=config.parallel.tensor_parallel_size,
        pipeline_parallel_size=config.parallel.pipeline_parallel_size,
        context_parallel_size=config.parallel.context_parallel_size,
        through_memory=config.performance.shared_memory == "auto",
    )
    sizes = {"pp": mesh.pp_size, "dp": mesh.dp_size, "cp": mesh.cp_size, "tp": mesh.tp_size}
    groups = {"pp": mesh.pp_group, "dp": mesh.dp_group, "cp": mesh.cp_group, "tp": mesh.tp_group}
    return {axis: groups[axis] for axis, size in sizes.items() if size > 1}


def _print(gathered: list[Facts], lines: list[str], findings: list[Finding]) -> None:
    seen = set()
    for facts in gathered:
        if facts.host not in seen:
            seen.add(facts.host)
            typer.echo(
                f"{facts.host}: torch {facts.versions.get('torch')}, "
                f"{len(facts.devices)} devices, {facts.memory >> 20} MiB of memory, "
                f"{facts.allocator}, product {1e3 * facts.product_s:.1f} ms"
            )
    for line in lines:
        typer.echo(line)
    for finding in findings:
        typer.echo(f"{'error' if finding.is_error else 'warning'}: {finding}")
    if not findings:
        typer.echo("nothing is wrong")
