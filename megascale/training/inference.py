"""A trained model from its checkpoint, for evaluation and generation, in any layout's files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from torch import nn

from megascale.checkpoint.reader import CheckpointReader
from megascale.checkpoint.weights import WeightSource
from megascale.config.load import load_config
from megascale.config.schema import Config
from megascale.data.tokenizer import Tokenizer, load_tokenizer
from megascale.errors import UserError
from megascale.training.tasks.base import Task
from megascale.training.tasks.registry import build_task


class LoadedModel:
    """A checkpoint's model, whole, on one device; read-only.

    Offers the part of the engine protocol that `evaluate` needs.

    Args:
        path: a checkpoint folder (step_XXXXXXXX).
        device: where to put the weights (fp32).
        weights: which of the checkpoint's weights; see `WeightSource`.

    Raises:
        UserError: not a complete checkpoint, a damaged one (all checksums are compared), or no
            such weights.
    """

    def __init__(self, path: str, device: torch.device, weights: str = "trained") -> None:
        self.reader = CheckpointReader(path)
        self.reader.require_intact()
        self.step = self.reader.manifest.step
        self.config: Config = load_config(yaml.safe_load(self.reader.attachment("config.yaml")))
        self.task: Task = build_task(self.config)
        with torch.device("meta"):
            module = self.task.build_module()
        self.module: nn.Module = module.to_empty(device=device)
        source = WeightSource(self.reader, weights)
        self._fill(source)
        source.close()
        self.module.eval()
        self.tokenizer = checkpoint_tokenizer(self.reader)

    def forward(
        self, micro_batches: Sequence[Mapping[str, torch.Tensor]]
    ) -> list[tuple[torch.Tensor, ...]]:
        """See `Evaluable.forward`."""
        return [self.module(**micro_batch) for micro_batch in micro_batches]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context without gradients."""
        with torch.no_grad():
            yield

    def _fill(self, source: WeightSource) -> None:
        shapes = {name: tuple(p.shape) for name, p in self.module.named_parameters()}
        source.check_parameters(shapes)
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                source.fill(name, shapes[name], 0, parameter.detach().view(-1))


def checkpoint_tokenizer(reader: CheckpointReader) -> Tokenizer | None:
    """The tokenizer stored in a checkpoint; None when there is none."""
    files = [f.path for f in reader.manifest.files if f.path.startswith("tokenizer/")]
    if not files:
        return None
    with tempfile.TemporaryDirectory() as folder:
        for path in files:
            target = Path(folder) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(reader.attachment(path))
        return load_tokenizer(Path(folder) / "tokenizer")


def require_tokenizer(model: LoadedModel) -> Tokenizer:
    """The model's tokenizer.

    Raises:
        UserError: the checkpoint has none (trained on a Megatron prefix without data.tokenizer).
    """
    if model.tokenizer is None:
        raise UserError(
            f"checkpoint {model.reader.storage.root} has no tokenizer",
            rule="text can only be read and written with the tokenizer of the training data",
            remedy="train with data.tokenizer set, or on a dataset that data_prep wrote",
        )
    return model.tokenizer
