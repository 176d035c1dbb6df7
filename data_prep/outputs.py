"""The rule for an output folder that exists already."""

from __future__ import annotations

from pathlib import Path

from megascale.data.places import is_remote, open_binary, remote_errors
from megascale.errors import UserError

RUN_NAME = ".run.json"
"""Identity of an unfinished run; in an object store it lies in the output itself."""
_FORMATS = {
    "report.json": "megascale-report",
    "manifest.json": "megascale-dataset",
    "recipe.json": "megascale-tokenizer",
}
_HEAD_BYTES = 256  # where our files name their format and step; the rest may be damaged


def check_output_folder(path: Path, marker: str, overwrite: bool, step: str = "") -> None:
    """Refuse an output path that may not be written.

    Args:
        path: the output folder.
        marker, step: see `may_replace`.
        overwrite: whether such an output may be replaced. Other folders never are.

    Raises:
        UserError: it is a file, or a non-empty folder that may not be replaced.
    """
    with remote_errors(path):
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
        if is_remote(path) and not (path / marker).is_file() and (path / RUN_NAME).is_file():
            return
    if may_replace(path, marker, step) and overwrite:
        return
    if may_replace(path, marker, step):
        raise UserError(
            f"--output {path} exists and was made from other input or with other options",
            rule="finished output is not replaced without being asked",
            remedy="add --overwrite, or choose another --output",
        )
    raise UserError(
        f"--output {path} exists and is not an output of this command (no {marker} of it in there)",
        rule="only a folder that this command wrote is ever replaced",
        remedy="choose another --output, or remove it yourself",
    )


def may_replace(path: Path, marker: str, step: str = "") -> bool:
    """Whether `path` is an output of ours.

    Args:
        path: the folder.
        marker: the file that tells: report.json, manifest.json or recipe.json of our formats.
            Other programs write files of these names, and our checkpoints a manifest.json.
        step: of a report.json, the step that wrote it; "": any.
    """
    try:
        with open_binary(path / marker) as file:
            head = file.read(_HEAD_BYTES).decode("utf-8", "replace")
    except OSError:
        return False
    of_step = marker != "report.json" or not step or f'"step": "{step}"' in head
    return f'"format": "{_FORMATS[marker]}"' in head and of_step
