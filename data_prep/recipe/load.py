"""A recipe: YAML in, every problem at once, phases out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.recipe.phases import Flow, NamedPhase
from data_prep.recipe.problems import build as build_settings
from data_prep.recipe.problems import of_error, unknown_name
from data_prep.recipe.rules import one_entry
from data_prep.recipe.settings import STEPS, StepSettings, TokenizeSettings
from megascale.config.problems import ABSENT, ConfigError, Problem
from megascale.config.yaml_text import parse_yaml
from megascale.data.places import as_path
from megascale.errors import UserError

_KEYS = ("output", "steps")


@dataclass(frozen=True)
class Recipe:
    """Steps with their settings, and the folder that they write into."""

    output: Path
    steps: tuple[StepSettings, ...]

    def phases(self) -> list[NamedPhase]:
        """All phases in order; each step writes `NN_name` in the output folder.

        Raises:
            UserError: the settings of a step do not go together.
        """
        flow = Flow(self.output)
        found: list[NamedPhase] = []
        for number, step in enumerate(self.steps, start=1):
            found += step.phases(self.output / f"{number:02d}_{step.name}", flow)
        return found


def load_recipe(path: Path, output: Path | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file.
        output: in place of the file's own.

    Raises:
        ConfigError: with every problem, by path.
    """
    tree, problems = _read(path)
    for name in tree:
        if name not in _KEYS:
            problems.append(unknown_name(str(name), name, tree[name], list(_KEYS), "setting"))
    folder = tree.get("output") if output is None else str(output)
    if not isinstance(folder, str) or not folder:
        rule = "must be the folder that the recipe writes into"
        problems.append(Problem("output", tree.get("output", ABSENT), rule, "or give --output"))
    steps, found = _steps(tree.get("steps", ABSENT))
    problems += found
    if not problems:
        recipe = Recipe(as_path(str(folder)), tuple(steps))
        problems += _cross_problems(recipe)
    if problems:
        raise ConfigError(problems, str(path))
    return recipe


def _read(path: Path) -> tuple[Mapping[str, Any], list[Problem]]:
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = Problem(str(path), ABSENT, f"must be a readable UTF-8 file: {error}")
        raise ConfigError([problem], str(path)) from error
    tree, problems = parse_yaml(text, str(path))
    if isinstance(tree, Mapping):
        return tree, problems
    rule = "must hold `output` and `steps`"
    raise ConfigError(problems or [Problem(str(path), tree, rule)], str(path))


def _steps(given: Any) -> tuple[list[StepSettings], list[Problem]]:
    names = list(STEPS)
    if not isinstance(given, list) or not given:
        rule = "must be a list with at least one step"
        return [], [Problem("steps", given, rule, f"steps are: {', '.join(names)}")]
    steps: list[StepSettings] = []
    problems: list[Problem] = []
    tokenizer = documents = False
    for number, entry in enumerate(given):
        path = f"steps[{number}]"
        name, raw, problem = one_entry(entry, path)
        if problem is None and name not in STEPS:
            problem = unknown_name(path, name, entry, names, "step")
        if problem is not None:
            problems.append(problem)
            continue
        path = f"{path}.{name}"
        settings, found = build_settings(STEPS[name], raw, path)
        problems += found
        if STEPS[name].needs_documents and not documents:
            problems.append(Problem(path, ABSENT, "a step `read` must come before it"))
        if name == "read" and documents:
            problems.append(Problem(path, ABSENT, "one step reads; give it several inputs"))
        documents = documents or name == "read"
        if isinstance(settings, TokenizeSettings) and not (settings.tokenizer or tokenizer):
            rule = "must be given where no step `train_tokenizer` comes before"
            problems.append(Problem(f"{path}.tokenizer", ABSENT, rule))
        tokenizer = tokenizer or name == "train_tokenizer"
        if settings is not None:
            problems += settings.problems(path)
            steps.append(settings)
    return steps, problems


def _cross_problems(recipe: Recipe) -> list[Problem]:
    """What the options themselves refuse, such as values that do not go together."""
    flow = Flow(recipe.output)
    problems = []
    for number, step in enumerate(recipe.steps):
        folder = recipe.output / step.name
        try:
            step.phases(folder, flow)
        except UserError as error:
            path = f"steps[{number}].{step.name}"
            problems.append(of_error(path, error.what, error))
            flow.documents = flow.documents or folder
    return problems
