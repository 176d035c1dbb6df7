"""Everything that can be proved of a dataset: files, index, ids and, on request, the text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.datasets.token_checks import shard_problems
from data_prep.documents import DocumentUnit
from data_prep.encoders import Backend
from data_prep.input_shards import cut_inputs, default_shard_bytes
from data_prep.local_copies import local_mirror, temporary_folder
from data_prep.progress import Advance, progress_of_bytes
from data_prep.shard_runner import complete_shard
from data_prep.sources import describe_source, find_inputs
from data_prep.token_shards import LONGEST_SENTENCE, TokenizeShard
from data_prep.worker_pool import run_tasks
from data_prep.workplace import DONE_FOLDER, ShardStore
from megascale.data.atomic_files import file_checksum
from megascale.data.manifest import DatasetManifest, ShardRecord, TokenizerRecord
from megascale.data.places import is_remote
from megascale.data.token_file import TokenFile, bin_path, idx_path
from megascale.data.tokenizer import load_tokenizer
from megascale.errors import UserError


@dataclass
class Verdict:
    """What was found.

    Attributes:
        problems: "where: what", empty for a sound dataset.
        checked: what was looked at, in words.
        deep: shards whose text was tokenised again; None when that was not asked for.
    """

    problems: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    deep: int | None = None

    def as_json(self) -> dict[str, Any]:
        """The verdict for --json."""
        return {"sound": not self.problems, **asdict(self)}


@dataclass(frozen=True)
class _Checked:
    record: ShardRecord
    prefix: Path
    tokenizer: TokenizerRecord

    def __str__(self) -> str:
        return f"shard {self.record.prefix}"


def verify(dataset: Path, workers: int, deep_shards: int | None = None) -> Verdict:
    """Check a dataset against its manifest and itself.

    Sizes and xxh3 of all files, index arithmetic, numbers of documents and tokens, ids within the
    vocabulary, end-of-document ids at the ends of documents only, the stored tokenizer.

    Args:
        dataset: its folder; of a URL, a temporary copy is checked.
        workers: processes.
        deep_shards: tokenise so many shards again from their source, and compare the files.

    Raises:
        UserError: there is no manifest that can be read.
    """
    if is_remote(dataset):
        with local_mirror(dataset) as copy:
            return verify(copy, workers, deep_shards)
    manifest = DatasetManifest.read(dataset)
    verdict = Verdict()
    verdict.checked = ["sizes", "xxh3", "index", "counts", "ids", "ends of documents", "tokenizer"]
    _check_tokenizer(dataset, manifest, verdict)
    tasks = [_Checked(shard, shard.path(dataset), manifest.tokenizer) for shard in manifest.shards]
    found: dict[str, list[str]] = {}
    with progress_of_bytes("verify", sum(shard.bin_bytes for shard in manifest.shards)) as advance:
        run_tasks(
            tasks,
            _check_shard,
            workers,
            lambda task, problems: found.update({str(task.prefix): problems}),
            advance,
        )
    for task in tasks:
        verdict.problems += [f"{task.prefix}: {what}" for what in found[str(task.prefix)]]
    if deep_shards is not None:
        _check_text(dataset, manifest, verdict, deep_shards)
    return verdict


def _check_shard(task: _Checked, advance: Advance) -> list[str]:
    record = task.record
    problems = []
    for path, size, checksum in (
        (bin_path(task.prefix), record.bin_bytes, record.bin_xxh3),
        (idx_path(task.prefix), record.idx_bytes, record.idx_xxh3),
    ):
        if not path.is_file():
            problems.append(f"{path.name} is missing")
        elif path.stat().st_size != size:
            problems.append(f"{path.name} has {path.stat().st_size} bytes, not {size}")
        elif file_checksum(path) != checksum:
            problems.append(f"{path.name} has another xxh3 than {checksum}")
    advance(record.bin_bytes)
    if any("missing" in problem for problem in problems):
        return problems
    try:
        shard = TokenFile(task.prefix)
        shard.check_index()
    except UserError as error:
        return [*problems, error.what]
    counts = (shard.num_documents, shard.num_tokens)
    if counts != (record.documents, record.tokens):
        problems.append(
            f"{counts[0]} documents and {counts[1]} tokens, not {record.documents} and "
            f"{record.tokens}"
        )
    return problems + shard_problems(shard, task.tokenizer)


def _check_tokenizer(dataset: Path, manifest: DatasetManifest, verdict: Verdict) -> None:
    try:
        found = load_tokenizer(dataset / manifest.tokenizer.folder).fingerprint
    except UserError as error:
        verdict.problems.append(f"tokenizer: {error.what}")
        return
    if found != manifest.tokenizer.fingerprint:
        verdict.problems.append(
            f"tokenizer: fingerprint {found}, the ids were made with "
            f"{manifest.tokenizer.fingerprint}"
        )


def _check_text(dataset: Path, manifest: DatasetManifest, verdict: Verdict, most: int) -> None:
    """Tokenise some shards again; they must come out byte for byte."""
    verdict.deep = 0
    recipe, source = manifest.recipe, manifest.source
    if recipe.get("step") != "tokenize":
        verdict.checked.append("no text: the dataset was not made by tokenize itself")
        return
    try:
        files = find_inputs(source["inputs"])
        found = describe_source(source["inputs"], files)["fingerprint"]
    except UserError as error:
        verdict.problems.append(f"source: {error.what}")
        return
    if found != source["fingerprint"]:
        verdict.problems.append("source: its files are not the ones that were tokenised")
        return
    unit = DocumentUnit(recipe["documents"])
    size = recipe.get("shard_bytes") or default_shard_bytes(source["bytes"])
    work = TokenizeShard(
        tokenizer_path=dataset / manifest.tokenizer.folder,
        fingerprint=manifest.tokenizer.fingerprint,
        backend=Backend.AUTO,
        documents=unit,
        text_key=recipe["text_key"],
        sentence_limit=(
            recipe.get("max_sentence_tokens", LONGEST_SENTENCE) if manifest.mode == "bert" else None
        ),
    )
    records = {shard.prefix: shard for shard in manifest.shards}
    tasks = [task for task in cut_inputs(files, unit, size) if task.name in records]
    step = max(1, len(tasks) // max(most, 1))
    for task in tasks[::step][:most]:
        with temporary_folder() as folder:
            (folder / DONE_FOLDER).mkdir()
            store = ShardStore(str(folder), folder)
            made = complete_shard(store, work, task, lambda done: None).files
        wanted = records[task.name]
        verdict.deep += 1
        for suffix, xxh3 in (("bin", wanted.bin_xxh3), ("idx", wanted.idx_xxh3)):
            if made[f"{task.name}.{suffix}"].xxh3 != xxh3:
                verdict.problems.append(f"{task.name}.{suffix}: the source gives other content")
