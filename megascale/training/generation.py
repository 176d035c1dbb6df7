"""Continuing a prompt, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megascale.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only the k most likely tokens; 0 means all.
        top_p: only the smallest set of tokens with at least this probability
            (nucleus sampling, arXiv:1904.09751); 1 means all.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}",
                rule="temperature >= 0, top_k >= 0 and 0 < top_p <= 1",
                remedy="use for example --temperature 0.8 --top-p 0.95",
            )


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from the logits (V,) of the next token."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits.float() / sampling.temperature
    if sampling.top_k:
        kth = scaled.topk(min(sampling.top_k, scaled.numel())).values[-1]
        scaled = scaled.masked_fill(scaled < kth, -torch.inf)
    probabilities = scaled.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(0) - ordered
        probabilities[order[before >= sampling.top_p]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))


def generate(
    next_logits: Callable[[torch.Tensor], torch.Tensor],
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    context_length: int,
    eod_id: int | None,
    sampling: Sampling,
    seed: int,
    device: torch.device,
) -> list[int]:
    """Continue `prompt_ids` until `eod_id` or `max_new_tokens`; returns the new ids.

    Args:
        next_logits: maps ids (1, T) to the logits (V,) of the token after the last.
        context_length: longest T that the model takes; older tokens fall out of view.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    ids = list(prompt_ids)
    new: list[int] = []
    with torch.no_grad():
        while len(new) < max_new_tokens:
            window = torch.tensor([ids[-context_length:]], device=device)
            token = choose(next_logits(window), sampling, generator)
            if token == eod_id:
                break
            ids.append(token)
            new.append(token)
    return new
