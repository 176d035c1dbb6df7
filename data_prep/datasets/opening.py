"""Datasets as a command names them."""

from __future__ import annotations

from pathlib import Path

from megascale.data.corpus import TokenCorpus
from megascale.data.manifest import DatasetManifest
from megascale.errors import UserError


def open_with_manifest(path: Path) -> tuple[TokenCorpus, DatasetManifest]:
    """A dataset that has a manifest.

    Raises:
        UserError: it cannot be opened, or is a Megatron prefix.
    """
    corpus = TokenCorpus.open(path)
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
