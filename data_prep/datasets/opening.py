"""Datasets as a command names them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_prep.local_copies import copies_folder
from data_prep.outputs import may_replace
from megascale.data.corpus import TokenCorpus
from megascale.data.manifest import MANIFEST_NAME, DatasetManifest
from megascale.data.places import is_remote
from megascale.errors import UserError


def open_corpus(path: Path) -> TokenCorpus:
    """A dataset or Megatron prefix; of a URL, a copy in this user's temporary folder.

    Raises:
        UserError: it cannot be opened.
    """
    return TokenCorpus.open(path, cache=copies_folder() if is_remote(path) else None)


def open_with_manifest(path: Path) -> tuple[TokenCorpus, DatasetManifest]:
    """A dataset that has a manifest.

    Raises:
        UserError: it cannot be opened, or is a Megatron prefix.
    """
    corpus = open_corpus(path)
    if corpus.manifest is None:
        raise UserError(
            f"{path} is a .bin/.idx pair without a manifest",
            rule="this command needs to know the tokenizer",
            remedy=f"make a dataset of it: `python -m data_prep adopt --input {path} "
            "--tokenizer ... --output ...`",
        )
    return corpus, corpus.manifest


def check_same_kind(manifests: dict[str, DatasetManifest]) -> None:
    """Refuse datasets whose ids do not mean the same.

    Args:
        manifests: name -> manifest, at least one.

    Raises:
        UserError: mode or tokenizer differ; names both.
    """
    (first, one), *others = manifests.items()
    for name, other in others:
        for what, ours, theirs in (
            ("the tokenizer", one.tokenizer.fingerprint, other.tokenizer.fingerprint),
            ("the mode", one.mode, other.mode),
            ("the end-of-document id", one.tokenizer.eod_id, other.tokenizer.eod_id),
        ):
            if ours != theirs:
                raise UserError(
                    f"{what} of {first} is {ours}, that of {name} is {theirs}",
                    rule="datasets are put together when their ids mean the same",
                    remedy="tokenise both with one tokenizer",
                )


def replaceable_dataset(overwrite: bool, path: Path) -> bool:
    """Whether what is at `path` may go: it is a dataset, and that was asked for."""
    return overwrite and may_replace(path, MANIFEST_NAME)


def check_one_side(places: Sequence[Path]) -> None:
    """Refuse paths of which some are on a disk and others in a store, or in different ones.

    Raises:
        UserError: they are.
    """
    protocols = {str(path).partition("://")[0] if is_remote(path) else "disk" for path in places}
    if len(protocols) > 1:
        raise UserError(
            f"--input and --output lie in different places: {', '.join(sorted(protocols))}",
            rule="a manifest names files elsewhere by paths relative to its own folder",
            remedy="write it where the inputs are, or copy them to one place first",
        )
