"""From the config's data section to samples: corpora, their tokenizer, their split, their blend."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from posixpath import normpath
from typing import Literal

import xxhash

from megascale.config.schema import Config
from megascale.data.blend import BlendedDataset, Stage
from megascale.data.corpus import TokenCorpus
from megascale.data.packed_dataset import PackedDataset
from megascale.data.protocol import FiniteSampleSource, TrainingSource
from megascale.data.tokenizer import Tokenizer, load_tokenizer
from megascale.errors import UserError

TokenRange = tuple[int, int]
SPLIT_NAMES = ("train", "valid", "test")


@dataclass(frozen=True)
class Corpora:
    """The opened datasets of a config and the one tokenizer that they share.

    Attributes:
        corpora: in the order of `DataConfig.source_paths`.
        tokenizer: None when only Megatron prefixes without data.tokenizer are given.
        validation: the sets of data.validation by name.
    """

    corpora: tuple[TokenCorpus, ...]
    tokenizer: Tokenizer | None
    validation: dict[str, TokenCorpus] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Identifies contents and order of the training corpora; a resume must find the same."""
        return xxhash.xxh3_128_hexdigest(
            " ".join(corpus.fingerprint for corpus in self.corpora).encode()
        )


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
        train: the endless training stream, over the corpora in their order.
        held_out: "valid" and "test" (where the split has them) -> one finite dataset a corpus,
            and the name of each set of data.validation -> that set.
        notes: lines that the user is told, about what packing did.
    """

    train: BlendedDataset
    held_out: dict[str, tuple[FiniteSampleSource, ...]]
    notes: tuple[str, ...] = ()


def open_corpora(config: Config) -> Corpora:
    """Open every dataset of the config and check that they belong together.

    Raises:
        UserError: missing or damaged data, the same data twice, or datasets of different
            tokenizers.
    """
    cache = config.data.cache_dir
    corpora = tuple(TokenCorpus.open(path, cache=cache) for path in config.data.source_paths)
    _require_different(corpora)
    validation = {
        name: TokenCorpus.open(path, cache=cache) for name, path in config.data.validation.items()
    }
    tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
    origin = config.data.tokenizer or ""
    for corpus in (*corpora, *validation.values()):
        own = corpus.tokenizer
        if own is None:
            continue
        if tokenizer is None:
            tokenizer, origin = own, str(corpus.path)
        elif own.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{corpus.path} was tokenised with {own.fingerprint}, "
                f"{origin} is {tokenizer.fingerprint}",
                rule="all data of a run must come from one tokenizer",
                remedy="tokenise the texts again with the same --tokenizer",
            )
    return Corpora(corpora, tokenizer, validation)


def _require_different(corpora: tuple[TokenCorpus, ...]) -> None:
    seen: dict[str, TokenCorpus] = {}
    for corpus in corpora if len(corpora) > 1 else ():
        other = seen.setdefault(corpus.fingerprint, corpus)
        if other is not corpus:
            raise UserError(
                f"{other.path} and {corpus.path} hold the same data",
                rule="a dataset is given once; its samples would come twice as two sources",
                remedy="name it by one path, with the sum of the weights",
            )


def resolve_vocab_size(config: Config, corpora: Corpora) -> Config:
    """The config with model.vocab_size filled in from the tokenizer when it was absent.

    Raises:
        UserError: it is neither given nor known, or smaller than the tokenizer's.
    """
    given = config.model.vocab_size
    known = corpora.tokenizer.vocab_size if corpora.tokenizer else None
    if known is None and given is None:
        raise UserError(
            "model.vocab_size is not given and the data has no tokenizer",
            rule="the number of token ids must be known",
            remedy="set data.tokenizer or model.vocab_size",
        )
    if given is not None and known is not None and given < known:
        raise UserError(
            f"model.vocab_size {given}",
            rule=f"the data's tokenizer has ids up to {known - 1}, so at least {known} are needed",
            remedy="leave model.vocab_size out, or raise it",
        )
    size = given if given is not None else known
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})


def open_run_data(
    config: Config,
    corpora: Corpora,
    training_set: Callable[[TokenCorpus, TokenRange], TrainingSource],
    evaluation_set: Callable[[TokenCorpus, TokenRange], FiniteSampleSource],
) -> RunData:
    """Training and held-out samples over the split of every corpus.

    Args:
        training_set, evaluation_set: make a task's dataset over one part of one corpus.
    """
    parts = [corpus.split(config.data.split, minimum_tokens=2) for corpus in corpora.corpora]
    train = [
        training_set(corpus, ranges[0])
        for corpus, ranges in zip(corpora.corpora, parts, strict=True)
    ]
    held_out: dict[str, tuple[FiniteSampleSource, ...]] = {}
    for index, name in enumerate(SPLIT_NAMES[1 : len(config.data.split)], start=1):
        held_out[name] = tuple(
            evaluation_set(corpus, ranges[index])
            for corpus, ranges in zip(corpora.corpora, parts, strict=True)
        )
    for name, corpus in corpora.validation.items():
        held_out[name] = (evaluation_set(corpus, (0, corpus.num_tokens)),)
    notes = tuple(
        f"{config.data.packing} of {corpus.path}: {dataset.report}"
        for corpus, dataset in zip(corpora.corpora, train, strict=True)
        if isinstance(dataset, PackedDataset)
    )
    return RunData(BlendedDataset(train, stages_of(config), config.run.seed), held_out, notes)


def stages_of(config: Config) -> tuple[Stage, ...]:
    """The mixes of the config over its sources, in the order of `DataConfig.source_paths`."""
    numbers = {normpath(path): number for number, path in enumerate(config.data.source_paths)}
    return tuple(
        Stage(
            stage.from_sample,
            tuple(numbers[normpath(source.path)] for source in stage.sources),
            tuple(source.weight for source in stage.sources),
        )
        for stage in config.data.resolved_stages
    )


def require_mode(corpus: TokenCorpus, mode: Literal["gpt", "bert"]) -> None:
    """Refuse a dataset that was prepared for the other family.

    Raises:
        UserError: with how to prepare it again. A Megatron prefix does not tell what it is.
    """
    if corpus.mode not in (None, mode):
        option = "with" if mode == "bert" else "without"
        raise UserError(
            f"{corpus.path} was prepared for {corpus.mode} models",
            rule=f"a {mode} model reads "
            + ("one sequence a sentence" if mode == "bert" else "one sequence a document"),
            remedy=f"tokenise the text {option} --bert, or set model.family={corpus.mode}",
        )


def tokenizer_files(tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """The tokenizer's files by path "tokenizer/...", so that a checkpoint stands on its own."""
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return {
            f"tokenizer/{file.relative_to(folder).as_posix()}": file.read_bytes()
            for file in sorted(Path(folder).rglob("*"))
            if file.is_file()
        }
