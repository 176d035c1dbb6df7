"""litgpt's GPT in the step of its pretraining: Fabric, chunked cross-entropy (needs litgpt).

Its models have rotary positions where the job's has learned ones; both cost next to nothing.
"""

from __future__ import annotations

import contextlib
import sys

import torch
from torch import Tensor, nn

from tools.bench.job import Job, job_of_command_line, run


def model_of(job: Job) -> nn.Module:
    """The job's model as litgpt builds it, with the head tied to the embedding."""
    from litgpt import GPT, Config

    if job.dropout:
        raise SystemExit("litgpt's models have no dropout")
    config = Config(
        name="job",
        block_size=job.seq_length,
        vocab_size=job.vocab_size,
        padded_vocab_size=job.vocab_size,
        n_layer=job.num_layers,
        n_head=job.num_heads,
        n_embd=job.hidden_size,
        rotary_percentage=1.0,
        bias=True,
        norm_class_name="LayerNorm",
        mlp_class_name="GptNeoxMLP",
        gelu_approximate="tanh",
        intermediate_size=4 * job.hidden_size,
        parallel_residual=False,
    )
    model = GPT(config)
    model.transformer.wte.weight = model.lm_head.weight
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    return model


def main() -> None:
    """Run the job; variant "compile" compiles the model."""
    job, arguments = job_of_command_line()
    with contextlib.redirect_stdout(sys.stderr):
        import lightning
        from litgpt.utils import chunked_cross_entropy, instantiate_torch_optimizer

        precision = "bf16-mixed" if job.dtype == "bf16" else "32-true"
        fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
        torch.manual_seed(7)
        model = model_of(job)
        model = fabric.setup(torch.compile(model) if arguments.variant == "compile" else model)
        optimizer = fabric.setup_optimizers(
            instantiate_torch_optimizer(
                "AdamW",
                model.parameters(),
                lr=job.lr,
                weight_decay=job.weight_decay,
                betas=job.betas,
            )
        )

    def step(inputs: Tensor, targets: Tensor) -> float:
        loss = chunked_cross_entropy(model(inputs), targets)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=job.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    run(job, step)


if __name__ == "__main__":
    main()
