"""A plain PyTorch loop: GPT-2 in a screen of code, autocast, SDPA, fused AdamW."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.bench.job import Job, job_of_command_line, run


def _dropped(x: Tensor, p: float) -> Tensor:
    return F.dropout(x, p) if p else x  # torch multiplies by ones otherwise


class _Block(nn.Module):
    def __init__(self, job: Job) -> None:
        super().__init__()
        size = job.hidden_size
        self.heads, self.dropout = job.num_heads, job.dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        attended = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=self.dropout
        )
        x = x + _dropped(self.out(attended.transpose(1, 2).flatten(2)), self.dropout)
        hidden = F.gelu(self.up(self.norm_2(x)), approximate="tanh")
        return x + _dropped(self.down(hidden), self.dropout)


class GPT(nn.Module):
    """The job's model: mean loss of a batch."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.tokens = nn.Embedding(job.vocab_size, job.hidden_size)
        self.positions = nn.Embedding(job.seq_length, job.hidden_size)
        self.blocks = nn.Sequential(*(_Block(job) for _ in range(job.num_layers)))
        self.norm, self.dropout = nn.LayerNorm(job.hidden_size), job.dropout
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                scale = (2 * job.num_layers) ** -0.5 if "out." in name or "down." in name else 1
                nn.init.normal_(parameter, std=0.02 * scale)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        x = _dropped(x, self.dropout)
        logits = F.linear(self.norm(self.blocks(x)), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main() -> None:
    """Run the job; variant "compile" compiles the model."""
    job, arguments = job_of_command_line()
    torch.manual_seed(7)
    model = GPT(job)
    optimizer = torch.optim.AdamW(
        model.parameters(), job.lr, betas=job.betas, weight_decay=job.weight_decay, fused=True
    )
    forward = torch.compile(model) if arguments.variant == "compile" else model

    def step(inputs: Tensor, targets: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=job.dtype == "bf16"):
            loss = forward(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), job.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    run(job, step)


if __name__ == "__main__":
    main()
