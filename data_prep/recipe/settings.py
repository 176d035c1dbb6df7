"""The settings of each step in a recipe, and the phases that they stand for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from data_prep.clean.augment import Augment
from data_prep.clean.step import CleanOptions, prepare_clean
from data_prep.dedup.decontaminate import (
    Action,
    DecontaminateOptions,
    prepare_decontaminate,
)
from data_prep.dedup.signatures import DedupOptions, NearOptions
from data_prep.dedup.step import DedupRun, dedup_phases, finished_dedup, remove_intermediate
from data_prep.documents import DocumentUnit
from data_prep.encoders import Backend
from data_prep.read.options import FormatOptions
from data_prep.read.step import NamedInput, ReadOptions, named_inputs, prepare_read
from data_prep.recipe.phases import Flow, NamedPhase, RunAs, step_phase
from data_prep.recipe.rules import parse_rules
from data_prep.step import Step, StepResult, run_step
from data_prep.tokenize import RunOptions, TokenizeOptions, tokenize
from data_prep.train_tokenizer import (
    SentencePieceModel,
    TokenizerKind,
    TrainTokenizerOptions,
    train_tokenizer,
)
from megascale.config.problems import Problem
from megascale.data.places import as_path


class StepSettings(BaseModel, ABC):
    """Settings of one step."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    needs_documents: ClassVar[bool] = True

    @abstractmethod
    def phases(self, folder: Path, flow: Flow) -> list[NamedPhase]:
        """The phases that write `folder`; changes `flow` for the steps that follow.

        Raises:
            UserError: settings do not go together.
        """

    def problems(self, path: str) -> list[Problem]:
        """What pydantic does not see."""
        return []


class InputSettings(BaseModel):
    """An input with a name for reports."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, examples=["wiki"])
    path: str = Field(min_length=1, examples=["data/wiki/*.jsonl.gz"])


def _inputs(given: tuple[str | InputSettings, ...]) -> list[NamedInput]:
    plain = [
        f"{item.name}={item.path}" if isinstance(item, InputSettings) else item for item in given
    ]
    return named_inputs(plain)


class ReadSettings(StepSettings):
    """`read`: files of any kind into shards of documents."""

    name: ClassVar[str] = "read"
    needs_documents: ClassVar[bool] = False

    inputs: tuple[str | InputSettings, ...] = Field(min_length=1, examples=["[data/wiki]"])
    documents: DocumentUnit = DocumentUnit.FILE
    text_key: str = "text"
    id_key: str = "id"
    meta_keys: tuple[str, ...] = ()
    max_document_bytes: int = Field(default=128 << 20, ge=1)
    extract_html: bool = False
    tokenizer: str | None = None
    shard_bytes: int = Field(default=64 << 20, ge=1)

    def phases(self, folder: Path, flow: Flow) -> list[NamedPhase]:
        """One phase."""
        form = FormatOptions(
            self.documents,
            self.text_key,
            self.id_key,
            self.meta_keys,
            self.max_document_bytes,
            self.extract_html,
            as_path(self.tokenizer) if self.tokenizer else None,
        )
        options = ReadOptions(form, self.shard_bytes)
        prepare = partial(prepare_read, _inputs(self.inputs), folder, options)
        flow.documents = folder
        return [NamedPhase(folder.name, step_phase(prepare), report=folder.name)]


class CleanSettings(StepSettings):
    """`clean`: rules over every document."""

    name: ClassVar[str] = "clean"

    rules: tuple[Any, ...] | None = None
    augment: Augment | None = None
    keep_rejected: bool = False

    def problems(self, path: str) -> list[Problem]:
        """Of the rules."""
        return parse_rules(self.rules, f"{path}.rules")[1] if self.rules is not None else []

    def phases(self, folder: Path, flow: Flow) -> list[NamedPhase]:
        """One phase."""
        rules = None if self.rules is None else parse_rules(self.rules, "rules")[0]
        options = CleanOptions(rules, self.augment, self.keep_rejected)
        prepare = partial(prepare_clean, _documents(flow), folder, options)
        flow.documents = folder
        return [NamedPhase(folder.name, step_phase(prepare), report=folder.name)]


class NearSettings(BaseModel):
    """How alike near duplicates are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threshold: float = Field(default=0.8, gt=0, le=1)
    ngram: int = Field(default=5, ge=1, le=100)
    bins: int = Field(default=256, ge=16)

    @field_validator("bins")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("must be a power of two")
        return value


class DedupSettings(StepSettings):
    """`dedup`: exact and near duplicates, and lines that occurred before."""

    name: ClassVar[str] = "dedup"

    exact: bool = True
    near: NearSettings | None = NearSettings()
    lines: bool = False
    min_line_characters: int = Field(default=30, ge=1)
    keep_removed: bool = False
    self_test: bool = True

    def phases(self, folder: Path, flow: Flow) -> list[NamedPhase]:
        """Signatures, the search, and the filter."""
        near = NearOptions(**self.near.model_dump()) if self.near else None
        options = DedupOptions(self.exact, near, self.lines, self.min_line_characters)
        run = DedupRun(self.keep_removed, self.self_test)
        source = _documents(flow)
        flow.documents = folder
        prepared = dedup_phases(source, folder, options, run)
        finished = partial(finished_dedup, source, folder, options, run)
        names = (f"{folder.name} signatures", f"{folder.name} search", folder.name)
        return [
            NamedPhase(
                name,
                _dedup_phase(prepare, finished, folder if name == folder.name else None),
                shared="search" not in name,
                report=folder.name if name == folder.name else "",
            )
            for name, prepare in zip(names, prepared, strict=True)
        ]


