"""The `megascale` command: one file a subcommand, user errors without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from megascale import __version__
from megascale.cli import checkpoint as checkpoint_command
from megascale.cli import config as config_command
from megascale.cli import convert as convert_command
from megascale.cli import data as data_command
from megascale.cli import jobs as jobs_command
from megascale.cli import plan as plan_command
from megascale.cli import verify as verify_command
from megascale.cli.doctor import doctor
from megascale.cli.evaluate import evaluate
from megascale.cli.generate import generate
from megascale.cli.profile import profile
from megascale.cli.submit import submit
from megascale.cli.train import train
from megascale.errors import UserError
from megascale.launcher.allocator import start_again_with_allocator


def build_app() -> typer.Typer:
    """The command with all its subcommands."""
    app = typer.Typer(
        help="Pretrain GPT and BERT at scale; every layout is the same training.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=True,
    )
    app.callback()(root)
    app.add_typer(checkpoint_command.app, name="checkpoint")
    app.add_typer(config_command.app, name="config")
    app.add_typer(convert_command.app, name="convert")
    app.add_typer(data_command.app, name="data")
    app.add_typer(jobs_command.app, name="jobs")
    app.add_typer(plan_command.app, name="plan")
    app.add_typer(verify_command.app, name="verify")
    for command in (train, evaluate, generate, profile, submit, doctor):
        app.command()(command)
    return app


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = -1,
) -> None:
    """The deepspeed launcher puts --local_rank=N before the subcommand; LOCAL_RANK says it too."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 success, 2 mistake of the user, 130 interrupted, 1 a bug.

    Args:
        arguments: None: those of this program, which may then be started again to fork its ranks
            with another allocator.
    """
    if arguments is None and any(part.startswith("--nproc") for part in sys.argv):
        start_again_with_allocator()
    try:
        build_app()(args=list(arguments) if arguments is not None else None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
