"""Next-token prediction with a GPT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from megascale.config.schema import Config, ModelConfig
from megascale.models.dropout import sample_keys
from megascale.models.flops import flops_per_token
from megascale.models.gpt import GPT, GPTConfig
from megascale.models.head import LMHead
from megascale.models.initialization import initialize
from megascale.parallel.tensor_parallel import (
    Placement,
    Plan,
    Rule,
    TensorGroup,
    interval,
    parallelize,
)
from megascale.training.datasets import Corpora, RunData, open_gpt_data
from megascale.training.losses import TokenLoss, VocabularyPart

IGNORE = -100


def gpt_config(model: ModelConfig) -> GPTConfig:
    """The model's own small config from the run's (whose vocab_size is resolved)."""
    assert model.vocab_size is not None
    return GPTConfig(
        vocab_size=model.vocab_size,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_kv_heads=model.resolved_num_kv_heads,
        ffn_hidden_size=model.resolved_ffn_hidden_size,
        seq_length=model.seq_length,
        position_embedding=model.position_embedding,
        norm=model.norm,
        norm_eps=model.norm_eps,
        activation=model.activation,
        bias=model.bias,
        dropout=model.dropout,
        attention_dropout=model.resolved_attention_dropout,
        rope_theta=model.rope_theta,
        init_std=model.init_std,
        tie_word_embeddings=model.tie_word_embeddings,
    )


class GPTModule(nn.Module):
    """GPT with its head and its loss.

    Args:
        config: the model.
        seed: the run's seed, from which dropout masks follow.
        loss: what is minimised.
    """

    def __init__(self, config: GPTConfig, seed: int, loss: TokenLoss | None = None) -> None:
        super().__init__()
        self.seed = seed
        self.loss = loss or TokenLoss()
        self.model = GPT(config)
        self.head = LMHead(config.hidden_size, config.vocab_size, config.tie_word_embeddings)
        self._has_dropout = config.dropout > 0 or config.attention_dropout > 0

    def logits(
        self,
        input_ids: torch.Tensor,
        sample_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (B, T, V) of the next token at each of the positions of input_ids (B, T)."""
        keys = None
        if self.training and self._has_dropout and sample_ids is not None:
            keys = sample_keys(self.seed, sample_ids)
        hidden = self.model(input_ids, position_ids, document_ids, keys)
        embedding = self.model.embedding
        tied = embedding.tokens.weight if self.head.tied and embedding is not None else None
        return self.head(hidden, tied)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        sample_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the losses in nats, and their number (labels of -100 do not count).

        Without labels: the logits (B, T, V), and 0. Under ZeRO-3 an engine's forward is the only
        way to them, since it is what gathers the weights.
        """
        logits = self.logits(input_ids, sample_ids, position_ids, document_ids)
        if labels is None:
            return self.loss.whole(logits), torch.zeros((), device=logits.device)
        loss_sum = self.loss(logits, labels, training=self.training)
        return loss_sum, (labels != IGNORE).sum()


def gpt_plan(config: GPTConfig) -> Plan:
    """How a GPT is cut (arXiv:1909.08053, arXiv:2205.05198); heads stay whole."""
    layer = "model.layers.*"
    head = Rule("column", unit=config.head_dim)
    plan = {
        "model.embedding.tokens": Rule("vocab"),
        "model.embedding.dropout": Rule("drop_sequence"),
        f"{layer}.attention_norm": Rule("sequence"),
        f"{layer}.attention.query": head,
        f"{layer}.attention.key": head,
        f"{layer}.attention.value": head,
        f"{layer}.attention.core.dropout": Rule("drop_heads"),
        f"{layer}.attention.output": Rule("row", unit=config.head_dim),
        f"{layer}.attention_dropout": Rule("drop_sequence"),
        f"{layer}.mlp_norm": Rule("sequence"),
        f"{layer}.mlp.up": Rule("column"),
        f"{layer}.mlp.down": Rule("row"),
        f"{layer}.mlp_dropout": Rule("drop_sequence"),
        "model.final_norm": Rule("sequence"),
        "head": Rule("head"),
    }
    if config.position_embedding == "learned":
        plan["model.embedding.positions"] = Rule("positions")
    if config.activation == "swiglu":
        plan[f"{layer}.mlp.gate"] = Rule("column")
    return plan


class GPTTask:
    """Pretraining of a GPT; see `Task`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._gpt = gpt_config(config.model)

    def build_module(self) -> GPTModule:
        """See `Task.build_module`."""
        train = self._config.train
        loss = TokenLoss(train.label_smoothing, train.z_loss)
        return GPTModule(self._gpt, self._config.run.seed, loss)

    def blocks(self, module: nn.Module) -> Sequence[nn.Module]:
        """See `Task.blocks`."""
        assert isinstance(module, GPTModule)
        return list(module.model.layers.values())

    def parallelize(self, module: nn.Module, tensor: TensorGroup) -> dict[str, Placement]:
        """See `Task.parallelize`."""
        assert isinstance(module, GPTModule)
        first_id, _ = interval(
            self._gpt.vocab_size, 1, tensor.rank, tensor.size, "model.vocab_size"
        )
        part = VocabularyPart(first_id, self._gpt.vocab_size, tensor.group)
        module.loss = replace(module.loss, part=part)
        return parallelize(module, gpt_plan(self._gpt), tensor)

    def initialize(self, module: nn.Module, placements: Mapping[str, Placement]) -> None:
        """See `Task.initialize`."""
        initialize(
            module,
            self._config.run.seed,
            init_std=self._gpt.init_std,
            num_layers=self._gpt.num_layers,
            parts={name: (p.global_shape, p.box) for name, p in placements.items()},
        )

    def open_data(self, corpora: Corpora) -> RunData:
        """See `Task.open_data`."""
        return open_gpt_data(self._config, corpora)

    def flops_per_sample(self) -> float:
        """See `Task.flops_per_sample`."""
        length = self._config.model.seq_length
        return length * flops_per_token(self._gpt, length)

    def tokens_per_sample(self) -> int:
        """See `Task.tokens_per_sample`."""
        return self._config.model.seq_length
