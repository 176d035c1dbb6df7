"""A new run that starts from the weights of a checkpoint, and its moments where they are wanted.

The checkpoint may be an import from Hugging Face or one of another run; it is read by fragments,
so that any engine and ZeRO stage takes it.
"""

from __future__ import annotations

import torch

from megascale.checkpoint.manager import open_intact
from megascale.checkpoint.ranks import make_ranks
from megascale.checkpoint.reader import CheckpointReader
from megascale.checkpoint.sharing import fill_all
from megascale.data.tokenizer import Tokenizer
from megascale.engine.protocol import Engine
from megascale.errors import UserError
from megascale.training.inference import checkpoint_tokenizer
from megascale.training.tasks.base import Task


def open_initial_weights(path: str, task: Task, tokenizer: Tokenizer | None) -> CheckpointReader:
    """Open the checkpoint `checkpoint.init_from` and check that it fits the run; collective.

    Args:
        path: the checkpoint's folder.
        task: of the run; its module's parameters must be those of the checkpoint.
        tokenizer: of the run's data; None when it has none.

    Raises:
        UserError: damaged, parameters of other names or shapes (all are listed), or weights that
            were trained on the ids of another tokenizer.
    """
    reader = open_intact(path)
    with torch.device("meta"):
        module = task.build_module()
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    reader.check_parameters(shapes, ("master",))
    known = checkpoint_tokenizer(reader)
    if known is not None and tokenizer is not None and known.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"the data's tokenizer is {tokenizer.fingerprint}",
            rule=f"checkpoint.init_from={path} was trained with {known.fingerprint}: to its "
            "weights the same ids mean other tokens",
            remedy=f"tokenise the text with the tokenizer in {path}/tokenizer",
        )
    return reader


def load_initial_weights(
    reader: CheckpointReader, engine: Engine, with_optimizer: bool = False
) -> int:
    """Fill the engine's weights from `reader` and close it; returns the updates they have seen.

    Args:
        with_optimizer: whether the moments are taken, too, and the optimizer counts on from their
            updates; without it the optimizer's state stays fresh, and 0 is returned.

    Raises:
        UserError: moments are wanted that the checkpoint does not hold.
    """
    kinds: tuple[str, ...] = ("master",)
    updates = 0
    if with_optimizer:
        kinds, updates = engine.state_kinds, _updates(reader, engine)
    with torch.no_grad():
        wanted = [fragment for fragment in engine.prepare_load(updates) if fragment.kind in kinds]
        fill_all(reader, wanted, make_ranks())
    engine.finish_load()
    reader.close()
    return updates


def _updates(reader: CheckpointReader, engine: Engine) -> int:
    """How many updates the moments in a checkpoint have seen, of a run or of an import."""
    state = reader.manifest.state
    updates = int(state.get("train", state).get("updates", 0))
    missing = [kind for kind in engine.state_kinds if kind not in reader.manifest.kinds]
    if missing or not updates:
        what = f"has no {', '.join(missing)}" if missing else "was taken before the first update"
        raise UserError(
            f"checkpoint.init_optimizer: {reader.storage.root} {what}",
            rule=f"this run's optimizer keeps {', '.join(engine.state_kinds[1:])}",
            remedy="set checkpoint.init_optimizer=false to begin with fresh moments, or use the "
            "optimizer that the checkpoint was trained with",
        )
    return updates
