"""Family name -> task. A new family is one line here and one file beside it."""

from __future__ import annotations

from collections.abc import Callable

from megascale.config.schema import Config
from megascale.training.tasks.base import Task
from megascale.training.tasks.bert import BERTTask
from megascale.training.tasks.gpt import GPTTask

TASKS: dict[str, Callable[[Config], Task]] = {"bert": BERTTask, "gpt": GPTTask}


def build_task(config: Config) -> Task:
    """The task of `model.family`; the config's vocab_size must be resolved."""
    return TASKS[config.model.family](config)
