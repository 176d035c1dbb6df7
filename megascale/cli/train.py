"""`megascale train CONFIG`: the main job, alone or under any launcher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megascale.cli.config import ConfigFile, Overrides, all_checks
from megascale.cli.process import collector_paused, distributed_process, launch_ranks
from megascale.config.load import load_config
from megascale.config.schema import Config
from megascale.errors import NodeError, UserError

Nproc = Annotated[
    int | None, typer.Option(min=1, help="Start this many processes on this machine.")
]


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Nproc = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest intact checkpoint.")
    ] = False,
) -> None:
    """Pretrain a model; also under torchrun or the deepspeed launcher."""
    # torch costs seconds: what can be refused is refused before it is imported
    from megascale.engine.capabilities import choose_engine
    from megascale.launcher.attempt import check_folder_is_seen
    from megascale.launcher.environment import world_size_of

    check_folder_is_seen()
    checked = load_config(
        config, overrides or (), checks=all_checks(), world_size=world_size_of(nproc)
    )
    logs = Path(checked.run.output_dir) / "logs"
    if launch_ranks(nproc, logs, checked.run.device, choose_engine(checked)):
        return
    _train(checked, resume)


def _train(config: Config, resume: bool) -> None:
    from rich.console import Console

    from megascale.launcher.attempt import write_outcome, write_started
    from megascale.launcher.environment import process_info

    with (
        collector_paused() as all_is_imported,
        distributed_process(config.run.device, config.parallel.collective_timeout_s) as device,
    ):
        compare_machines(config, process_info().rank)
        # costs seconds: machines that differ are told before it
        from megascale.training.assemble import assemble
        from megascale.training.callbacks.save_requests import STOPPING_WAYS

        all_is_imported()
        run = assemble(config, device, resume=resume, console=Console())
        trainer, mesh = run.trainer, run.trainer.parts.mesh
        if mesh.is_main:
            write_started(trainer.state.step, mesh.world_size)
        try:
            trainer.fit()
        finally:
            run.engine.close()
        if mesh.is_main:
            reason = trainer.stop_reason or ""
            was_asked = any(way in reason for way in STOPPING_WAYS)
            finished = trainer.state.step >= trainer.max_steps or not was_asked
            write_outcome(trainer.state.step, finished, reason)


def compare_machines(config: Config, rank: int) -> None:
    """Before anything is built: do all ranks have the same versions, space, clocks? Collective.

    Rank 0 prints warnings; what makes a training wrong is an error on every rank.

    Raises:
        NodeError: versions of few machines differ from the others'; they are remembered.
        UserError: versions differ, and nobody knows whose are wrong; or tensor-parallel groups
            cross machines.
    """
    import torch.distributed as dist

    from megascale.launcher.bad_nodes import add_bad_nodes
    from megascale.launcher.measurements import device_names, everybodys
    from megascale.launcher.preflight import check_tensor_groups, compare, gather_facts

    if dist.get_world_size() == 1:
        return
    parallel, output = config.parallel, Path(config.run.output_dir)
    builds = parallel.offload_optimizer or parallel.offload_parameters
    gathered = everybodys(gather_facts(rank, output, device_names(), needs_compiler=builds))
    findings = compare(gathered)
    if rank == 0:
        for finding in findings:
            typer.echo(f"warning: {finding}", err=True)
    errors = [finding for finding in findings if finding.is_error]
    if errors:
        bad = sorted({finding.host for finding in errors if finding.is_bad_node})
        if rank == 0:
            add_bad_nodes(output, bad)
        raise (NodeError if bad else UserError)(  # without them another attempt would meet the same
            "; ".join(f"{finding.host}: {finding.text}" for finding in errors),
            rule="all ranks of a training run the same versions",
            remedy=errors[0].remedy,
        )
    crossing = check_tensor_groups(
        [facts.host for facts in gathered],
        parallel.tensor_parallel_size,
        may_cross=parallel.tensor_parallel_across_machines,
    )
    if rank == 0 and crossing:
        typer.echo(f"warning: {crossing}", err=True)
