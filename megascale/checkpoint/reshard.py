"""Writing a checkpoint anew in another number of files, a block at a time."""

from __future__ import annotations

import math
from functools import partial

import torch

from megascale.checkpoint.manifest import RNG_KEY, tensor_key
from megascale.checkpoint.reader import CheckpointReader
from megascale.checkpoint.storage import Storage
from megascale.checkpoint.tensor_file import TensorStream
from megascale.checkpoint.writer import StreamedFile, write_streamed
from megascale.errors import UserError
from megascale.parallel.fragment import whole_box


def reshard(reader: CheckpointReader, out: str, num_files: int) -> None:
    """Write `reader`'s checkpoint to the new folder `out`; each tensor whole in one file.

    Args:
        num_files: tensors are dealt to so many files of about equal size.

    Raises:
        UserError: `out` exists, or cannot be written.
    """
    parent, _, name = Storage(out).location().rstrip("/").rpartition("/")
    storage = Storage(parent or ".")
    if storage.exists(name):
        raise UserError(
            f"{out} exists", rule="a reshard overwrites nothing", remedy="choose another folder"
        )
    deck: list[StreamedFile] = [StreamedFile([], []) for _ in range(num_files)]
    filled = [0] * num_files
    parameters = reader.manifest.parameters
    for parameter in sorted(parameters, key=lambda n: (-math.prod(parameters[n]), n)):
        at = filled.index(min(filled))
        for kind in reader.manifest.kinds:
            shape = reader.state_shape(parameter, kind)
            if shape is not None:
                deck[at].tensors.append(_stream(reader, parameter, kind, shape))
                deck[at].pieces.append((parameter, kind, whole_box(shape)))
                filled[at] += deck[at].tensors[-1].bytes
    for rank, file in enumerate(deck):
        random = reader.rng_state(rank) if reader.manifest.world_size == num_files else None
        if random is not None:
            file.tensors.append(_constant(RNG_KEY, random))
    attachments = {
        entry.path: reader.attachment(entry.path)
        for entry in reader.manifest.files
        if not entry.path.endswith(".safetensors")
    }
    write_streamed(storage, name, deck, reader.manifest, attachments)


def _constant(key: str, tensor: torch.Tensor) -> TensorStream:
    return TensorStream(key, tensor.dtype, tuple(tensor.shape), lambda: (tensor,))


def _stream(reader: CheckpointReader, name: str, kind: str, shape: tuple[int, ...]) -> TensorStream:
    return TensorStream(
        tensor_key(kind, name),
        torch.float32,
        (math.prod(shape),),
        partial(reader.blocks, name, kind),
    )
