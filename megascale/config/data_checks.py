"""Rules of the data section: what is trained on, and how samples are made of it."""

from __future__ import annotations

from collections.abc import Iterator

from megascale.config.problems import ABSENT, Problem
from megascale.config.rules import Check, ignored
from megascale.config.schema import Config


def data_is_given(config: Config, world_size: int | None) -> Iterator[Problem]:
    """There is one mix or a list of them, not both and not neither."""
    if config.data.path is None and not config.data.stages:
        hint = "Example: data.path: data/my_dataset"
        yield Problem("data.path", ABSENT, "must be given, where data.stages is not", hint)
    if config.data.path is not None and config.data.stages:
        rule = "data.stages says what is read from every sample on, so data.path must be null"
        hint = "leave data.path out, or make it the first stage, with from_sample 0"
        yield Problem("data.path", config.data.path, rule, hint)


def remote_data_is_copied(config: Config, world_size: int | None) -> Iterator[Problem]:
    """Token files are mapped into memory, which an object store cannot do."""
    paths = [*config.data.source_paths, *config.data.validation.values()]
    remote = [p for p in paths if "://" in p and not p.startswith(("file://", "local://"))]
    if remote and config.data.cache_dir is None:
        rule = f"must be given, since {remote[0]} is copied to each machine before it is read"
        hint = "a folder on the machines' own disks, for example data.cache_dir = /scratch/data"
        yield Problem("data.cache_dir", None, rule, hint)


def isolation_needs_company(config: Config, world_size: int | None) -> Iterator[Problem]:
    """A document that is alone in its sample is isolated already."""
    if config.data.isolate_documents and config.data.packing == "one_document":
        rule = "has an effect only when a sample holds several documents; data.packing is "
        yield Problem(
            "data.isolate_documents",
            True,
            rule + "one_document",
            "leave it out, or data.packing = best_fit",
        )


DATA_CHECKS: tuple[Check, ...] = (
    Check(("data.path", "data.stages"), data_is_given),
    Check(("data.cache_dir", "data.path", "data.stages", "data.validation"), remote_data_is_copied),
    Check(("data.isolate_documents", "data.packing"), isolation_needs_company),
    ignored("data.fim_spm_rate", "data.fim_rate", bool, "data.fim_rate is above 0"),
)
