"""Files of torch.save that ask for code: refused by name, and nothing of them is run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megascale.errors import UserError
from megascale.importers.torch_files import StandIn, load_file


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.target),)


class Custom:
    """A class of a program."""


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("package", [None, "megatron", "posix"])
def test_code_is_refused_by_name_and_not_run(
    tmp_path: Path, zipped: bool, package: str | None
) -> None:
    path, target = tmp_path / "f.pt", tmp_path / "made"
    content = {"w": torch.ones(3), "x": Bomb(target)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError) as caught:
        load_file(path, ["argparse.Namespace"], package)
    assert not target.exists()
    assert str(path) in caught.value.what
    if package != "posix":
        assert "posix.mkdir" in caught.value.what
        assert "weights_only=False" in caught.value.remedy


def test_what_others_have_allowed_is_not_allowed_here(tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    torch.save({"x": Custom()}, path)
    torch.serialization.add_safe_globals([Custom])
    try:
        with pytest.raises(UserError, match=r"needs code to be read: it holds .*Custom"):
            load_file(path)
        assert Custom in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()


def test_the_environment_cannot_turn_the_protection_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"x": Bomb(tmp_path / "made")}, tmp_path / "f.pt")
    with pytest.raises(UserError, match=r"posix\.mkdir"):
        load_file(tmp_path / "f.pt")
    assert not (tmp_path / "made").exists()


def test_a_stand_in_keeps_what_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    args = argparse.Namespace(layers=3, dtype=torch.bfloat16)
    torch.save({"args": args, "w": torch.arange(3)}, path)
    loaded = load_file(path, ["argparse.Namespace"])
    assert type(loaded["args"]) is StandIn
    assert loaded["args"].state == {"layers": 3, "dtype": torch.bfloat16}
    assert torch.equal(loaded["w"], torch.arange(3))
    assert torch.serialization.get_safe_globals() == []


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04" + bytes(60), b"\x80\x02."])
def test_damage_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.pt").write_bytes(content)
    with pytest.raises(UserError, match="no intact file of torch"):
        load_file(tmp_path / "f.pt")


def test_other_things_than_a_dictionary_are_refused(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "f.pt")
    with pytest.raises(UserError, match="holds a list"):
        load_file(tmp_path / "f.pt")
    with pytest.raises(UserError, match="cannot be read"):
        load_file(tmp_path / "none.pt")
