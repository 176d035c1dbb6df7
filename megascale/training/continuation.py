"""Prompts in, texts out, with a checkpoint's model and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megascale.errors import UserError
from megascale.training.generation import Sampling, generate
from megascale.training.inference import LoadedModel, require_tokenizer
from megascale.training.tasks.gpt import GPTModule


def continue_prompts(
    path: str,
    prompts: Sequence[str],
    device: torch.device,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    weights: str = "trained",
) -> Iterator[str]:
    """Each prompt with its continuation; the same seed gives the same text.

    An empty prompt starts from the end-of-document token, as a new document does in training.
    `weights` are those of `LoadedModel`.

    Raises:
        UserError: a model that does not predict next tokens, or a checkpoint without tokenizer.
    """
    model = LoadedModel(path, device, weights)
    module = model.module
    if not isinstance(module, GPTModule):
        raise UserError(
            f"{path} is a {model.config.model.family} model",
            rule="only models that predict the next token can continue a text",
            remedy="give the checkpoint of a gpt",
        )
    tokenizer = require_tokenizer(model)

    def next_logits(ids: torch.Tensor) -> torch.Tensor:
        return module.logits(ids)[0, -1, : tokenizer.vocab_size]

    for number, prompt in enumerate(prompts):
        ids = tokenizer.encode(prompt) or [tokenizer.eod_id]
        new = generate(
            next_logits,
            ids,
            max_new_tokens=max_new_tokens,
            context_length=model.config.model.seq_length,
            eod_id=tokenizer.eod_id,
            sampling=sampling,
            seed=seed + number,
            device=device,
        )
        yield prompt + tokenizer.decode(new)
