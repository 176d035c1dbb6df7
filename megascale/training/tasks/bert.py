"""Masked language modelling with a BERT, with or without a sentence objective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn

from megascale.config.schema import Config, ModelConfig
from megascale.data.bert_dataset import BERTDataset, BERTEvaluationDataset, SampleForm
from megascale.data.bert_masking import MaskedVocabulary, Masking
from megascale.data.corpus import TokenCorpus
from megascale.data.loader import EvaluationLoader
from megascale.data.protocol import IGNORE_LABEL
from megascale.data.statistics import most_frequent_token
from megascale.errors import UserError
from megascale.models.bert import BERT, BERTConfig
from megascale.models.bert_heads import MaskedLMHead, SentenceHead
from megascale.models.chunk import Chunk, keep_chunks
from megascale.models.dropout import sample_keys
from megascale.models.flops import (
    bert_flops_per_token,
    bert_head_flops_per_token,
    bert_layer_flops_per_token,
)
from megascale.models.head import Reduce
from megascale.models.initialization import fill_initial
from megascale.parallel.context_parallel import ContextGroup, ContextPlan, parallelize_context
from megascale.parallel.cross_entropy import vocab_parallel_argmax
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


def bert_config(model: ModelConfig) -> BERTConfig:
    """The model's own small config from the run's (whose vocab_size is resolved)."""
    assert model.vocab_size is not None
    # others are refused by config.bert_checks
    assert model.activation == "gelu" or model.activation == "gelu_tanh"
    return BERTConfig(
        vocab_size=model.vocab_size,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=model.resolved_ffn_hidden_size,
        seq_length=model.seq_length,
        num_token_types=model.num_token_types,
        norm_eps=model.norm_eps,
        activation=model.activation,
        dropout=model.dropout,
        attention_dropout=model.resolved_attention_dropout,
        init_std=model.init_std,
    )


class BERTModule(nn.Module):
    """BERT with its heads and its losses.

    Args:
        config: the model.
        seed: the run's seed, from which dropout masks follow.
        sentence_objective: "nsp" or "sop" add pooler and classifier; "none" does not.
        loss: of the masked tokens.
    """

    def __init__(
        self,
        config: BERTConfig,
        seed: int,
        sentence_objective: str,
        loss: TokenLoss | None = None,
    ) -> None:
        super().__init__()
        self.seed = seed
        self.model = BERT(config)
        self.encoded = nn.Identity()  # what the heads see; a plan may gather it here
        self.head: MaskedLMHead | None = MaskedLMHead(config)
        self.sentence_head: SentenceHead | None = None
        self.objectives: tuple[str, ...] = ("masked_lm",)
        if sentence_objective != "none":
            self.sentence_head = SentenceHead(config)
            self.objectives += (sentence_objective,)
        self.loss = loss or TokenLoss()
        self.most_likely: Callable[[torch.Tensor], torch.Tensor] = _argmax
        self._has_dropout = config.dropout > 0 or config.attention_dropout > 0

    def logits(
        self,
        input_ids: torch.Tensor,
        token_type_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        sample_ids: torch.Tensor | None = None,
        chosen: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of tokens and of the sentence objective.

        Args:
            input_ids, token_type_ids: (B, T), or a part of the sample.
            attention_mask: (B, T) of the whole sample.
            sample_ids: (B,) global sample numbers; needed in training with dropout.
            chosen: (B, T) bool, the M positions whose tokens are wanted; None: all.
            position_ids: (B or 1, T); to be given for a part of the sample.

        Returns:
            (M, V), or (B, T, V) without `chosen`; and (B, 2), or None without that objective.
        """
        hidden = self.hidden_states(
            input_ids, token_type_ids, attention_mask, sample_ids, position_ids
        )
        return self._heads(hidden, chosen)

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        token_type_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        sample_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        chunk: Chunk | None = None,
    ) -> torch.Tensor:
        """Hidden states (B, T, D) after the last layer, or the chunk's; see `BERT.forward`."""
        keys = None
        if self.training and self._has_dropout and sample_ids is not None:
            keys = sample_keys(self.seed, sample_ids)
        return self.model(
            input_ids,
            token_type_ids,
            attention_mask,
            position_ids,
            dropout_keys=keys,
            hidden=hidden,
            chunk=chunk,
        )

    def _heads(
        self,
        hidden: torch.Tensor,
        chosen: torch.Tensor | None,
        reduce: Reduce | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `logits` returns, from the hidden states (B, T, D); of tokens, or what `reduce`
        makes of their logits.
        """
        hidden = self.encoded(hidden)
        sentence = None if self.sentence_head is None else self.sentence_head(hidden)
        assert self.model.embedding is not None
        assert self.head is not None
        wanted = hidden if chosen is None else hidden[chosen]
        return self.head(wanted, self.model.embedding.tokens.weight, reduce), sentence

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        token_type_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        sample_ids: torch.Tensor | None = None,
        sentence_labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        chunk: Chunk | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """See `Task`: loss sums, targets and, in eval mode, correct predictions, each (K,)."""
        states = self.hidden_states(
            input_ids, token_type_ids, attention_mask, sample_ids, position_ids, hidden, chunk
        )
        if chunk is not None and not chunk.is_last:
            return states
        chosen = labels != IGNORE_LABEL
        # The head is computed for masked tokens only: V x D for 15 % of the positions.
        targets = labels[chosen]
        if self.training and self.loss.fused:
            reduce = partial(self.loss.of_product, labels=targets, training=True)
            token_loss, sentence = self._heads(states, chosen, reduce)
        else:
            tokens, sentence = self._heads(states, chosen)
            token_loss = self.loss(tokens, targets, training=self.training)
        losses = [token_loss]
        counts = [chosen.sum()]
        if sentence is not None:
            assert sentence_labels is not None
            losses.append(TokenLoss()(sentence, sentence_labels, training=False))
            counts.append((sentence_labels != IGNORE_LABEL).sum())
        sums, numbers = torch.stack(losses), torch.stack(counts)
        if self.training:
            return sums, numbers
        correct = [(self.most_likely(tokens) == targets).sum()]
        if sentence is not None:
            assert sentence_labels is not None
            correct.append((_argmax(sentence) == sentence_labels).sum())  # never equal to -100
        return sums, numbers, torch.stack(correct)


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(dim=-1)


def bert_plan(config: BERTConfig) -> Plan:
    """How a BERT is cut (arXiv:1909.08053, arXiv:2205.05198); what is not named stays whole.

    The heads see single positions, [CLS] and the masked ones, not parts of T: behind `encoded`
    every rank computes the same, up to the decoder's part of the vocabulary.
    """
    layer = "model.layers.*"
    head = Rule("column", unit=config.head_dim)
    return {
        "model.embedding.tokens": Rule("vocab"),
        "model.embedding.positions": Rule("positions"),
        "model.embedding.token_types": Rule("positions"),
        "model.embedding.norm": Rule("sequence"),
        "model.embedding.dropout": Rule("drop_sequence"),
        f"{layer}.attention.query": head,
        f"{layer}.attention.key": head,
        f"{layer}.attention.value": head,
        f"{layer}.attention.core.dropout": Rule("drop_heads"),
        f"{layer}.attention.output": Rule("row", unit=config.head_dim),
        f"{layer}.attention_dropout": Rule("drop_sequence"),
        f"{layer}.attention_norm": Rule("sequence"),
        f"{layer}.mlp.up": Rule("column"),
        f"{layer}.mlp.down": Rule("row"),
        f"{layer}.mlp_dropout": Rule("drop_sequence"),
        f"{layer}.mlp_norm": Rule("sequence"),
        "encoded": Rule("leave"),
        "head.decoder": Rule("decoder"),
    }


def bert_context_plan() -> ContextPlan:
    """What a cut of the sequence means to a BERT; the rest looks at single tokens."""
    layer = "model.layers.*"
    return {
        "model.embedding.dropout": "drop_sequence",
        f"{layer}.attention.core": "attention",
        f"{layer}.attention_dropout": "drop_sequence",
        f"{layer}.mlp_dropout": "drop_sequence",
    }


class BERTTask:
    """Pretraining of a BERT; see `Task`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._bert = replace(bert_config(config.model), **performance_choices(config))

    def build_module(self) -> BERTModule:
        """See `Task.build_module`."""
        objective = self._config.data.sentence_objective
        loss = token_loss(self._config)
        return BERTModule(self._bert, self._config.run.seed, objective, loss)

    def blocks(self, module: nn.Module) -> Sequence[nn.Module]:
        """See `Task.blocks`."""
        assert isinstance(module, BERTModule)
        return list(module.model.layers.values())

    def keep_chunks(self, module: nn.Module, chunks: Sequence[Chunk]) -> None:
        """See `Task.keep_chunks`."""
        assert isinstance(module, BERTModule)
        if not keep_chunks(module.model, chunks, tied=True):
            module.head = module.sentence_head = None

    def tied_weight(self) -> str | None:
        """See `Task.tied_weight`."""
        return "model.embedding.tokens.weight"

    def stage_costs(self) -> StageCosts:
        """See `Task.stage_costs`."""
        layer = bert_layer_flops_per_token(self._bert, self._config.model.seq_length)
        head = bert_head_flops_per_token(self._bert, self._config.data.mask_probability)
        return StageCosts((layer,) * self._bert.num_layers, last=head)

    def parallelize(self, module: nn.Module, tensor: TensorGroup) -> dict[str, Placement]:
        """See `Task.parallelize`."""
        assert isinstance(module, BERTModule)
        first_id, _ = interval(
            self._bert.vocab_size, 1, tensor.rank, tensor.size, "model.vocab_size"
        )
        part = VocabularyPart(first_id, self._bert.vocab_size, tensor.group)
        module.loss = replace(module.loss, part=part)
        module.most_likely = partial(vocab_parallel_argmax, first_id=first_id, group=tensor.group)
        return parallelize(module, bert_plan(self._bert), tensor)

    def parallelize_context(self, module: nn.Module, context: ContextGroup) -> None:
        """See `Task.parallelize_context`."""
        parallelize_context(module, bert_context_plan(), context)

    def fill_initial(self, fragment: Fragment) -> None:
        """See `Task.fill_initial`."""
        fill_initial(
            fragment.tensor,
            fragment.name,
            fragment.global_shape,
            self._config.run.seed,
            init_std=self._bert.init_std,
            num_layers=None,
            box=fragment.box,
            start=fragment.start,
        )

    def open_data(self, corpora: Corpora) -> RunData:
        """See `Task.open_data`.

        Raises:
            UserError: data prepared for a GPT, or a tokenizer without the tokens of a BERT.
        """
        for corpus in corpora.corpora:
            require_mode(corpus, "bert")
        form = self._sample_form(corpora)

        def training_set(corpus: TokenCorpus, part: TokenRange) -> BERTDataset:
            return BERTDataset(corpus, part, form, self._config.run.seed)

        return open_run_data(
            self._config, corpora, training_set, partial(self.evaluation_set, corpora)
        )

    def evaluation_set(
        self, corpora: Corpora, corpus: TokenCorpus, part: TokenRange
    ) -> BERTEvaluationDataset:
        """See `Task.evaluation_set`."""
        require_mode(corpus, "bert")
        return BERTEvaluationDataset(corpus, part, self._sample_form(corpora))

    def byte_lengths(self, corpora: Corpora) -> np.ndarray | None:
        """None: the loss of some tokens, given the others, says nothing of the whole text."""
        return None

    def baselines(self, corpora: Corpora, held_out: Iterable[EvaluationLoader]) -> dict[str, float]:
        """Accuracy of always naming the most frequent token of the training part."""
        corpus = corpora.corpora[0]
        train = corpus.split(self._config.data.split, minimum_tokens=2)[0]
        majority = most_frequent_token(corpus, train)
        right = total = 0
        for loader in held_out:
            for batch in loader:
                right += int((batch["labels"] == majority).sum())
                total += int((batch["labels"] != IGNORE_LABEL).sum())
        return {"majority_accuracy": right / max(total, 1)}

    def flops_per_sample(self) -> float:
        """See `Task.flops_per_sample`."""
        length = self._bert.seq_length
        probability = self._config.data.mask_probability
        return length * bert_flops_per_token(self._bert, length, probability)

    def _sample_form(self, corpora: Corpora) -> SampleForm:
        data = self._config.data
        return SampleForm(
            seq_length=self._bert.seq_length,
            vocabulary=_vocabulary(corpora),
            masking=Masking(data.mask_probability, data.masking),
            objective=data.sentence_objective,
        )


def _vocabulary(corpora: Corpora) -> MaskedVocabulary:
    if corpora.tokenizer is None:
        raise UserError(
            f"{corpora.corpora[0].path} has no tokenizer",
            rule="masking needs the ids of [CLS], [SEP], [MASK] and [PAD]",
            remedy="set data.tokenizer to the tokenizer of the data",
        )
    return MaskedVocabulary.of(corpora.tokenizer)
