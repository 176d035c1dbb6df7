"""Texts that the model writes while it is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from megascale.data.atomic_files import disk_errors
from megascale.data.tokenizer import Tokenizer
from megascale.parallel.context_parallel import gather_tokens, own_tokens
from megascale.training.callbacks.base import Callback
from megascale.training.callbacks.metrics_file import keep_until_step
from megascale.training.generation import Sampling, generate
from megascale.training.state import StepResult
from megascale.training.trainer import Trainer


class SampleCallback(Callback):
    """Continues prompts at each validation: one JSON line each in `path`, and on the console.

    Under ZeRO-3 a forward pass is collective: every rank runs all of them, the same number
    whatever it draws, and rank 0 writes.

    Args:
        path: samples.jsonl.
        prompts: what is continued; the same seeds are drawn from at every step.
        tokenizer: of the model.
        max_new_tokens: length of a continuation, cut at the end of the document.
        context_length: longest sequence that the model takes.
        interval: steps between two validations; 0: only at the end.
        seed: of the first prompt; the others follow it.
        multiple: the model takes lengths that are multiples of it (where the sequence is cut).
    """

    name = "samples"

    def __init__(
        self,
        path: Path,
        prompts: Sequence[str],
        tokenizer: Tokenizer,
        *,
        max_new_tokens: int,
        context_length: int,
        interval: int,
        seed: int,
        multiple: int = 1,
    ) -> None:
        self._path = path
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._context_length = context_length
        self._interval = interval
        self._seed = seed
        self._multiple = multiple
        self._last_step = -1

    def on_fit_start(self, trainer: Trainer) -> None:
        """Drop the texts after the step that the run resumes from."""
        if trainer.parts.mesh.is_main:
            with disk_errors(self._path):
                keep_until_step(self._path, trainer.state.step)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Every `interval` steps."""
        if self._interval and result.step % self._interval == 0:
            self._write(trainer)

    def on_fit_end(self, trainer: Trainer) -> None:
        """At the end, unless the last step has its texts already."""
        if self._last_step != trainer.state.step:
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        step = self._last_step = trainer.state.step
        with trainer.parts.engine.evaluating():
            texts = [self._continue(trainer, i, text) for i, text in enumerate(self._prompts)]
        if not trainer.parts.mesh.is_main:
            return
        with disk_errors(self._path), open(self._path, "a", encoding="utf-8") as stream:
            for prompt, text in zip(self._prompts, texts, strict=True):
                line = {"step": step, "prompt": prompt, "continuation": text}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                trainer.say(f"step {step:>6}  sample: {prompt!r} -> {text!r}")

    def _continue(self, trainer: Trainer, number: int, prompt: str) -> str:
        tokenizer, parts, mesh = self._tokenizer, trainer.parts, trainer.parts.mesh

        def next_logits(ids: torch.Tensor) -> torch.Tensor:
            length = ids.shape[1]
            padded = F.pad(ids, (0, -length % self._multiple))  # causal: nobody looks ahead
            own = own_tokens({"input_ids": padded}, mesh.cp_rank, mesh.cp_size)
            logits = gather_tokens(parts.engine.forward([own])[0][0], mesh.cp_group)
            return logits[0, length - 1, : tokenizer.vocab_size]

        new = generate(
            next_logits,
            tokenizer.encode(prompt) or [tokenizer.eod_id],
            max_new_tokens=self._max_new_tokens,
            context_length=self._context_length,
            eod_id=None,  # ranks must not stop at different tokens
            sampling=Sampling(),
            seed=self._seed + number,
            device=parts.device,
        )
        end = new.index(tokenizer.eod_id) if tokenizer.eod_id in new else len(new)
        return tokenizer.decode(new[:end])
