"""YAML text in and out, without YAML's surprises.

`yaml.safe_load`, except that
- `1e-3` and `1E5` are floats, as in YAML 1.2;
- `010`, `1:30` and `2024-01-31` stay text, where YAML 1.1 makes 8, 90 and a date of them;
- a key that is given twice is reported instead of the first one being dropped.
What `dump_yaml` writes, `parse_yaml` reads back equal, floats to the last bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from megascale.config.problems import ABSENT, Problem

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$")
_FLOAT = re.compile(
    r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |[0-9][0-9_]*[eE][-+]?[0-9]+
        |\.(?:inf|Inf|INF))$
    |\.(?:nan|NaN|NAN)$""",
    re.VERBOSE,
)
_NUMBER_STARTS = list("-+.0123456789")
_REPLACED = ("int", "float", "timestamp")


def _resolvers() -> dict[str | None, list[tuple[str, re.Pattern[str]]]]:
    """First character -> (tag, pattern) of plain scalars, for reading and for quoting."""
    replaced = {f"tag:yaml.org,2002:{name}" for name in _REPLACED}
    table = {
        first: [(tag, pattern) for tag, pattern in rows if tag not in replaced]
        for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for first in _NUMBER_STARTS:
        rows = table.setdefault(first, [])
        rows += [("tag:yaml.org,2002:int", _INT), ("tag:yaml.org,2002:float", _FLOAT)]
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        # PyYAML lets Python's own errors through, e.g. for `!!int x` or 5,000 digits.
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise yaml.constructor.ConstructorError(
                None, None, f"this value cannot be read: {error}", node.start_mark
            ) from error


def _represent_list(dumper: yaml.representer.BaseRepresenter, data: Any) -> yaml.Node:
    scalars = not any(isinstance(item, (list, dict)) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=scalars)


def _represent_str(dumper: yaml.representer.BaseRepresenter, data: Any) -> yaml.Node:
    # Outside double quotes PyYAML writes U+0085 and its like as line breaks, read back as spaces.
    style = None if data.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style=style)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _resolvers()
    yaml_representers = {  # noqa: RUF012
        **yaml.SafeDumper.yaml_representers,
        list: _represent_list,
        str: _represent_str,
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


def parse_yaml(text: str, name: str) -> tuple[Any, list[Problem]]:
    """The value of one YAML document, and what is wrong with it.

    Args:
        text: the document.
        name: the file's name or the override, the path of a problem of syntax.

    Returns:
        The value (None after an error of syntax) and the problems: one of syntax, or one for each
        key given twice, at the key's dotted path.
    """
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, []
        duplicates = list(_duplicate_keys(node, "", set()))
        return loader.construct_document(node), duplicates
    except yaml.YAMLError as error:
        return None, [_syntax_problem(error, text, name)]
    except RecursionError:
        return None, [Problem(name, ABSENT, "YAML must not be nested this deeply")]
    finally:
        if loader is not None:
            loader.dispose()


def dump_yaml(value: Any) -> str:
    """YAML of plain data: block style, keys in their order, lists of scalars on one line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _duplicate_keys(node: yaml.Node, path: str, seen: set[int]) -> Iterator[Problem]:
    if id(node) in seen:  # an alias, possibly to a node around it
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _duplicate_keys(item, f"{path}[{index}]", seen)
    if not isinstance(node, yaml.MappingNode):
        return
    first_lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        here = f"{path}.{key.value}" if path else key.value
        line = key.start_mark.line + 1
        if (key.tag, key.value) in first_lines:
            first = first_lines[key.tag, key.value]
            yield Problem(
                here,
                value.value if isinstance(value, yaml.ScalarNode) else "(a mapping or list)",
                f"a name may be given only once; lines {first} and {line} both give it",
                "remove one of the two",
            )
        first_lines.setdefault((key.tag, key.value), line)
        yield from _duplicate_keys(value, here, seen)


def _syntax_problem(error: yaml.YAMLError, text: str, name: str) -> Problem:
    hint = "check the indentation, brackets and quotes there"
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - (before.rfind("\n") + 1) + 1
        what = f"character U+{int(error.character):04X} is not allowed in YAML"
        hint = "remove it, or write it as an escape inside double quotes"
    elif isinstance(error, yaml.MarkedYAMLError) and (error.problem_mark or error.context_mark):
        mark = error.problem_mark or error.context_mark
        assert mark is not None
        line, column = mark.line + 1, mark.column + 1
        what = ", ".join(part for part in (error.context, error.problem) if part)
    else:
        return Problem(name, ABSENT, f"not valid YAML: {error}", hint)
    lines = text.splitlines()
    shown = lines[line - 1].strip() if line <= len(lines) else ABSENT
    return Problem(name, shown, f"not valid YAML at line {line}, column {column}: {what}", hint)
