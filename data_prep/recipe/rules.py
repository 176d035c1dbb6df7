"""Rules of cleaning as they are written in YAML: a name, or a name with settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.clean.registry import RULES
from data_prep.clean.rule import Rule
from data_prep.recipe.problems import build, of_error, unknown_name
from megascale.config.problems import ConfigError, Problem
from megascale.config.yaml_text import parse_yaml
from megascale.errors import UserError


def parse_rules(given: Sequence[Any], path: str) -> tuple[tuple[Rule, ...], list[Problem]]:
    """The rules of a list, and what is wrong with it."""
    rules: list[Rule] = []
    problems: list[Problem] = []
    for number, entry in enumerate(given):
        where = f"{path}[{number}]"
        name, settings, problem = one_entry(entry, where)
        if problem is not None:
            problems.append(problem)
            continue
        if name not in RULES:
            problems.append(unknown_name(where, name, entry, list(RULES), "rule"))
            continue
        rule, found = build(RULES[name], settings, f"{where}.{name}")
        problems += found
        if rule is not None:
            try:
                rule.check()
            except UserError as error:
                problems.append(of_error(f"{where}.{name}", settings, error))
            rules.append(rule)
    return tuple(rules), problems


def rules_from_options(texts: Sequence[str]) -> tuple[Rule, ...]:
    """The rules of `--rule` options, each a piece of YAML: `scrub`, `length: {min_characters: 9}`.

    Raises:
        ConfigError: with everything that is wrong.
    """
    entries: list[Any] = []
    problems: list[Problem] = []
    for text in texts:
        value, found = parse_yaml(text, f"--rule {text}")
        problems += found
        entries.append(value)
    rules, found = ((), []) if problems else parse_rules(entries, "--rule")
    if problems or found:
        raise ConfigError([*problems, *found], "--rule")
    return rules


def one_entry(entry: Any, path: str) -> tuple[str, Any, Problem | None]:
    """(name, settings, problem) of `name` or `{name: settings}`; dashes are underscores."""
    if isinstance(entry, str):
        return entry.replace("-", "_"), None, None
    if isinstance(entry, Mapping) and len(entry) == 1:
        ((name, settings),) = entry.items()
        return str(name).replace("-", "_"), settings, None
    rule = "must be a name, or one name with its settings below it"
    return "", None, Problem(path, entry, rule, "begin each with its own dash")
