"""The rules that keep the tree readable, checked on the syntax tree of every file.

Each rule is a function from a `Source` to the violations in it, and each has a planted source
that it must refuse: a rule that cannot fail checks nothing. Thresholds stand here only, and no
file is excluded.
"""

from __future__ import annotations

import ast
import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("megascale", "data_prep")
SCRIPTS = ("tools", "launch")  # our Python outside the two packages

# Lowest first. A module imports from its own package and from lower layers.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "wide"),
    ("file_lock", "kernels"),
    ("config",),
    ("models",),
    ("parallel",),
    ("engine", "checkpoint", "optim", "data", "resilience"),
    ("planner",),
    ("training", "launcher", "hf"),
    ("verification", "importers"),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
DATA_PREP_MAY_IMPORT = ("data", "config", "errors", "file_lock")
WITHOUT_DISTRIBUTED = ("models", "data", "optim", "config")
UNPICKLERS = (
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"),
    *("torch.load", "pandas.read_pickle"),
)
WEIGHTS_ONLY_READER = "megascale/importers/torch_files.py"
"""The one file that calls torch.load: other programs' checkpoints, with weights_only=True."""
VAGUE_NAMES = ("util", "utils", "helper", "helpers", "misc", "common")

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 100
MAX_FUNCTION_LINES_P90 = 45
SHORT_METHOD_LINES = 5  # a public method up to this long may speak for itself

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
Violations = Iterator[str]


@dataclass(frozen=True)
class Source:
    """One Python file: its path relative to the repository root, and its text."""

    path: PurePosixPath
    text: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=str(self.path))

    @property
    def top(self) -> str:
        """The folder right under the root: megascale, data_prep, tools or launch."""
        return self.path.parts[0]

    @property
    def part(self) -> str:
        """The package of megascale that the file belongs to; "" for megascale/__init__.py."""
        if len(self.path.parts) > 2:
            return self.path.parts[1]
        return "" if self.path.stem == "__init__" else self.path.stem

    @property
    def package(self) -> list[str]:
        """Dotted parts of the package that relative imports start from."""
        return list(self.path.parent.parts)

    def at(self, node: ast.AST, message: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {message}"

    @functools.cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @functools.cached_property
    def imports(self) -> list[tuple[ast.AST, str, str]]:
        """(node, local name, absolute dotted name) of every import, however deep it stands."""
        found: list[tuple[ast.AST, str, str]] = []
        for node in self.nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    local = alias.asname or alias.name.partition(".")[0]
                    found.append((node, local, alias.name))
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node)
                for alias in node.names:
                    found.append((node, alias.asname or alias.name, f"{base}.{alias.name}"))
            elif isinstance(node, ast.Call) and (name := _imported_by_call(node)):
                found.append((node, "", name))
        return found

    def _absolute(self, node: ast.ImportFrom) -> str:
        if node.level == 0:
            return node.module or ""
        base = self.package[: len(self.package) - node.level + 1]
        return ".".join(base + ([node.module] if node.module else []))

    @functools.cached_property
    def uses(self) -> list[tuple[ast.AST, str]]:
        """Every imported name and every `a.b.c` that begins with an import, written in full."""
        full_names = {}
        for node, local, name in self.imports:
            plain = isinstance(node, ast.Import) and name.partition(".")[0] == local
            full_names[local] = local if plain else name
        found = [(node, name) for node, _, name in self.imports]
        for node in self.nodes:
            dotted = _dotted(node)
            head, _, rest = dotted.partition(".")
            if rest and head in full_names:
                found.append((node, f"{full_names[head]}.{rest}"))
        return found

    def uses_of(self, *prefixes: str) -> Iterator[tuple[ast.AST, str]]:
        """The first use on each line of one of the dotted names or of something below it."""
        lines = set()
        for node, name in self.uses:
            line = getattr(node, "lineno", 1)
            below = any(name == p or name.startswith(p + ".") for p in prefixes)
            if below and line not in lines:
                lines.add(line)
                yield node, name


def _imported_by_call(node: ast.Call) -> str:
    called = _dotted(node.func).rpartition(".")[2]
    first = node.args[0] if node.args else None
    if called not in ("import_module", "__import__") or not isinstance(first, ast.Constant):
        return ""
    return str(first.value)


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def _megascale_part(name: str) -> str | None:
    """The layer that a dotted name belongs to; "" for megascale itself, None for others."""
    parts = name.split(".")
    if parts[0] != "megascale":
        return None
    return "" if len(parts) == 1 or parts[1] == "__version__" else parts[1]


