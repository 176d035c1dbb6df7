"""The step `decontaminate`: what evaluation sets hold goes out of the training text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.choices import Action as Action
from data_prep.dedup.evaluation_index import EvaluationIndex, Hit
from data_prep.documents import no_documents
from data_prep.progress import Advance
from data_prep.read.formats import read_items
from data_prep.read.options import DocumentUnit, FormatOptions
from data_prep.read.step import NamedInput
from data_prep.records import Document, ShardWriter, read_documents
from data_prep.shard_runner import RunOutcome, ShardResult, ShardTask
from data_prep.skips import SkipReport
from data_prep.sources import describe_source, find_inputs
from data_prep.step import (
    Counts,
    Step,
    check_apart,
    shards_fingerprint,
    sum_nested,
    tasks_of_shards,
)
from megascale.data.places import as_path
from megascale.errors import UserError

REMOVED = "removed"
_BATCH_BYTES = 1 << 17


@dataclass(frozen=True)
class DecontaminateOptions:
    """How text of evaluation sets is found, and what is done about it.

    Args:
        ngram: words that must be the same.
        min_words: examples with fewer words than `ngram` are searched as a whole, down to this.
        min_matches: different n-grams of the sets that a document must hold.
        action: drop the document, or cut the text out and keep the rest as documents of its own.
        window: characters that are cut on either side, and the least that a piece must have.
        max_pieces: a document in more pieces is dropped.
        text_key: of jsonl and tables of the evaluation sets.
        documents: what one example is in a text file.
        keep_removed: write documents that go or are cut to the folder `removed` in the output.

    Raises:
        UserError: a number is out of range.
    """

    ngram: int = 13
    min_words: int = 8
    min_matches: int = 1
    action: Action = Action.DROP
    window: int = 200
    max_pieces: int = 10
    text_key: str = "text"
    documents: DocumentUnit = DocumentUnit.LINE
    keep_removed: bool = False

    def __post_init__(self) -> None:
        smallest = min(self.min_words, self.min_matches, self.max_pieces)
        if self.ngram < self.min_words or smallest < 1 or self.window < 0:
            raise UserError(
                f"n-grams of {self.ngram} words, examples from {self.min_words} words on, "
                f"{self.min_matches} matches, {self.max_pieces} pieces, window {self.window}",
                rule="1 <= min_words <= ngram; matches and pieces at least 1, window at least 0",
                remedy="leave them out to take GPT-3's 13, 8, 1, 10 and 200",
            )

    def recorded(self) -> dict[str, Any]:
        """As the identity of a run keeps it."""
        chosen = asdict(self)
        return {**chosen, "action": self.action.value, "documents": self.documents.value}


def prepare_decontaminate(
    source: Path, output: Path, sets: Sequence[NamedInput], options: DecontaminateOptions
) -> Step:
    """Read the evaluation sets, and one task a shard.

    Raises:
        UserError: a set cannot be read or holds nothing to search for.
    """
    check_apart(source, output)
    skips = SkipReport()
    described = {}
    examples = []
    form = FormatOptions(options.documents, options.text_key)
    for item in sets:
        files = find_inputs([item.path])
        described[item.name] = describe_source([item.path], files)["fingerprint"]
        texts = [found.text for _, found in read_items(files, form, skips)]
        if not texts:
            raise no_documents(skips)
        examples.append((item.name, texts))
    index = EvaluationIndex.build(examples, options.ngram, options.min_words)
    identity = {
        "input": shards_fingerprint(source),
        "against": described,
        "options": options.recorded(),
    }
    work = _Decontaminate(index, options)
    summary = partial(_summary, index, skips)
    return Step("decontaminate", output, identity, tasks_of_shards(source), work, summary, REMOVED)


@dataclass(frozen=True)
class _Decontaminate:
    index: EvaluationIndex
    options: DecontaminateOptions

    def __call__(self, task: ShardTask, folder: Path, advance: Advance) -> ShardResult:
        path = as_path(task.content)
        sources: Counts = {}
        hits = _SetHits(self.index)
        with ExitStack() as stack:
            kept = stack.enter_context(ShardWriter(folder / path.name))
            aside = None
            if self.options.keep_removed:
                aside = stack.enter_context(ShardWriter(folder / f"{REMOVED}_{path.name}"))
            for batch in _batches(path):
                found = self._contaminated(batch)
                for number, (line, document) in enumerate(batch):
                    row = sources.setdefault(document.source, _new_row())
                    row["documents"] += 1
                    if number not in found:
                        row["kept"] += 1
                        kept.write_line(line, len(document.text.encode()))
                        continue
                    names = hits.add(found[number])
                    pieces = self._pieces(document, found[number])
                    row["cut" if pieces else "dropped"] += 1
                    row["pieces"] += len(pieces)
                    for piece in pieces:
                        kept.write(piece)
                    if aside is not None:
                        meta = {**document.meta, "rejected_by": ", ".join(names)}
                        removed = Document(document.text, document.id, document.source, meta)
                        aside.write(removed)
        totals = sum_nested(sources.values())
        totals["text_bytes"] = kept.text_bytes
        return ShardResult(totals, details={"sources": sources, "sets": hits.recorded()})

    def _contaminated(self, batch: list[tuple[bytes, Document]]) -> dict[int, Hit]:
        """Number in the batch -> its hit, where it has enough matches."""
        texts = [document.text.encode() for _, document in batch]
        return {
            hit.text: hit
            for hit in self.index.search(texts)
            if len(np.unique(hit.spans, axis=0)) >= self.options.min_matches
        }

    def _pieces(self, document: Document, hit: Hit) -> list[Document]:
        """What is left of a document; nothing where it is to be dropped."""
        if self.options.action is Action.DROP:
            return []
        content, window = document.text.encode(), self.options.window
        texts, end = [], 0
        for begin, stop in [*hit.spans.tolist(), (len(content), len(content))]:
            before = content[end:begin].decode()
            # a cut takes the window on both sides of it; the ends of the document are no cuts
            left = window if end else 0
            right = len(before) - (window if begin < len(content) else 0)
            piece = before[left : max(left, right)].strip()
            if len(piece) >= max(window, 1):
                texts.append(piece)
            end = max(end, stop)
        if len(texts) > self.options.max_pieces:
            return []
        return [
            Document(text, f"{document.id}#{number}", document.source, document.meta)
            for number, text in enumerate(texts, start=1)
        ]


class _SetHits:
    """What was found of each set, in one shard."""

    def __init__(self, index: EvaluationIndex) -> None:
        self._index = index
        self._documents = [0] * len(index.set_names)
        self._ngrams = [0] * len(index.set_names)
        self._examples: list[set[int]] = [set() for _ in index.set_names]

    def add(self, hit: Hit) -> list[str]:
        """Count the hit of a document; the names of the sets."""
        sets, examples = self._index.sets_and_examples(hit.entries)
        for number in np.unique(sets).tolist():
            own = sets == number
            self._documents[number] += 1
            self._ngrams[number] += int(own.sum())
            self._examples[number].update(examples[own].tolist())
        return [self._index.set_names[number] for number in np.unique(sets).tolist()]

    def recorded(self) -> Counts:
        """As JSON; examples by their numbers, so that shards can be put together."""
        return {
            name: {
                "documents": self._documents[number],
                "ngrams": self._ngrams[number],
                "examples": sorted(self._examples[number]),
            }
            for number, name in enumerate(self._index.set_names)
        }


def _batches(path: Path) -> Iterator[list[tuple[bytes, Document]]]:
    batch: list[tuple[bytes, Document]] = []
    size = 0
    for line, document in read_documents(path):
        batch.append((line, document))
        size += len(line)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _new_row() -> Counts:
    return {"documents": 0, "kept": 0, "dropped": 0, "cut": 0, "pieces": 0}


def _summary(index: EvaluationIndex, skips: SkipReport, outcome: RunOutcome) -> Counts:
    results = list(outcome.results.values())
    sets = {}
    for number, name in enumerate(index.set_names):
        rows = [result.details["sets"][name] for result in results]
        found = set().union(*(row["examples"] for row in rows))
        sets[name] = {
            "examples": index.examples[number],
            "examples_too_short": index.too_short[number],
            "examples_found": len(found),
            "documents": sum(row["documents"] for row in rows),
            "ngrams": sum(row["ngrams"] for row in rows),
        }
    sources = sum_nested({"sources": result.details["sources"]} for result in results)
    return {**sources, "against": sets, "against_skipped": skips.counts}
