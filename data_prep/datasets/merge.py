"""Several datasets as one, by a manifest that names their files: nothing is copied."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_prep.datasets.copying import described, save_tokenizer
from data_prep.datasets.opening import check_same_kind, open_with_manifest
from data_prep.outputs import check_output_folder, may_replace
from megascale.data.atomic_files import new_folder
from megascale.data.manifest import MANIFEST_NAME, DatasetManifest, ShardRecord
from megascale.errors import UserError


def merge(inputs: Sequence[Path], output: Path, overwrite: bool = False) -> DatasetManifest:
    """Write a dataset that holds the shards of `inputs`, in this order.

    The shards stay where they are; the manifest names their folders relative to its own, so that
    all can be moved together. Without them the new dataset cannot be read.

    Raises:
        UserError: an input cannot be opened, two of them are the same or do not fit together, or
            the output is taken.
    """
    opened = {str(path): open_with_manifest(path) for path in inputs}
    if len(opened) < 2:
        raise UserError(
            f"{len(opened)} dataset to merge",
            rule="at least two different ones make a merge",
            remedy="give --input several times",
        )
    manifests = {path: manifest for path, (_, manifest) in opened.items()}
    check_same_kind(manifests)
    _check_different(manifests)
    check_output_folder(output, MANIFEST_NAME, overwrite)
    first = next(iter(manifests.values()))
    skipped: Counter[str] = Counter()
    for manifest in manifests.values():
        skipped.update(manifest.skipped)
    merged = DatasetManifest(
        mode=first.mode,
        tokenizer=first.tokenizer.model_copy(update={"folder": "tokenizer"}),
        shards=[
            _moved(shard, Path(path), output)
            for path, manifest in manifests.items()
            for shard in manifest.shards
        ],
        source={"merged": [described(m, Path(path)) for path, m in manifests.items()]},
        recipe={"step": "merge"},
        skipped=dict(skipped),
    )
    tokenizer = next(iter(opened.values()))[0].tokenizer
    assert tokenizer is not None
    with new_folder(output, lambda path: overwrite and may_replace(path, MANIFEST_NAME)) as folder:
        save_tokenizer(tokenizer, folder / "tokenizer")
        merged.save(folder)
    return merged


def _moved(shard: ShardRecord, dataset: Path, output: Path) -> ShardRecord:
    """The record as seen from `output`."""
    folder = os.path.abspath(shard.path(dataset).parent)
    relative = os.path.relpath(folder, os.path.abspath(output))
    return shard.model_copy(update={"folder": relative})


def _check_different(manifests: dict[str, DatasetManifest]) -> None:
    seen: dict[str, str] = {}
    for path, manifest in manifests.items():
        if manifest.fingerprint in seen:
            raise UserError(
                f"{path} holds the same tokens as {seen[manifest.fingerprint]}",
                rule="a dataset is merged once",
                remedy="leave one out; to read it more often, give it a weight in data.sources",
            )
        seen[manifest.fingerprint] = path
