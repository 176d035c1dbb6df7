"""The step `clean`: rules over every document, counted per source and rule."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.clean.augment import Augment
from data_prep.clean.registry import default_rules
from data_prep.clean.rule import Outcome, Rule, TextView
from data_prep.progress import Advance
from data_prep.records import Document, ShardWriter, read_documents
from data_prep.shard_runner import RunOutcome, ShardResult, ShardTask
from data_prep.step import (
    Counts,
    Step,
    check_apart,
    shards_fingerprint,
    sum_nested,
    tasks_of_shards,
)
from megascale.data.atomic_files import file_checksum
from megascale.data.places import as_path
from megascale.errors import UserError

REJECTED = "rejected"


@dataclass(frozen=True)
class CleanOptions:
    """What decides the result, beside the input.

    Args:
        rules: applied in this order; None: `default_rules`. A rejected document meets no more.
        augment: altered copies of what is kept.
        keep_rejected: write rejected documents, with the rule in `meta`, to the folder
            `rejected` inside the output.
    """

    rules: tuple[Rule, ...] | None = None
    augment: Augment | None = None
    keep_rejected: bool = False

    @property
    def chosen(self) -> tuple[Rule, ...]:
        """The rules in their order."""
        return default_rules() if self.rules is None else self.rules

    def recorded(self) -> dict[str, Any]:
        """As the identity of a run keeps it: settings, and the content of the files they name."""
        settings = [{rule.name: rule.model_dump(mode="json")} for rule in self.chosen]
        augment = self.augment.model_dump(mode="json") if self.augment else None
        files = [getattr(rule, "file", None) for rule in self.chosen]
        files.append(self.augment.synonyms if self.augment else None)
        return {
            "rules": settings,
            "augment": augment,
            "keep_rejected": self.keep_rejected,
            "files": [file_checksum(file) for file in files if file],
        }


def prepare_clean(source: Path, output: Path, options: CleanOptions) -> Step:
    """One task a shard.

    Raises:
        UserError: the input holds no shards, or a rule cannot work.
    """
    check_apart(source, output)
    for rule in options.chosen:
        rule.check()
    if options.augment:
        options.augment.check()
    identity = {"input": shards_fingerprint(source), "options": options.recorded()}
    return Step(
        "clean", output, identity, tasks_of_shards(source), _Clean(options), _summary, REJECTED
    )


class Cleaner:
    """Rules over one document after the other, with the counts of all.

    Attributes:
        sources: source -> documents, kept, rejected by rule and limit, changed by rule.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        self.sources: Counts = {}

    def clean(self, document: Document) -> tuple[Document, str]:
        """The document as the rules leave it, and the rule that rejects it or ""."""
        counts = self.sources.setdefault(
            document.source, {"documents": 0, "kept": 0, "rejected": {}, "changed": {}}
        )
        counts["documents"] += 1
        view = TextView(document.text, document.id)
        rejected = ""
        for rule in self.rules:
            outcome = rule.apply(view)
            if outcome.text != view.text or outcome.counts:
                self._count_change(counts["changed"], rule.name, view.text, outcome)
                view = TextView(outcome.text, document.id)
            if outcome.rejected:
                rejected = f"{rule.name}.{outcome.rejected}"
            elif not view.text.strip():
                rejected = f"{rule.name}.nothing_left"
            if rejected:
                break
        changed = Document(view.text, document.id, document.source, document.meta)
        if rejected:
            counts["rejected"][rejected] = counts["rejected"].get(rejected, 0) + 1
        else:
            counts["kept"] += 1
        return changed, rejected

    @staticmethod
    def _count_change(changed: Counts, name: str, before: str, outcome: Outcome) -> None:
        row = changed.setdefault(name, {"documents": 0, "characters": 0})
        if outcome.text != before:
            row["documents"] += 1
            # what was removed or added; replacements of equal length are in the rule's own counts
            row["characters"] += abs(len(before) - len(outcome.text))
        for kind, count in outcome.counts.items():
            row[kind] = row.get(kind, 0) + count


@dataclass(frozen=True)
class _Clean:
    options: CleanOptions

    def __call__(self, task: ShardTask, folder: Path, advance: Advance) -> ShardResult:
        cleaner = Cleaner(self.options.chosen)
        augment, augmented = self.options.augment, 0
        path = as_path(task.content)
        with ExitStack() as stack:
            kept = stack.enter_context(ShardWriter(folder / path.name))
            aside = self._aside(stack, folder / f"{REJECTED}_{path.name}")
            for _, document in read_documents(path):
                changed, rejected = cleaner.clean(document)
                if not rejected:
                    kept.write(changed)
                    for copy in augment.copies_of(changed) if augment else ():
                        kept.write(copy)
                        augmented += 1
                elif aside is not None:
                    meta = {**document.meta, "rejected_by": rejected}
                    aside.write(Document(document.text, document.id, document.source, meta))
        counts = {
            "documents": sum(row["documents"] for row in cleaner.sources.values()),
            "kept": kept.documents - augmented,
            "rejected": sum(row["documents"] - row["kept"] for row in cleaner.sources.values()),
            "augmented": augmented,
            "text_bytes": kept.text_bytes,
        }
        return ShardResult(counts, details={"sources": cleaner.sources})

    def _aside(self, stack: ExitStack, path: Path) -> ShardWriter | None:
        return stack.enter_context(ShardWriter(path)) if self.options.keep_rejected else None


def _summary(outcome: RunOutcome) -> Counts:
    if not outcome.counts["kept"]:
        raise nothing_kept("clean", outcome)
    return sum_nested(result.details for result in outcome.results.values())


def nothing_kept(step: str, outcome: RunOutcome) -> UserError:
    """The error for a step that leaves no document."""
    sources = sum_nested(result.details for result in outcome.results.values())["sources"]
    rejected = sum_nested(row.get("rejected", {}) for row in sources.values())
    reasons = ", ".join(f"{name} {count}" for name, count in rejected.items())
    return UserError(
        f"{step} rejects all {outcome.counts['documents']} documents ({reasons})",
        rule="at least one document must be left",
        remedy="choose other rules or limits, or look at the input",
    )