# ---- the rules --------------------------------------------------------------------------------


def imports_run_one_way(source: Source) -> Violations:
    if source.top == "megascale" and source.part and source.part not in RANK:
        yield f"{source.path}:1: {source.part!r} has no layer; give it a place in LAYERS"
        return
    for node, _, name in source.imports:
        target = _megascale_part(name)
        of_data_prep = name.partition(".")[0] == "data_prep" and source.top == "megascale"
        if of_data_prep and source.part != "cli":
            yield source.at(node, f"imports {name}; of megascale only cli imports data_prep")
        if target is None or target in ("", "errors", source.part):
            continue
        if source.top == "data_prep" and target not in DATA_PREP_MAY_IMPORT:
            allowed = ", ".join(f"megascale.{part}" for part in DATA_PREP_MAY_IMPORT)
            yield source.at(node, f"imports {name}; data_prep may import {allowed}")
        if source.top == "megascale" and not _may_import(source.part, target):
            yield source.at(node, f"imports {name}; {_layer_rule(source.part)}")


def _may_import(part: str, target: str) -> bool:
    return RANK.get(target, len(LAYERS)) < RANK.get(part, 0)


def _layer_rule(part: str) -> str:
    lower = [name for names in LAYERS[: RANK.get(part, 0)] for name in names]
    return f"{part or 'megascale/__init__'} may import itself and {', '.join(lower) or 'nothing'}"


def deepspeed_stays_in_its_engine(source: Source) -> Violations:
    homes = ("megascale/engine", "tools/bench", "tools/bench/peers")
    if str(source.path.parent) in homes and "deepspeed" in source.path.stem:
        return
    for node, name in source.uses_of("deepspeed"):
        yield source.at(
            node, f"{name}: only *deepspeed*.py in megascale/engine and tools/bench imports it"
        )


def mpu_stays_in_the_engine(source: Source) -> Violations:
    if str(source.path) in ("megascale/engine/mpu.py", "megascale/engine/deepspeed_engine.py"):
        return
    for number, line in enumerate(source.text.splitlines(), start=1):
        if re.search(r"(?<![a-z])mpu(?![a-z])", line, re.IGNORECASE):
            yield f"{source.path}:{number}: the word mpu belongs to engine/mpu.py"


def distribution_stays_out(source: Source) -> Violations:
    if source.top != "megascale" or source.part not in WITHOUT_DISTRIBUTED:
        return
    for node, name in source.uses_of("torch.distributed"):
        yield source.at(node, f"{name}: {source.part} gets ranks and sizes as ints")


def environment_is_read_in_launcher(source: Source) -> Violations:
    if source.top not in PRODUCT or (source.top == "megascale" and source.part == "launcher"):
        return
    for node, name in source.uses_of("os.environ", "os.environb", "os.getenv", "os.getenvb"):
        yield source.at(node, f"{name}: the environment is read in megascale/launcher/ only")


def no_globals(source: Source) -> Violations:
    for node in source.nodes:
        if isinstance(node, ast.Global):
            yield source.at(node, f"global {', '.join(node.names)}: pass it as an argument")


def nothing_is_unpickled(source: Source) -> Violations:
    for node, name in source.uses_of(*UNPICKLERS):
        if not (str(source.path) == WEIGHTS_ONLY_READER and name == "torch.load"):
            yield source.at(node, f"{name}: nothing that is read is unpickled")
    if str(source.path) == WEIGHTS_ONLY_READER:
        yield from _loads_that_run_code(source)
    for node in source.nodes:
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                refused = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg == "allow_pickle" and not refused:
                    yield source.at(node, "allow_pickle: nothing that is read is unpickled")


def _loads_that_run_code(source: Source) -> Violations:
    """Calls of torch.load without weights_only=True, and safe names that are no stand-ins."""
    for node in source.nodes:
        if not isinstance(node, ast.Call):
            continue
        called = _dotted(node.func)
        safe = any(ast.unparse(k) == "weights_only=True" for k in node.keywords)
        if called == "torch.load" and not safe:
            yield source.at(node, "torch.load: with weights_only=True, written out")
        inert = {"[(StandIn, name) for name in stand_ins]", "allowed"}
        allows = called.rpartition(".")[2] in ("add_safe_globals", "safe_globals")
        if allows and not {ast.unparse(argument) for argument in node.args} <= inert:
            yield source.at(node, f"{called}: only stand-ins, which do nothing, are allowed")