def _dedup_phase(
    prepare: Callable[[], Step],
    finished: Callable[[], StepResult | None],
    last_of: Path | None,
) -> Any:
    def run(run_as: RunAs) -> StepResult:
        result = finished()
        if result is None:
            result = run_step(prepare(), run_as.workers, run_as.overwrite, run_as.share)
        if last_of is not None:  # an earlier run may have been killed just before this
            remove_intermediate(last_of)
        return result

    return run


class DecontaminateSettings(StepSettings):
    """`decontaminate`: text of evaluation sets goes."""

    name: ClassVar[str] = "decontaminate"

    against: tuple[str | InputSettings, ...] = Field(min_length=1, examples=["[eval/mmlu.jsonl]"])
    ngram: int = Field(default=13, ge=1)
    min_words: int = Field(default=8, ge=1)
    min_matches: int = Field(default=1, ge=1)
    action: Action = Action.DROP
    window: int = Field(default=200, ge=0)
    max_pieces: int = Field(default=10, ge=1)
    text_key: str = "text"
    documents: DocumentUnit = DocumentUnit.LINE
    keep_removed: bool = False

    def phases(self, folder: Path, flow: Flow) -> list[NamedPhase]:
        """One phase."""
        settings = {key: getattr(self, key) for key in type(self).model_fields if key != "against"}
        options = DecontaminateOptions(**settings)
        source = _documents(flow)
        prepare = partial(prepare_decontaminate, source, folder, _inputs(self.against), options)
        flow.documents = folder
        return [NamedPhase(folder.name, step_phase(prepare), report=folder.name)]


class TrainTokenizerSettings(StepSettings):
    """`train_tokenizer`: on the documents so far."""

    name: ClassVar[str] = "train_tokenizer"

    vocab_size: int = Field(gt=0, examples=[32000])
    kind: TokenizerKind = TokenizerKind.BPE
    sentencepiece_model: SentencePieceModel = SentencePieceModel.BPE
    seed: int = 0
    bert: bool = False

    def phases(self, folder: Path, flow: Flow) -> list[NamedPhase]:
        """One phase of one process."""
        options = TrainTokenizerOptions(
            self.vocab_size, self.kind, self.sentencepiece_model, self.seed, bert=self.bert
        )
        source = _documents(flow)
        flow.tokenizer = folder

        def run(run_as: RunAs) -> StepResult:
            summary = train_tokenizer([str(source)], folder, options, run_as.overwrite)
            report = {
                "step": self.name,
                "vocab_size": summary.tokenizer.vocab_size,
                "fingerprint": summary.tokenizer.fingerprint,
            }
            return StepResult(report, summary.already_done)

        return [NamedPhase(folder.name, run, shared=False, report=folder.name)]


class TokenizeSettings(StepSettings):
    """`tokenize`: the dataset that a training reads."""

    name: ClassVar[str] = "tokenize"

    tokenizer: str | None = None
    """None: the one that `train_tokenizer` trained."""
    bert: bool = False
    max_sentence_tokens: int | None = Field(default=None, ge=1)
    shard_bytes: int | None = Field(default=None, ge=1)
    backend: Backend = Backend.AUTO

    def phases(self, folder: Path, flow: Flow) -> list[NamedPhase]:
        """One phase."""
        options = TokenizeOptions(
            bert=self.bert,
            max_sentence_tokens=self.max_sentence_tokens,
            shard_bytes=self.shard_bytes,
        )
        source = _documents(flow)
        tokenizer = as_path(self.tokenizer) if self.tokenizer else flow.tokenizer
        assert tokenizer is not None, "the recipe was checked"

        def run(run_as: RunAs) -> StepResult:
            how = RunOptions(run_as.workers, self.backend, run_as.overwrite, run_as.share)
            summary = tokenize([str(source)], folder, tokenizer, options, how)
            shards = summary.manifest.shards
            report = {
                "step": self.name,
                "counts": {
                    "documents": sum(shard.documents for shard in shards),
                    "tokens": sum(shard.tokens for shard in shards),
                    "text_bytes": sum(shard.utf8_bytes for shard in shards),
                },
                "fingerprint": summary.manifest.fingerprint,
            }
            return StepResult(report, summary.already_prepared)

        return [NamedPhase(folder.name, run, report=folder.name)]


def _documents(flow: Flow) -> Path:
    assert flow.documents is not None, "the recipe was checked: read comes first"
    return flow.documents


STEPS: dict[str, type[StepSettings]] = {
    step.name: step
    for step in (
        *(ReadSettings, CleanSettings, DedupSettings, DecontaminateSettings),
        *(TrainTokenizerSettings, TokenizeSettings),
    )
}
