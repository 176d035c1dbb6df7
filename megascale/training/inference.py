"""A trained model from its checkpoint, for evaluation and generation, in any layout's files."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from torch import nn

from megascale.checkpoint.manager import CheckpointManager
from megascale.checkpoint.reader import CheckpointReader
from megascale.config.load import load_config
from megascale.config.schema import Config
from megascale.data.tokenizer import Tokenizer, load_tokenizer
from megascale.errors import UserError
from megascale.parallel.fragment import Fragment, whole_box
from megascale.training.callbacks.average import EMA_KIND
from megascale.training.tasks.base import Task
from megascale.training.tasks.registry import build_task


class LoadedModel:
    """A checkpoint's model, whole, on one device; read-only.

    Offers the part of the engine protocol that `evaluate` needs.

    Args:
        path: a checkpoint folder (step_XXXXXXXX).
        device: where to put the weights (fp32).
        weights: "trained"; "ema", the moving average of a run with train.ema_decay; or "last-K",
            the mean over this and the K - 1 checkpoints of the run before it.

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
        kind, readers = _sources(self.reader, weights)
        for reader in readers:
            self._add(reader, kind, 1.0 / len(readers))
            reader.close()
        self.module.eval()
        self.tokenizer = checkpoint_tokenizer(self.reader)

    def forward(self, micro_batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """See `Evaluable.forward`."""
        return self.module(**micro_batch)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context without gradients."""
        with torch.no_grad():
            yield

    def _add(self, reader: CheckpointReader, kind: str, share: float) -> None:
        """Add `share` times the checkpoint's weights to the module's (replace them if 1)."""
        shapes = {name: tuple(p.shape) for name, p in self.module.named_parameters()}
        reader.check_parameters(shapes, (kind,))
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                flat = parameter.detach().view(-1)
                part = flat if share == 1 else torch.empty_like(flat)
                box = whole_box(shapes[name])
                reader.fill(Fragment(name, kind, shapes[name], box, 0, part))
                if share != 1:
                    flat.copy_(part * share if reader is self.reader else flat + part * share)


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


def _sources(reader: CheckpointReader, weights: str) -> tuple[str, list[CheckpointReader]]:
    """The kind of state to read, and the checkpoints to average it over, `reader` first."""
    if weights == "trained":
        return "master", [reader]
    if weights == EMA_KIND and EMA_KIND in reader.manifest.kinds:
        return EMA_KIND, [reader]
    if weights == EMA_KIND:
        raise UserError(
            f"--weights ema: checkpoint {reader.storage.root} has no average of the weights",
            rule=f"it holds {', '.join(reader.manifest.kinds)}",
            remedy="train with train.ema_decay, or use --weights trained or last-K",
        )
    match = re.fullmatch(r"last-([1-9]\d{0,3})", weights)
    if match is None:
        raise UserError(
            f"--weights {weights}",
            rule="weights are trained, ema or last-K with K from 1 on",
            remedy="for example --weights last-3",
        )
    return "master", [reader, *_checkpoints_before(reader, int(match.group(1)) - 1)]


def _checkpoints_before(reader: CheckpointReader, count: int) -> list[CheckpointReader]:
    root = reader.storage.root.rstrip("/").rpartition("/")[0]
    manager = CheckpointManager(root or ".")
    steps = [step for step in manager.steps() if step < reader.manifest.step]
    if len(steps) < count:
        raise UserError(
            f"--weights last-{count + 1}: {len(steps)} checkpoints before step "
            f"{reader.manifest.step} in {root}",
            rule=f"the average over {count + 1} checkpoints needs {count} before this one",
            remedy="average fewer, or keep more with checkpoint.keep_last",
        )
    readers = [CheckpointReader(manager.path(step)) for step in steps[len(steps) - count :]]
    for other in readers:
        other.require_intact()
    return readers


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
