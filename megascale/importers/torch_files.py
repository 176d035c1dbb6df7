"""Files of torch.save, read without running anything that they ask for.

This is the one module that may call torch.load, and only with weights_only=True: then the file's
pickle may name tensors, containers and numbers, and nothing else. Classes that a format is known to
write beside its tensors are replaced by `StandIn`, which keeps what it is given and does nothing.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megascale.errors import UserError

_REWRITE = (
    "where you trust the file, write it once more without these objects, on a machine that may run "
    'its code:\n    python -c "import torch; from torch.utils._pytree import tree_map; '
    "p = '{path}'; s = torch.load(p, map_location='cpu', weights_only=False); "
    "plain = (torch.Tensor, int, float, str, bool, type(None), torch.dtype); "
    'torch.save(tree_map(lambda x: x if isinstance(x, plain) else str(x), s), p)"'
)


class StandIn:
    """In place of an object of another program's class.

    Attributes:
        args: what its constructor would have got.
        state: what its attributes would have been set from; None without any.
    """

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> StandIn:
        """An inert object; nothing of the class that it stands for is looked up."""
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __init__(self, *args: Any) -> None:
        """Nothing is left to do."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


def load_file(
    path: Path, stand_ins: Sequence[str] = (), package: str | None = None
) -> dict[str, Any]:
    """The dictionary in a file of torch.save; tensors stay in the file until they are read.

    Args:
        stand_ins: full names of classes and functions in place of which a `StandIn` is made.
        package: the program whose classes all get a `StandIn`, whatever their names.

    Raises:
        UserError: the file needs code (each class is named), is damaged, or holds no dictionary.
    """
    if package is not None:
        named = _named_code(path, None)
        stand_ins = [*stand_ins, *(name for name in named if name.startswith(f"{package}."))]
    with _nothing_but(stand_ins):
        try:
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
        except OSError as error:
            raise UserError(
                f"{path} cannot be read: {error.strerror or error}",
                rule="every file of the checkpoint is read",
                remedy="check the path and its permissions",
            ) from error
        except Exception as error:  # a damaged pickle can fail in any way
            raise _refusal(path, error) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a {type(content).__name__}",
            rule="a checkpoint's file holds a dictionary",
            remedy="give the folder that the other program saved",
        )
    return content


@contextmanager
def _nothing_but(stand_ins: Sequence[str]) -> Iterator[None]:
    """Only torch's own safe names and stand-ins: what other packages have allowed is put aside."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([(StandIn, name) for name in stand_ins])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


def _refusal(path: Path, error: Exception) -> UserError:
    names = _named_code(path, error)
    if not names:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return UserError(
            f"{path} is no intact file of torch.save: {first[:200]}",
            rule="tensors, containers, numbers and texts are read, by weights_only loading",
            remedy="copy the file again",
        )
    return UserError(
        f"{path} needs code to be read: it holds {', '.join(names)}",
        rule="nothing that a file names is run; tensors, containers, numbers and texts are read",
        remedy=_REWRITE.format(path=path),
    )


def _named_code(path: Path, error: Exception | None) -> list[str]:
    """The classes and functions that a file asks for beyond what is safe; none is looked up."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the format before zip files, or damage
        names = re.findall(r"GLOBAL (\S+)", str(error))
    return sorted(set(names))
