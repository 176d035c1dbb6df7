"""Config files: YAML and dotted overrides in, every problem at once; and YAML out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megascale.config.checks import DEFAULT_CHECKS, Check
from megascale.config.problems import ABSENT, ConfigError, Problem
from megascale.config.schema import Config, Section, section_of
from megascale.config.validate import unknown_name, validate
from megascale.config.yaml_text import dump_yaml, parse_yaml


def load_config(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    checks: Sequence[Check] = DEFAULT_CHECKS,
    world_size: int | None = None,
) -> Config:
    """Read, override and check a configuration.

    Args:
        source: path of a YAML file, or the same as plain data.
        overrides: settings `section.name=value` that replace the file's; the value is YAML, the
            last one of a path wins.
        checks: rules that join several settings.
        world_size: number of ranks, where it is known; some checks need it.

    Raises:
        ConfigError: with all problems of the file, the overrides and the checks together.
    """
    name = "configuration" if isinstance(source, Mapping) else str(source)
    problems: list[Problem] = []
    if isinstance(source, Mapping):
        tree = _copied(source)
    else:
        tree, problems = _read_file(Path(source))
    suspects = [problem.path for problem in problems]
    for override in overrides:
        found, meant = _apply(override, tree)
        problems += found
        suspects += meant
    config, invalid, unknown = validate(tree)
    problems += invalid
    unknown.add(*suspects)
    for check in checks:
        if not any(unknown.touch(path) for path in check.reads):
            problems += check.run(config, world_size)
    if problems:
        raise ConfigError(problems, name)
    return config


def dump_config(config: Config) -> str:
    """YAML of every setting; `load_config` of it gives an equal Config."""
    return dump_yaml(config.model_dump(mode="json"))


def _copied(value: Any) -> Any:
    """Plain data that may be changed without changing what it was copied from."""
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return value


def _read_file(path: Path) -> tuple[dict[Any, Any], list[Problem]]:
    """The mapping in a file, and its problems: keys given twice.

    Raises:
        ConfigError: when nothing can be read from the file.
    """
    name = str(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        problem = Problem(name, ABSENT, "this file must exist", _names_nearby(path))
    except IsADirectoryError:
        problem = Problem(name, ABSENT, "must be a YAML file, not a folder", _names_nearby(path))
    except UnicodeDecodeError as error:
        rule = f"must be UTF-8 text; byte {error.start} (0x{error.object[error.start]:02x}) is not"
        problem = Problem(name, ABSENT, rule, "save the file as UTF-8")
    except (OSError, ValueError) as error:
        problem = Problem(name, ABSENT, f"must be a readable file: {error}")
    else:
        value, problems = parse_yaml(text, name)
        if isinstance(value, dict):
            return value, problems
        rule = "must hold a mapping of sections (run, model, data, ...)"
        given = ABSENT if value is None else value
        problem = problems[0] if problems else Problem(name, given, rule)
    raise ConfigError([problem], name)


def _names_nearby(path: Path) -> str:
    """Config files of the folder that was meant, or where it stops to exist."""
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names = sorted(str(found) for found in folder.glob("*.y*ml"))
    return f"there are: {', '.join(names[:5])}" if names else f"{folder} has no .yaml files"


def _apply(override: str, tree: dict[Any, Any]) -> tuple[list[Problem], list[str]]:
    """Set one override in the tree.

    Returns:
        Its problems, and the paths whose intended value is not known because of them.
    """
    path, equals, text = override.partition("=")
    path = path.strip()
    if not equals or not path or not text.strip():
        rule = "an override is written section.name=value"
        hint = f"{path}=null sets no value" if equals and path else f"write {path}=VALUE"
        return [Problem(override, ABSENT, rule, hint)], [path]
    value, problems = parse_yaml(text, path)
    if problems:
        return [Problem(path, text, problem.rule, problem.hint) for problem in problems], [path]
    found = _misdirected(path, value)
    if found is not None:
        return [found[0]], found[1]
    *sections, name = path.split(".")
    part = tree
    for section in sections:
        part = part.setdefault(section, {})
        if not isinstance(part, dict):  # the file's own problem: validate() will tell
            return [], []
    part[name] = value
    return [], []


def _misdirected(path: str, value: object) -> tuple[Problem, list[str]] | None:
    """What is wrong with an override's path, and what was meant; None for a path of a setting."""
    model: type[Section] = Config
    prefix = ""
    names = path.split(".")
    for depth, name in enumerate(names):
        if name not in model.model_fields:
            return unknown_name(path, name, value, model, prefix)
        section = section_of(model.model_fields[name])
        rest = names[depth + 1 :]
        if section is None and rest:
            leaf = prefix + name
            rule = f"{leaf} is a setting, nothing lies below it"
            if rest[0].isdigit():
                rule = f"items of a list cannot be set one by one; {leaf} is set as a whole"
            return Problem(path, value, rule, f"write {leaf}=..."), [leaf]
        if section is not None:
            if not rest:
                rule = "this is a section; an override sets one setting"
                hint = f"write {path}.NAME=..., NAME one of: {', '.join(section.model_fields)}"
                return Problem(path, value, rule, hint), [path]
            model, prefix = section, f"{prefix}{name}."
    return None
