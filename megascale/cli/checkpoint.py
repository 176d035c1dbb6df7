"""`megascale checkpoint list | inspect | verify | diff | reshard | prune`: looking after them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from megascale.errors import UserError

if TYPE_CHECKING:
    from megascale.checkpoint.manager import CheckpointFolder
    from megascale.checkpoint.reader import CheckpointReader

app = typer.Typer(help="Look after checkpoints; none of this needs a GPU.", no_args_is_help=True)

RunFolder = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's folder, its checkpoints folder, or a URL.")
]
Folder = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A folder step_XXXXXXXX.")]


@app.command("list")
def list_checkpoints(run: RunFolder) -> None:
    """One line a checkpoint: step, size, ranks and where it stands; complete or not."""
    from megascale.checkpoint.reader import CheckpointReader

    folder = _folder(run)
    for step in folder.all_steps():
        try:
            reader = CheckpointReader(folder.path(step))
        except UserError as error:
            typer.echo(f"{folder.path(step)}  NOT USABLE: {error.what}")
            continue
        problem = reader.sizes_differ()
        state = reader.manifest.state.get("train", {})
        size = sum(entry.bytes for entry in reader.manifest.files)
        seen = f"  {state['samples_seen']} samples" if "samples_seen" in state else ""
        damaged = f"  DAMAGED: {problem}" if problem else ""
        ranks = reader.manifest.world_size
        typer.echo(f"{folder.path(step)}  {size:,} bytes  {ranks} rank(s){seen}{damaged}")


@app.command()
def inspect(
    checkpoint: Folder,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every parameter.")] = False,
) -> None:
    """What a checkpoint holds, from its manifest alone."""
    import json
    import math

    from megascale.checkpoint.name_lists import folded

    reader = _open(checkpoint)
    manifest = reader.manifest
    count = sum(math.prod(shape) for shape in manifest.parameters.values())
    typer.echo(f"step        {manifest.step}")
    typer.echo(f"written by  {manifest.written_by}, {manifest.world_size} rank(s)")
    typer.echo(f"format      version {manifest.version}")
    typer.echo(f"parameters  {len(manifest.parameters)} tensors, {count:,} elements")
    typer.echo(f"kinds       {', '.join(manifest.kinds)}")
    typer.echo(f"pieces      {len(manifest.pieces)} in {len(manifest.files)} files")
    typer.echo(f"state       {json.dumps(manifest.state, sort_keys=True)}")
    if tensors:
        lines = (f"  {name} {list(shape)}" for name, shape in manifest.parameters.items())
        typer.echo("\n".join(folded(lines)))


@app.command()
def verify(
    checkpoint: Annotated[
        str, typer.Argument(metavar="PATH", help="A checkpoint, or a run: all of its checkpoints.")
    ],
) -> None:
    """Read every byte and compare the checksums; exit code 1 when something is damaged."""
    from megascale.checkpoint.manifest import MANIFEST_NAME
    from megascale.checkpoint.reader import CheckpointReader
    from megascale.checkpoint.storage import Storage

    if Storage(checkpoint).exists(MANIFEST_NAME):
        paths = [checkpoint]
    else:
        folder = _folder(checkpoint)
        paths = [folder.path(step) for step in folder.all_steps()]
    bad = 0
    for path in paths:
        try:
            damage = CheckpointReader(path).damage()
            problem = damage and f"DAMAGED: {damage}"
        except UserError as error:  # as `list` says it: a newer version is no damage
            problem = f"NOT USABLE: {error.what}"
        bad += problem is not None
        typer.echo(f"{path}  {problem or 'intact'}")
    if bad:
        raise typer.Exit(1)


@app.command()
def diff(one: Folder, other: Folder) -> None:
    """Compare two checkpoints of any layouts, tensor by tensor; exit code 1 when they differ."""
    from megascale.checkpoint.compare import differences

    found = 0
    for line in differences(_open(one), _open(other)):
        found += 1
        typer.echo(line)
    if found:
        raise typer.Exit(1)
    typer.echo("the same tensors and the same state")


@app.command()
def reshard(
    checkpoint: Folder,
    out: Annotated[str, typer.Argument(metavar="OUT", help="A new checkpoint folder.")],
    files: Annotated[int, typer.Option(min=1, help="Number of tensor files.")] = 1,
) -> None:
    """Write a checkpoint anew in another number of files, every tensor whole in one of them.

    No resume needs this: any layout reads any other. It serves programs that read the files.
    """
    from megascale.checkpoint.reshard import reshard as rewrite

    reader = _open(checkpoint)
    reader.require_intact()
    rewrite(reader, out, files)
    typer.echo(f"{out}: step {reader.manifest.step} in {files} file(s)")


@app.command()
def prune(
    run: RunFolder,
    keep_last: Annotated[int, typer.Option(min=1, help="How many of the newest stay.")],
    keep_every: Annotated[
        int | None, typer.Option(min=1, help="Multiples of this many steps stay too.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell.")] = False,
) -> None:
    """Remove old checkpoints, never the best nor the last intact one."""
    from megascale.checkpoint.manager import Retention
    from megascale.checkpoint.reader import CheckpointReader
    from megascale.checkpoint.retention import steps_to_remove

    folder = _folder(run)
    steps = folder.steps()
    try:
        problem = CheckpointReader(folder.path(steps[-1])).damage() if steps else None
    except UserError as error:
        problem = error.what
    if problem:
        raise UserError(
            f"the newest checkpoint {folder.path(steps[-1])} is not intact: {problem}",
            rule="others are removed only while the newest one is intact",
            remedy="remove that one by hand, or use the megascale that wrote it; then prune again",
        )
    best = [step for step in steps[-1:] for step in _best(folder, step)]
    doomed = steps_to_remove(steps, keep_last, keep_every, best)
    if not dry_run:
        doomed = folder.prune(Retention(keep_last, keep_every), best)
    for step in doomed:
        typer.echo(f"{'would remove' if dry_run else 'removed'} {folder.path(step)}")


def _best(folder: CheckpointFolder, newest: int) -> list[int]:
    """The best step that the newest checkpoint knows of."""
    from megascale.checkpoint.reader import CheckpointReader

    path = folder.path(newest)
    value: Any = CheckpointReader(path).manifest.state
    for key in ("callbacks", "checkpoint", "best_step"):
        value = value.get(key) if isinstance(value, dict) else value
    if value is None:
        return []
    if type(value) is not int:
        raise UserError(
            f"{path}: callbacks.checkpoint.best_step in the manifest's state leads to {value!r}",
            rule="it is the number of the best step, which is never removed",
            remedy="remove checkpoints by hand; this manifest was not written by megascale",
        )
    return [value]


def _open(path: str) -> CheckpointReader:
    from megascale.checkpoint.reader import CheckpointReader

    return CheckpointReader(path)


def _folder(run: str) -> CheckpointFolder:
    """The checkpoints of a run: in its folder, or directly below `run`."""
    from megascale.checkpoint.manager import CheckpointFolder
    from megascale.checkpoint.storage import Storage

    inner = "checkpoints"
    found = CheckpointFolder(Storage(run).location(inner) if Storage(run).exists(inner) else run)
    if not found.all_steps():
        raise UserError(
            f"no checkpoints in {run}",
            rule="checkpoints are folders step_XXXXXXXX below a run's folder checkpoints",
            remedy="give run.output_dir or checkpoint.folder of the run",
        )
    return found
