"""The rules by name, and which are used when none are chosen."""

from __future__ import annotations

from data_prep.clean.c4 import C4
from data_prep.clean.contents import Length, Symbols, WordList
from data_prep.clean.gopher import GopherQuality, GopherRepetition
from data_prep.clean.language import Language
from data_prep.clean.normalize import Normalize, Repair
from data_prep.clean.rule import Rule
from data_prep.clean.scrub import Scrub

RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        *(Repair, Normalize, Length, Symbols, Language, WordList),
        *(C4, GopherQuality, GopherRepetition, Scrub),
    )
}


def default_rules() -> tuple[Rule, ...]:
    """For prose in English: the cheap ones that reject most come first."""
    return (Repair(), Normalize(), Language(), GopherQuality(), GopherRepetition(), Scrub())
