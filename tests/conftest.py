"""Fixtures that several test folders use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megascale.data.token_file import TokenFileWriter, token_dtype
from tests.distributed import Pools

VOCAB = 96


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """Pools of ranks by world size: `pools(4).run(function, ...)`."""
    made = Pools()
    yield made
    made.close()


@pytest.fixture(scope="session")
def token_prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Megatron prefix whose next token is half predictable."""
    prefix = tmp_path_factory.mktemp("tokens") / "corpus"
    rng = np.random.default_rng(7)
    with TokenFileWriter(prefix, token_dtype(VOCAB)) as writer:
        for _ in range(120):
            length = int(rng.integers(20, 120))
            noise = rng.integers(0, 3, length)
            writer.add_document([(np.cumsum(noise) + rng.integers(0, VOCAB)) % VOCAB])
    return prefix
