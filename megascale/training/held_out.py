"""Evaluating a checkpoint on held-out text, with the data's own entropies beside it."""

from __future__ import annotations

import torch

from megascale.data.corpus import TokenCorpus
from megascale.data.loader import EvaluationLoader
from megascale.data.protocol import FiniteSampleSource
from megascale.errors import UserError
from megascale.parallel.mesh import build_mesh
from megascale.training.assemble import evaluation_loaders
from megascale.training.datasets import SPLIT_NAMES, Corpora, open_corpora
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
    model = LoadedModel(path, device, weights)
    through_memory = model.config.performance.shared_memory == "auto"
    mesh = build_mesh(device.type, through_memory=through_memory)
    corpora = _corpora(model, data)
    datasets = _whole(model, corpora) if data else _split(model, corpora, split)
    micro_batch_size = model.config.train.micro_batch_size
    loaders = evaluation_loaders(datasets, micro_batch_size, mesh, max_samples)
    result = evaluate(model, loaders, mesh, device, model.task.byte_lengths(corpora))
    if not mesh.is_main:
        return None
    report: dict[str, object] = {
        "checkpoint": path,
        "step": model.step,
        "data": data or (f"set {split}" if split in corpora.validation else f"{split} split"),
        "tokens": result.tokens,
        "loss": result.loss,
        "perplexity": result.perplexity,
        **result.metrics,
    }
    if result.bits_per_byte is not None:
        report["bits_per_byte"] = result.bits_per_byte
    if baselines:
        every_sample = [
            EvaluationLoader(dataset, micro_batch_size, 0, 1, max_samples) for dataset in datasets
        ]
        report.update(model.task.baselines(corpora, every_sample))
    return report


def _corpora(model: LoadedModel, data: str | None) -> Corpora:
    config = model.config
    if data is None:
        corpora = open_corpora(config)
    else:
        corpus = TokenCorpus.open(data, cache=config.data.cache_dir)
        corpora = Corpora((corpus,), corpus.tokenizer or model.tokenizer)
    trained, found = model.tokenizer, corpora.tokenizer
    if trained is not None and found is not None and trained.fingerprint != found.fingerprint:
        raise UserError(
            f"the data's tokenizer is {found.fingerprint}",
            rule=f"the model was trained with {trained.fingerprint}",
            remedy="tokenise the text with the tokenizer stored in the checkpoint",
        )
    return corpora


def _split(model: LoadedModel, corpora: Corpora, split: str) -> list[FiniteSampleSource]:
    if split in corpora.validation:
        named = corpora.validation[split]
        return [model.task.evaluation_set(corpora, named, (0, named.num_tokens))]
    config = model.config
    names = SPLIT_NAMES[: len(config.data.split)]
    if split not in names:
        raise UserError(
            f"--split {split}",
            rule=f"data.split {list(config.data.split)} has the parts {', '.join(names)}, "
            f"data.validation the sets {', '.join(corpora.validation) or 'none'}",
            remedy=f"use one of {', '.join((*names, *corpora.validation))}",
        )
    index = names.index(split)
    return [
        model.task.evaluation_set(
            corpora, corpus, corpus.split(config.data.split, minimum_tokens=2)[index]
        )
        for corpus in corpora.corpora
    ]


def _whole(model: LoadedModel, corpora: Corpora) -> list[FiniteSampleSource]:
    return [
        model.task.evaluation_set(corpora, corpus, (0, corpus.num_tokens))
        for corpus in corpora.corpora
    ]