def checkpoint_has_its_own_format(source: Source) -> Violations:
    if source.top == "megascale" and source.part == "checkpoint":
        for node, name in source.uses_of("torch.distributed.checkpoint"):
            yield source.at(node, f"{name}: checkpoints are safetensors + JSON, not DCP's pickles")


def names_say_what_is_inside(source: Source) -> Violations:
    for name in (*source.path.parts[:-1], source.path.stem):
        if name in VAGUE_NAMES:
            yield f"{source.path}:1: {name!r} says nothing; name a module after what it holds"


def sizes_are_kept(source: Source) -> Violations:
    count = len(source.text.splitlines())
    if count > MAX_FILE_LINES:
        yield f"{source.path}:1: {count} lines; a file has at most {MAX_FILE_LINES}"
    for function, length in function_lengths(source):
        if length > MAX_FUNCTION_LINES:
            limit = f"a function has at most {MAX_FUNCTION_LINES}"
            yield source.at(function, f"{function.name}: {length} lines; {limit}")


def nothing_runs_on_import(source: Source) -> Violations:
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assignments = (ast.Assign, ast.AnnAssign, ast.AugAssign)
    for node in source.tree.body:
        if (
            _is_docstring(node)
            or isinstance(node, definitions + assignments)
            or _is_known_guard(node)
        ):
            continue
        yield source.at(node, f"{type(node).__name__} at module level runs on import")


def _is_docstring(node: ast.stmt) -> bool:
    """A bare string: the module's docstring, or one under a constant."""
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _is_known_guard(node: ast.stmt) -> bool:
    known = ("TYPE_CHECKING", "typing.TYPE_CHECKING", "__name__ == '__main__'")
    return isinstance(node, ast.If) and ast.unparse(node.test) in known


def public_things_have_docstrings(source: Source) -> Violations:
    if ast.get_docstring(source.tree) is None:
        yield f"{source.path}:1: the module has no docstring"
    yield from _undocumented(source, source.tree, in_class=False)


def _undocumented(source: Source, owner: ast.Module | ast.ClassDef, in_class: bool) -> Violations:
    for node in owner.body:
        if not isinstance(node, ast.ClassDef | FunctionNode) or node.name.startswith("_"):
            continue
        is_class = isinstance(node, ast.ClassDef)
        short = in_class and not is_class and _line_count(node) <= SHORT_METHOD_LINES
        if ast.get_docstring(node) is None and not short:
            yield source.at(node, f"{node.name} is public and has no docstring")
        if isinstance(node, ast.ClassDef):
            yield from _undocumented(source, node, in_class=True)


