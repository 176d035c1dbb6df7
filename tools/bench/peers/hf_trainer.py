"""transformers' Trainer on its GPT-2 or BERT (needs accelerate)."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tools.bench.job import Job, Meter, job_of_command_line


def model_of(job: Job) -> PreTrainedModel:
    """The job's model as transformers builds it."""
    if job.model == "bert":
        return BertForMaskedLM(
            BertConfig(
                vocab_size=job.vocab_size,
                max_position_embeddings=job.seq_length,
                hidden_size=job.hidden_size,
                num_hidden_layers=job.num_layers,
                num_attention_heads=job.num_heads,
                intermediate_size=4 * job.hidden_size,
                hidden_dropout_prob=job.dropout,
                attention_probs_dropout_prob=job.dropout,
            )
        )
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=job.vocab_size,
            n_positions=job.seq_length,
            n_embd=job.hidden_size,
            n_layer=job.num_layers,
            n_head=job.num_heads,
            resid_pdrop=job.dropout,
            embd_pdrop=job.dropout,
            attn_pdrop=job.dropout,
            use_cache=False,
        )
    )


class _Rows(torch.utils.data.Dataset):
    """The job's rows; the model shifts the labels of a GPT itself."""

    def __init__(self, job: Job) -> None:
        steps = range(job.warmup + job.steps)
        if job.model == "bert":
            batches = [job.masked_batch(index) for index in steps]
        else:
            batches = [(job.batch(index)[0],) * 2 for index in steps]
        self._rows, self._labels = (torch.cat(parts) for parts in zip(*batches, strict=True))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._rows[index], "labels": self._labels[index]}


class _Clock(TrainerCallback):
    """Tells the meter where a step begins and ends."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._meter.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._meter.end(float("nan"))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._meter.set_loss(state.global_step - 1, float(logs["loss"]))


def main() -> None:
    """Run the job; variant "compile" uses torch.compile."""
    job, arguments = job_of_command_line()
    meter = Meter(job)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        settings = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            bf16=job.dtype == "bf16",
            per_device_train_batch_size=job.micro_batch_size,
            max_steps=job.warmup + job.steps,
            max_grad_norm=job.grad_clip,
            learning_rate=job.lr,
            weight_decay=job.weight_decay,
            adam_beta1=job.betas[0],
            adam_beta2=job.betas[1],
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            torch_compile=arguments.variant == "compile",
            dataloader_num_workers=0,
        )
        Trainer(
            model=model_of(job),
            args=settings,
            train_dataset=_Rows(job),
            callbacks=[_Clock(meter)],
        ).train()
    meter.report()


if __name__ == "__main__":
    main()
