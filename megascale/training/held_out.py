"""Evaluating a checkpoint on held-out text, with the data's own entropies beside it."""

from __future__ import annotations

import torch

from megascale.config.schema import Config
from megascale.data.corpus import TokenCorpus
from megascale.data.gpt_dataset import EvaluationDataset
from megascale.data.protocol import FiniteSampleSource
from megascale.data.statistics import ngram_entropy
from megascale.errors import UserError
from megascale.parallel.mesh import build_mesh
from megascale.training.assemble import evaluation_loaders
from megascale.training.datasets import Corpora, open_corpora
from megascale.training.evaluation import evaluate
from megascale.training.inference import LoadedModel


def evaluate_checkpoint(
    path: str,
    device: torch.device,
    *,
    split: str = "valid",
    data: str | None = None,
    max_samples: int | None = None,
    baselines: bool = False,
    weights: str = "trained",
) -> dict[str, object] | None:
    """Loss, perplexity and bits per byte; collective over the default process group.

    Args:
        path: checkpoint folder.
        split: "train", "valid" or "test" of the run's data, or the name of a set of
            data.validation; ignored with `data`.
        data: another prepared dataset, evaluated whole; its tokenizer must be the model's.
        max_samples: evaluate only the first so many samples of each corpus.
        weights: which of the checkpoint's weights, see `LoadedModel`.
        baselines: add unigram and bigram entropies of the training part, nats per token.

    Returns:
        The report on rank 0, None elsewhere.

    Raises:
        UserError: damaged checkpoint, unknown split, or data of another tokenizer.
    """
    mesh = build_mesh(device.type)
    model = LoadedModel(path, device, weights)
    corpora = _corpora(model, data)
    datasets = _whole(corpora, model.config) if data else _split(corpora, model.config, split)
    lengths = corpora.tokenizer.byte_lengths() if corpora.tokenizer else None
    loaders = evaluation_loaders(datasets, model.config.train.micro_batch_size, mesh, max_samples)
    result = evaluate(model, loaders, mesh, device, lengths)
    if not mesh.is_main:
        return None
    report: dict[str, object] = {
        "checkpoint": path,
        "step": model.step,
        "data": data or (f"set {split}" if split in corpora.validation else f"{split} split"),
        "tokens": result.tokens,
        "loss": result.loss,
        "perplexity": result.perplexity,
    }
    if result.bits_per_byte is not None:
        report["bits_per_byte"] = result.bits_per_byte
    if baselines:
        report.update(_baselines(corpora, model.config))
    return report


def _corpora(model: LoadedModel, data: str | None) -> Corpora:
    config = model.config
    if data is None:
        corpora = open_corpora(config)
    else:
        corpus = TokenCorpus.open(data)
        corpora = Corpora((corpus,), (1.0,), corpus.tokenizer or model.tokenizer)
    trained, found = model.tokenizer, corpora.tokenizer
    if trained is not None and found is not None and trained.fingerprint != found.fingerprint:
        raise UserError(
            f"the data's tokenizer is {found.fingerprint}",
            rule=f"the model was trained with {trained.fingerprint}",
            remedy="tokenise the text with the tokenizer stored in the checkpoint",
        )
    return corpora


def _split(corpora: Corpora, config: Config, split: str) -> list[FiniteSampleSource]:
    if split in corpora.validation:
        named = corpora.validation[split]
        return [_dataset(named, (0, named.num_tokens), config)]
    names = ("train", "valid", "test")[: len(config.data.split)]
    if split not in names:
        raise UserError(
            f"--split {split}",
            rule=f"data.split {list(config.data.split)} has the parts {', '.join(names)}, "
            f"data.validation the sets {', '.join(corpora.validation) or 'none'}",
            remedy=f"use one of {', '.join((*names, *corpora.validation))}",
        )
    index = names.index(split)
    return [
        _dataset(corpus, corpus.split(config.data.split, minimum_tokens=2)[index], config)
        for corpus in corpora.corpora
    ]


def _whole(corpora: Corpora, config: Config) -> list[FiniteSampleSource]:
    return [_dataset(corpus, (0, corpus.num_tokens), config) for corpus in corpora.corpora]


def _dataset(corpus: TokenCorpus, part: tuple[int, int], config: Config) -> EvaluationDataset:
    return EvaluationDataset(corpus, part, config.model.seq_length, config.data.isolate_documents)


def _baselines(corpora: Corpora, config: Config) -> dict[str, object]:
    """Entropies of the first corpus's training part: what a table of counts could reach."""
    corpus = corpora.corpora[0]
    train = corpus.split(config.data.split, minimum_tokens=2)[0]
    unigram, bigram = ngram_entropy(corpus, train)
    return {"unigram_entropy": unigram, "bigram_entropy": bigram}