def _line_count(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def function_lengths(source: Source) -> Iterator[tuple[FunctionNode, int]]:
    """Every function, nested ones and methods too, with its lines from `def` to its end."""
    for node in source.nodes:
        if isinstance(node, FunctionNode):
            yield node, _line_count(node)


def percentile_90(lengths: list[int]) -> int:
    """The smallest length that at least 90 % of the lengths do not exceed; 0 for none."""
    return sorted(lengths)[math.ceil(0.9 * len(lengths)) - 1] if lengths else 0


# ---- the tree, and one planted violation or more for every rule ---------------------------------

Rule = Callable[[Source], Violations]


@functools.cache
def sources() -> tuple[Source, ...]:
    paths = sorted(path for top in PRODUCT + SCRIPTS for path in (ROOT / top).rglob("*.py"))
    return tuple(
        Source(PurePosixPath(path.relative_to(ROOT).as_posix()), path.read_text("utf-8"))
        for path in paths
    )


EVERYWHERE = (deepspeed_stays_in_its_engine, mpu_stays_in_the_engine, names_say_what_is_inside)
IN_PRODUCT = (
    imports_run_one_way,
    distribution_stays_out,
    environment_is_read_in_launcher,
    no_globals,
    nothing_is_unpickled,
    checkpoint_has_its_own_format,
    sizes_are_kept,
    nothing_runs_on_import,
    public_things_have_docstrings,
)
LONG_FUNCTION = "def f():\n" + "    pass\n" * MAX_FUNCTION_LINES

# (rule, path, text, whether the rule must refuse it)
PLANTED: list[tuple[Rule, str, str, bool]] = [
    (imports_run_one_way, "megascale/models/gpt.py", "import megascale.training.step", True),
    (imports_run_one_way, "megascale/models/gpt.py", "from megascale import parallel", True),
    (imports_run_one_way, "megascale/parallel/mesh.py", "from ..engine import mpu", True),
    (imports_run_one_way, "megascale/parallel/mesh.py", "from ..models import gpt", False),
    (imports_run_one_way, "megascale/optim/schedule.py", "from ..engine.protocol import X", True),
    (imports_run_one_way, "megascale/config/load.py", "def f():\n    from ..data import x", True),
    (imports_run_one_way, "megascale/data/blend.py", "import data_prep.clean", True),
    (imports_run_one_way, "megascale/training/a.py", "import data_prep.clean", True),
    (imports_run_one_way, "megascale/cli/a.py", "import data_prep.clean", False),
    (imports_run_one_way, "megascale/new/thing.py", "", True),
    (imports_run_one_way, "megascale/cli/train.py", "from megascale.unknown import x", True),
    (imports_run_one_way, "megascale/errors.py", "from megascale.config import schema", True),
    (imports_run_one_way, "megascale/__init__.py", "from .training import trainer", True),
    (imports_run_one_way, "data_prep/clean.py", "from megascale.training import step", True),
    (imports_run_one_way, "data_prep/clean.py", "from megascale.data import token_file", False),
    (imports_run_one_way, "megascale/training/callbacks/a.py", "from ..step import x", False),
    (imports_run_one_way, "megascale/models/gpt.py", "from megascale import __version__", False),
    (imports_run_one_way, "megascale/cli/train.py", "from ..training import trainer", False),
    (imports_run_one_way, "megascale/config/load.py", "from megascale.errors import X", False),
    (deepspeed_stays_in_its_engine, "megascale/training/step.py", "import deepspeed", True),
    (deepspeed_stays_in_its_engine, "megascale/engine/mpu.py", "import deepspeed.comm", True),
    (deepspeed_stays_in_its_engine, "tools/a.py", "__import__('deepspeed')", True),
    (deepspeed_stays_in_its_engine, "tools/bench/deepspeed_peer.py", "import deepspeed", False),
    (deepspeed_stays_in_its_engine, "megascale/importers/deepspeed.py", "import deepspeed", True),
    (deepspeed_stays_in_its_engine, "megascale/cli/a.py", "import deepspeed_tools", False),
    (deepspeed_stays_in_its_engine, "megascale/engine/deepspeed_x.py", "import deepspeed", False),
    (mpu_stays_in_the_engine, "megascale/parallel/mesh.py", "# what the MPU holds", True),
    (mpu_stays_in_the_engine, "megascale/parallel/mesh.py", "x = build_mpu()", True),
    (mpu_stays_in_the_engine, "megascale/parallel/mesh.py", "x = compute_input()", False),
    (distribution_stays_out, "megascale/models/gpt.py", "from torch import distributed", True),
    (distribution_stays_out, "megascale/data/blend.py", "import torch.distributed as d", True),
    (distribution_stays_out, "megascale/optim/a.py", "import torch\nx = torch.distributed.P", True),
    (distribution_stays_out, "megascale/models/gpt.py", "import torch.nn", False),
    (environment_is_read_in_launcher, "megascale/cli/a.py", "import os\nx = os.environ", True),
    (environment_is_read_in_launcher, "data_prep/a.py", "import os as o\nx = o.getenv(1)", True),
    (environment_is_read_in_launcher, "data_prep/a.py", "from os import environ", True),
    (environment_is_read_in_launcher, "megascale/launcher/a.py", "from os import environ", False),
    (no_globals, "megascale/cli/a.py", "def f():\n    global x", True),
    (nothing_is_unpickled, "data_prep/a.py", "import pickle", True),
    (nothing_is_unpickled, "megascale/data/a.py", "import torch as t\nt.load(1)", True),
    (nothing_is_unpickled, "megascale/data/a.py", "np.load(p, allow_pickle=True)", True),
    (nothing_is_unpickled, "megascale/data/a.py", "np.load(p, allow_pickle=flag)", True),
    (nothing_is_unpickled, "megascale/data/a.py", "np.load(p, allow_pickle=False)", False),
    (nothing_is_unpickled, WEIGHTS_ONLY_READER, "import torch\ntorch.load(p)", True),
    (
        nothing_is_unpickled,
        WEIGHTS_ONLY_READER,
        "import torch\ntorch.load(p, weights_only=x)",
        True,
    ),
    (nothing_is_unpickled, WEIGHTS_ONLY_READER, "torch.load(p, weights_only=True)", False),
    (
        nothing_is_unpickled,
        WEIGHTS_ONLY_READER,
        "import torch\ntorch.serialization.add_safe_globals([print])",
        True,
    ),
    (nothing_is_unpickled, WEIGHTS_ONLY_READER, "import pickle", True),
    (
        nothing_is_unpickled,
        "megascale/importers/deepspeed.py",
        "import torch\ntorch.load(p, weights_only=True)",
        True,
    ),
    (
        checkpoint_has_its_own_format,
        "megascale/checkpoint/a.py",
        "import torch.distributed as dist\ndist.checkpoint.save(x)",
        True,
    ),
    (names_say_what_is_inside, "megascale/data/utils.py", "", True),
    (names_say_what_is_inside, "megascale/common/a.py", "", True),
    (sizes_are_kept, "megascale/data/a.py", "\n" * (MAX_FILE_LINES + 1), True),
    (sizes_are_kept, "megascale/data/a.py", LONG_FUNCTION, True),
    (sizes_are_kept, "megascale/data/a.py", "\n" * MAX_FILE_LINES, False),
    (nothing_runs_on_import, "megascale/data/a.py", "print(1)", True),
    (nothing_runs_on_import, "megascale/data/a.py", "for x in y:\n    pass", True),
    (nothing_runs_on_import, "megascale/data/a.py", "if x:\n    y = 1", True),
    (nothing_runs_on_import, "megascale/data/a.py", "'''D.'''\nX = 1\n'''One.'''", False),
    (nothing_runs_on_import, "data_prep/a.py", "if __name__ == '__main__':\n    f()", False),
    (public_things_have_docstrings, "megascale/data/a.py", "x = 1", True),
    (public_things_have_docstrings, "megascale/data/a.py", "'''D.'''\ndef f(): ...", True),
    (public_things_have_docstrings, "megascale/data/a.py", "'''D.'''\nclass A: ...", True),
    (
        public_things_have_docstrings,
        "megascale/data/a.py",
        "'''D.'''\nclass A:\n    '''D.'''\n    def f():\n" + "        pass\n" * 5,
        True,
    ),
    (public_things_have_docstrings, "megascale/data/a.py", "'''D.'''\ndef _f(): ...", False),
]


@pytest.mark.parametrize("rule", EVERYWHERE + IN_PRODUCT, ids=lambda rule: rule.__name__)
def test_tree_keeps_the_rule(rule: Rule) -> None:
    checked = [s for s in sources() if rule in EVERYWHERE or s.top in PRODUCT]
    violations = [violation for source in checked for violation in rule(source)]
    assert checked
    assert not violations, "\n".join(["", *violations])


def test_functions_fit_on_a_screen() -> None:
    product = [source for source in sources() if source.top in PRODUCT]
    lengths = [length for source in product for _, length in function_lengths(source)]
    assert percentile_90(lengths) <= MAX_FUNCTION_LINES_P90


@pytest.mark.parametrize(
    ("rule", "path", "text", "refused"),
    PLANTED,
    ids=[f"{rule.__name__}-{number}" for number, (rule, *_) in enumerate(PLANTED)],
)
def test_rule_can_fail(rule: Rule, path: str, text: str, refused: bool) -> None:
    violations = list(rule(Source(PurePosixPath(path), text)))
    assert bool(violations) is refused, violations
    assert all(re.match(rf"{re.escape(path)}:\d+: ", violation) for violation in violations)


def test_every_rule_has_a_planted_violation() -> None:
    assert {rule for rule, _, _, refused in PLANTED if refused} == set(EVERYWHERE + IN_PRODUCT)


def test_percentile_sees_long_functions() -> None:
    assert percentile_90([]) == 0
    assert percentile_90([10] * 9 + [99]) == 10
    assert percentile_90([10] * 8 + [99] * 2) == 99
    nested = "def f():\n    def g():\n        pass\n"
    lengths = function_lengths(Source(PurePosixPath("megascale/a.py"), nested))
    assert [length for _, length in lengths] == [3, 2]
