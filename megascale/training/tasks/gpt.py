"""Next-token prediction with a GPT."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn

from megascale.config.schema import Config, ModelConfig
from megascale.data.corpus import TokenCorpus
from megascale.data.fill_in_middle import FillInMiddle
from megascale.data.gpt_dataset import EvaluationDataset, GPTDataset
from megascale.data.loader import EvaluationLoader
from megascale.data.packed_dataset import PackedDataset, PackedEvaluationDataset
from megascale.data.protocol import IGNORE_LABEL
from megascale.data.statistics import ngram_entropy
from megascale.errors import UserError
from megascale.models.chunk import Chunk, keep_chunks
from megascale.models.dropout import sample_keys
from megascale.models.flops import (
    flops_per_token,
    head_flops_per_token,
    layer_flops_per_token,
)
from megascale.models.gpt import GPT, GPTConfig
from megascale.models.head import LMHead, Reduce
from megascale.models.initialization import fill_initial
from megascale.models.mlp import is_gated
from megascale.parallel.context_parallel import ContextGroup, ContextPlan, parallelize_context
from megascale.parallel.fragment import Fragment
from megascale.parallel.pipeline import StageCosts
from megascale.parallel.tensor_parallel import (
    Placement,
    Plan,
    Rule,
    TensorGroup,
    interval,
    parallelize,
)
from megascale.training.datasets import (
    Corpora,
    RunData,
    TokenRange,
    open_run_data,
    require_mode,
)
from megascale.training.losses import TokenLoss, VocabularyPart, token_loss
from megascale.training.tasks.base import performance_choices


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
        head_width=model.head_dim,
        position_embedding=model.position_embedding,
        norm=model.norm,
        norm_eps=model.norm_eps,
        norm_placement=model.norm_placement,
        norm_unit_offset=model.norm_unit_offset,
        parallel_residual=model.parallel_residual,
        activation=model.activation,
        bias=model.bias,
        qkv_bias=model.qkv_bias,
        attention_output_bias=model.attention_output_bias,
        mlp_bias=model.mlp_bias,
        qk_norm=model.qk_norm,
        query_scaling=model.query_scaling,
        attention_softcap=model.attention_softcap,
        logit_softcap=model.logit_softcap,
        sliding_window=model.sliding_window,
        global_layer_interval=model.global_layer_interval,
        scale_embeddings=model.scale_embeddings,
        dropout=model.dropout,
        attention_dropout=model.resolved_attention_dropout,
        rope_theta=model.rope_theta,
        rope_local_theta=model.rope_local_theta,
        rotary_fraction=model.rotary_fraction,
        rope_scaling=model.rope_scaling,
        rope_scaling_factor=model.rope_scaling_factor,
        rope_low_freq_factor=model.rope_low_freq_factor,
        rope_high_freq_factor=model.rope_high_freq_factor,
        rope_original_length=model.rope_original_length,
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

    objectives = ("next_token",)

    def __init__(self, config: GPTConfig, seed: int, loss: TokenLoss | None = None) -> None:
        super().__init__()
        self.seed = seed
        self.loss = loss or TokenLoss()
        self.model = GPT(config)
        self.head: LMHead | None = LMHead(
            config.hidden_size, config.vocab_size, config.tie_word_embeddings, config.logit_softcap
        )
        self._has_dropout = config.dropout > 0 or config.attention_dropout > 0

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        sample_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        chunk: Chunk | None = None,
    ) -> torch.Tensor:
        """Hidden states (B, T, D) after the final norm, or after the chunk; see `GPT.forward`."""
        keys = None
        if self.training and self._has_dropout and sample_ids is not None:
            keys = sample_keys(self.seed, sample_ids)
        return self.model(input_ids, position_ids, document_ids, keys, hidden, chunk)

    def logits(
        self,
        input_ids: torch.Tensor,
        sample_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (B, T, V) of the next token at each of the positions of input_ids (B, T), which
        may be a part of the sample; document_ids are those of the whole.
        """
        return self._head(self.hidden_states(input_ids, sample_ids, position_ids, document_ids))

    def _head(self, hidden: torch.Tensor, reduce: Reduce | None = None) -> torch.Tensor:
        assert self.head is not None
        embedding = self.model.embedding
        tied = embedding.tokens.weight if self.head.tied and embedding is not None else None
        return self.head(hidden, tied, reduce)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        sample_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        chunk: Chunk | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Sum of the losses in nats, and their number (labels of -100 do not count).

        Without labels: the logits (B, T, V), and 0. Under ZeRO-3 an engine's forward is the only
        way to them, since it is what gathers the weights. Of a chunk that is not the last: its
        hidden states; see `Task`.
        """
        states = self.hidden_states(
            input_ids, sample_ids, position_ids, document_ids, hidden, chunk
        )
        if chunk is not None and not chunk.is_last:
            return states
        if labels is None:
            logits = self._head(states)
            return self.loss.whole(logits), torch.zeros((), device=logits.device)
        if self.loss.fused:
            reduce = partial(self.loss.of_product, labels=labels, training=self.training)
            loss_sum = self._head(states, reduce)
        else:
            loss_sum = self.loss(self._head(states), labels, training=self.training)
        return loss_sum, (labels != IGNORE_LABEL).sum()


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
    if is_gated(config.activation):
        plan[f"{layer}.mlp.gate"] = Rule("column")
    if config.norm_placement == "sandwich":
        plan[f"{layer}.attention_post_norm"] = Rule("sequence")
        plan[f"{layer}.mlp_post_norm"] = Rule("sequence")
    if config.qk_norm:
        plan[f"{layer}.attention.query_norm"] = Rule("heads")
        plan[f"{layer}.attention.key_norm"] = Rule("heads")
    return plan


def gpt_context_plan() -> ContextPlan:
    """What a cut of the sequence means to a GPT; the rest looks at single tokens."""
    layer = "model.layers.*"
    return {
        "model.embedding.dropout": "drop_sequence",
        f"{layer}.attention.core": "attention",
        f"{layer}.attention_dropout": "drop_sequence",
        f"{layer}.mlp_dropout": "drop_sequence",
    }


class GPTTask:
    """Pretraining of a GPT; see `Task`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._gpt = replace(gpt_config(config.model), **performance_choices(config))

    def build_module(self) -> GPTModule:
        """See `Task.build_module`."""
        loss = token_loss(self._config)
        return GPTModule(self._gpt, self._config.run.seed, loss)

    def blocks(self, module: nn.Module) -> Sequence[nn.Module]:
        """See `Task.blocks`."""
        assert isinstance(module, GPTModule)
        return list(module.model.layers.values())

    def keep_chunks(self, module: nn.Module, chunks: Sequence[Chunk]) -> None:
        """See `Task.keep_chunks`."""
        assert isinstance(module, GPTModule)
        if not keep_chunks(module.model, chunks, tied=self._gpt.tie_word_embeddings):
            module.model.final_norm = module.head = None

    def tied_weight(self) -> str | None:
        """See `Task.tied_weight`."""
        return "model.embedding.tokens.weight" if self._gpt.tie_word_embeddings else None

    def stage_costs(self) -> StageCosts:
        """See `Task.stage_costs`."""
        length = self._config.model.seq_length
        layers = [layer_flops_per_token(self._gpt, i, length) for i in range(self._gpt.num_layers)]
        return StageCosts(tuple(layers), last=head_flops_per_token(self._gpt))

    def parallelize(self, module: nn.Module, tensor: TensorGroup) -> dict[str, Placement]:
        """See `Task.parallelize`."""
        assert isinstance(module, GPTModule)
        first_id, _ = interval(
            self._gpt.vocab_size, 1, tensor.rank, tensor.size, "model.vocab_size"
        )
        part = VocabularyPart(first_id, self._gpt.vocab_size, tensor.group)
        module.loss = replace(module.loss, part=part)
        return parallelize(module, gpt_plan(self._gpt), tensor)

    def parallelize_context(self, module: nn.Module, context: ContextGroup) -> None:
        """See `Task.parallelize_context`."""
        parallelize_context(module, gpt_context_plan(), context)

    def fill_initial(self, fragment: Fragment) -> None:
        """See `Task.fill_initial`."""
        fill_initial(
            fragment.tensor,
            fragment.name,
            fragment.global_shape,
            self._config.run.seed,
            init_std=self._gpt.init_std,
            num_layers=self._gpt.num_layers,
            box=fragment.box,
            start=fragment.start,
        )

    def open_data(self, corpora: Corpora) -> RunData:
        """See `Task.open_data`.

        Raises:
            UserError: data prepared for a BERT, or no tokens for fill-in-the-middle.
        """
        data, seed, length = self._config.data, self._config.run.seed, self._gpt.seq_length
        middle = self._fill_in_middle(corpora) if data.fim_rate else None

        def training_set(corpus: TokenCorpus, part: TokenRange) -> GPTDataset | PackedDataset:
            require_mode(corpus, "gpt")
            if data.packing == "concat":
                return GPTDataset(corpus, part, length, seed, data.isolate_documents, middle)
            return PackedDataset(
                corpus, part, length, seed, data.packing, data.isolate_documents, middle
            )

        return open_run_data(
            self._config, corpora, training_set, partial(self.evaluation_set, corpora)
        )

    def _fill_in_middle(self, corpora: Corpora) -> FillInMiddle:
        data, tokenizer = self._config.data, corpora.tokenizer
        if tokenizer is None:
            raise UserError(
                f"data.fim_rate {data.fim_rate}, but the data has no tokenizer",
                rule="the special tokens of fill-in-the-middle are the tokenizer's",
                remedy="set data.tokenizer, or data.fim_rate=0",
            )
        special = tokenizer.require_middle_tokens()
        return FillInMiddle(data.fim_rate, data.fim_spm_rate, *special, tokenizer.eod_id)

    def evaluation_set(
        self, corpora: Corpora, corpus: TokenCorpus, part: TokenRange
    ) -> EvaluationDataset | PackedEvaluationDataset:
        """See `Task.evaluation_set`."""
        require_mode(corpus, "gpt")
        data, length = self._config.data, self._gpt.seq_length
        if data.packing == "concat":
            return EvaluationDataset(corpus, part, length, data.isolate_documents)
        return PackedEvaluationDataset(corpus, part, length, data.packing, data.isolate_documents)

    def byte_lengths(self, corpora: Corpora) -> np.ndarray | None:
        """See `Task.byte_lengths`."""
        return corpora.tokenizer.byte_lengths() if corpora.tokenizer else None

    def baselines(self, corpora: Corpora, held_out: Iterable[EvaluationLoader]) -> dict[str, float]:
        """Entropies of the training part, nats a token: what tables of counts could reach."""
        corpus = corpora.corpora[0]
        train = corpus.split(self._config.data.split, minimum_tokens=2)[0]
        unigram, bigram = ngram_entropy(corpus, train)
        return {"unigram_entropy": unigram, "bigram_entropy": bigram}

    def flops_per_sample(self) -> float:
        """See `Task.flops_per_sample`."""
        length = self._config.model.seq_length
        return length * flops_per_token(self._gpt, length)
