"""The rule for an output folder that exists already."""

from __future__ import annotations

from pathlib import Path

from megascale.errors import UserError


def check_output_folder(path: Path, marker: str, overwrite: bool) -> None:
    """Refuse an output path that may not be written.

    Args:
        path: the output folder.
        marker: a file that only our own output of this kind holds.
        overwrite: whether such an output may be replaced. Other folders never are.

    Raises:
        UserError: it is a file, or a non-empty folder that may not be replaced.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if may_replace(path, marker) and overwrite:
        return
    if may_replace(path, marker):
        raise UserError(
            f"--output {path} exists and was made from other input or with other options",
            rule="finished output is not replaced without being asked",
            remedy="add --overwrite, or choose another --output",
        )
    raise UserError(
        f"--output {path} exists and is not an output of this command (no {marker} in it)",
        rule="only a folder that this command wrote is ever replaced",
        remedy="choose another --output, or remove it yourself",
    )


def may_replace(path: Path, marker: str) -> bool:
    """Whether `path` is an output of ours."""
    return (path / marker).is_file()
