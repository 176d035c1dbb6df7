"""The families by `model_type`. A new one is one line here and one file beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megascale.config.schema import ModelConfig
from megascale.errors import UserError
from megascale.hf.bert import BERT
from megascale.hf.family import Family
from megascale.hf.gemma2 import GEMMA2
from megascale.hf.gemma3 import GEMMA3
from megascale.hf.gpt2 import GPT2
from megascale.hf.gpt_neox import GPT_NEOX
from megascale.hf.llama import LLAMA
from megascale.hf.mistral import MISTRAL
from megascale.hf.qwen2 import QWEN2
from megascale.hf.qwen3 import QWEN3

# In the order in which a family is sought for a model of ours: the plainest first.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, GPT_NEOX, GEMMA2, GEMMA3, BERT)
}


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json.

    Raises:
        UserError: a model_type that is not in the table.
    """
    name = config.get("model_type")
    if name not in FAMILIES:
        raise UserError(
            f"{where} is of the family model_type = {name!r}",
            rule=f"supported families: {', '.join(FAMILIES)}",
            remedy="convert a model of one of them; docs/hf.md shows how a family is added",
        )
    return FAMILIES[name]


def family_for(model: ModelConfig, wanted: str | None = None) -> Family:
    """The first family whose models compute what `model` computes, or the one asked for.

    Raises:
        UserError: none does, or not the one asked for; what stands in the way is listed.
    """
    if wanted is not None and wanted not in FAMILIES:
        raise UserError(
            f"--family {wanted}",
            rule=f"supported families: {', '.join(FAMILIES)}",
            remedy="leave it out: the first that fits is taken",
        )
    candidates = [FAMILIES[wanted]] if wanted else list(FAMILIES.values())
    differences = {family.model_type: family.differences(model) for family in candidates}
    for name, found in differences.items():
        if not found:
            return FAMILIES[name]
    nearest = min(differences, key=lambda name: len(differences[name]))
    lines = "\n    ".join(differences[nearest])
    raise UserError(
        f"this model cannot be written as {wanted or 'any family'}; nearest is {nearest}:\n"
        f"    {lines}",
        rule=f"a model is written as one of {', '.join(FAMILIES)} that computes exactly the same",
        remedy="train with settings that one of these families has (docs/hf.md)",
    )
