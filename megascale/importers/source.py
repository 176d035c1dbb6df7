"""Tensors that lie in parts in several files, seen as the weights of one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megascale.hf.source import BLOCK_ELEMENTS


class Held(Protocol):
    """A tensor that is not in memory yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""
        ...

    def read(self) -> Tensor:
        """The whole tensor."""
        ...

    def blocks(self) -> Iterator[Tensor]:
        """The elements in order, a block at a time."""
        ...


@dataclass(frozen=True)
class Made:
    """A tensor that is put together as a whole.

    Attributes:
        make: gives it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    def read(self) -> Tensor:
        """See `Held.read`."""
        return self.make()

    def blocks(self) -> Iterator[Tensor]:
        """See `Held.blocks`."""
        yield from self.make().reshape(-1).split(BLOCK_ELEMENTS)


@dataclass(frozen=True)
class Parts:
    """One tensor: its shape, and 1-D views that joined are its elements in row-major order."""

    shape: tuple[int, ...]
    views: Sequence[Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""
        return self.views[0].dtype

    def read(self) -> Tensor:
        """See `Held.read`."""
        return torch.cat(list(self.views)).view(self.shape)

    def blocks(self) -> Iterator[Tensor]:
        """See `Held.blocks`."""
        for view in self.views:
            yield from view.split(BLOCK_ELEMENTS)


@dataclass(frozen=True)
class Found:
    """A checkpoint of another program.

    Attributes:
        program: its name. where: the checkpoint's folder.
        step: steps done, skipped ones included. updates: the optimizer's count of them; 0 where
            it comes without moments.
        kinds: kind of our format -> tensors by the program's names; "master" is always there.
        settings: what the program was told, for the report.
        lost: what was saved and is not taken over, for people.
    """

    program: str
    where: str
    step: int
    updates: int
    kinds: Mapping[str, Mapping[str, Held]]
    settings: Mapping[str, Any]
    lost: tuple[str, ...]


@dataclass
class PartsSource:
    """A `TensorSource` (megascale/hf/source.py) over tensors in parts.

    Attributes:
        where: for errors.
        config: of the model, as its family reads it.
        tensors: by the names of the program that saved them.
        tokenizer: files by name.
    """

    where: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Held]
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)

    def names(self) -> list[str]:
        """See `TensorSource.names`."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorSource.shape`."""
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """See `TensorSource.dtype`."""
        return self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """See `TensorSource.read`."""
        return self.tensors[name].read()

    def blocks(self, name: str) -> Iterator[Tensor]:
        """See `TensorSource.blocks`."""
        return self.tensors[name].blocks()

    def tokenizer_files(self) -> dict[str, bytes]:
        """See `TensorSource.tokenizer_files`."""
        return dict(self.tokenizer)

    def close(self) -> None:
        """See `TensorSource.close`; the files close with their tensors."""
