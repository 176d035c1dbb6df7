"""Which allocator a rank is started with."""

from __future__ import annotations

import ctypes.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megascale.cli import main as main_module
from megascale.launcher.allocator import OPT_OUT, allocator_variables


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    """An installed library below a folder of the architecture's name, behind one that is absent."""
    (tmp_path / "x86_64-linux-gnu").mkdir()
    (tmp_path / "x86_64-linux-gnu" / "libtcmalloc_minimal.so.4").touch()
    return [str(tmp_path / "lib64" / "none.so"), str(tmp_path / "*" / "libtcmalloc_minimal.so.4")]


def test_the_installed_one_is_loaded(places: list[str], tmp_path: Path) -> None:
    library = tmp_path / "x86_64-linux-gnu" / "libtcmalloc_minimal.so.4"
    assert allocator_variables({"PATH": "/bin"}, places) == {"LD_PRELOAD": str(library)}


@pytest.mark.parametrize("own", [{"LD_PRELOAD": "other.so"}, {"LD_PRELOAD": ""}])
def test_a_users_own_choice_stays(places: list[str], own: dict[str, str]) -> None:
    assert allocator_variables(own, places) == {}


def test_it_can_be_refused_and_may_be_absent(places: list[str]) -> None:
    assert allocator_variables({OPT_OUT: "default"}, places) == {}
    assert allocator_variables({}, places[:1]) == {}


PROGRAM = """
import os, sys
from megascale.launcher.allocator import start_again_with_allocator
start_again_with_allocator([sys.argv[1]])
maps = open("/proc/self/maps").read()
print(sys.argv[2], "libm_copy" in maps, os.environ["KEPT"])
"""


def test_a_program_starts_again_with_it_once(tmp_path: Path) -> None:
    known = ctypes.util.find_library("m")
    assert known is not None
    libraries = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    library = tmp_path / "libm_copy.so"
    library.write_bytes(Path(next(path for path in libraries if known in path)).read_bytes())
    without = {n: v for n, v in os.environ.items() if n not in ("LD_PRELOAD", OPT_OUT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(library), "argument"],
        env={**without, "KEPT": "kept"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "argument True kept\n", done.stderr
    assert done.stderr.count("allocator of the ranks") == 1


def test_only_a_program_that_starts_ranks_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class StartedAgain(Exception):
        pass

    def start_again() -> None:
        raise StartedAgain

    monkeypatch.setattr(main_module, "start_again_with_allocator", start_again)
    for options, starts in ((["--nproc", "2"], True), (["--nproc=2"], True), ([], False)):
        monkeypatch.setattr(sys, "argv", ["megascale", "--version", *options])
        with pytest.raises(StartedAgain if starts else SystemExit):
            main_module.main()
    with pytest.raises(SystemExit):  # called by another program
        main_module.main(["--version", "--nproc", "2"])
