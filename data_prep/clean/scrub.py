"""Personal data and secrets, replaced by placeholders."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import ClassVar

from data_prep.clean.rule import Outcome, Rule, TextView

# Patterns begin with the characters that a match begins with, and not with a look behind, which
# would be tried at every character: what stands before a match is looked at afterwards.
_AT_DOMAIN = re.compile(r"@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}\b")
_LOCAL_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}\Z")
_IPV4 = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?!\w|\.[0-9])")
# 2000::/3 is all that is given out; names such as dead::beef of C++ are not in it.
_IPV6 = re.compile(r"[23][0-9A-Fa-f]{0,3}:[0-9A-Fa-f:]*[0-9A-Fa-f](?![\w:])")
_INTERNATIONAL = re.compile(r"\+[1-9][0-9]{0,2}(?:[ .\-]?\(?[0-9]{1,5}\)?){2,6}(?!\w)")
_NORTH_AMERICAN = re.compile(
    r"(?:1[ .\-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[.\-])[2-9][0-9]{2}[.\-][0-9]{4}(?![\w\-])"
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN ((?:[A-Z0-9]+ )*)PRIVATE KEY( BLOCK)?-----[\s\S]*?"
    r"-----END \1PRIVATE KEY\2?-----"
)
# Forms that the services themselves document, so that ordinary words are not taken for keys; each
# with the text that it begins with.
_API_KEYS = {
    prefix: re.compile(r"(?<!\w)" + pattern)
    for prefix, pattern in (
        ("AKIA", r"AKIA[0-9A-Z]{16}\b"),  # AWS
        ("ASIA", r"ASIA[0-9A-Z]{16}\b"),
        ("gh", r"gh[pousr]_[A-Za-z0-9]{36,255}"),  # GitHub
        ("github_pat_", r"github_pat_\w{22,255}"),
        ("glpat-", r"glpat-[\w-]{20,}"),  # GitLab
        ("xox", r"xox[abeoprs]-[A-Za-z0-9-]{10,}"),  # Slack
        ("AIza", r"AIza[\w-]{35}"),  # Google
        ("k_live_", r"[sr]k_live_[A-Za-z0-9]{16,}"),  # Stripe
        ("k_test_", r"[sr]k_test_[A-Za-z0-9]{16,}"),
        ("sk-", r"sk-(?:proj-|ant-)?[\w-]{20,}"),  # OpenAI, Anthropic
        ("hf_", r"hf_[A-Za-z0-9]{30,}"),  # Hugging Face
        ("npm_", r"npm_[A-Za-z0-9]{36}"),
        ("pypi-", r"pypi-[\w-]{50,}"),
        ("eyJ", r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),  # JSON web tokens
    )
}
_FEWEST_DIGITS, _MOST_DIGITS = 8, 15  # of an international number, E.164


class Scrub(Rule):
    """Replaces e-mail addresses, public IP addresses, phone numbers and keys.

    Patterns find what has the form of these: a version 1.2.3.4 is taken for an address, a number
    without separators is not taken for a phone. Private, loopback and documentation addresses
    stay, as they tell nothing of anyone.
    """

    name: ClassVar[str] = "scrub"

    email: str | None = "<EMAIL>"
    """What replaces it; null leaves it."""
    ip: str | None = "<IP>"
    phone: str | None = "<PHONE>"
    key: str | None = "<KEY>"

    def apply(self, view: TextView) -> Outcome:
        """Replace and count by kind."""
        text = view.text
        counts: dict[str, int] = {}
        # A cheap look for a text without which there can be no match comes first.
        if self.key is not None:
            rows = [("-----BEGIN ", _PRIVATE_KEY), *_API_KEYS.items()]
            for needed, pattern in rows:
                if needed in text:
                    text = _replace(pattern, self.key, None, text, counts, "keys")
        if self.email is not None and "@" in text:
            text = _replace_emails(text, self.email, counts)
        if self.ip is not None:
            text = _replace(_IPV4, self.ip, _is_public, text, counts, "ips")
            if ":" in text:
                text = _replace(_IPV6, self.ip, _is_public, text, counts, "ips")
        if self.phone is not None:
            if "+" in text:
                text = _replace(_INTERNATIONAL, self.phone, _is_long, text, counts, "phones")
            text = _replace(_NORTH_AMERICAN, self.phone, _stands_alone, text, counts, "phones")
        return Outcome(text, counts=counts)


def _replace(
    pattern: re.Pattern[str],
    placeholder: str,
    accepted: Callable[[re.Match[str]], bool] | None,
    text: str,
    counts: dict[str, int],
    kind: str,
) -> str:
    """Put the placeholder for every match that is accepted, and count them."""

    def replacement(match: re.Match[str]) -> str:
        if accepted is not None and not accepted(match):
            return match.group()
        counts[kind] = counts.get(kind, 0) + 1
        return placeholder

    return pattern.sub(replacement, text)


def _replace_emails(text: str, placeholder: str, counts: dict[str, int]) -> str:
    """From each @ with a domain behind it, look back for the name before it."""
    pieces, done = [], 0
    for match in _AT_DOMAIN.finditer(text):
        begin = max(done, match.start() - 65)
        local = _LOCAL_PART.search(text, begin, match.start())
        if local is None:
            continue
        pieces += [text[done : local.start()], placeholder]
        done = match.end()
        counts["emails"] = counts.get("emails", 0) + 1
    return "".join([*pieces, text[done:]]) if pieces else text


def _stands_alone(match: re.Match[str]) -> bool:
    """Whether no letter, digit or separator runs into the match from the left."""
    before = match.string[match.start() - 1 : match.start()]
    return not (before.isalnum() or (before != "" and before in "_.:-+"))


def _is_public(match: re.Match[str]) -> bool:
    try:
        return _stands_alone(match) and ipaddress.ip_address(match.group()).is_global
    except ValueError:
        return False


def _is_long(match: re.Match[str]) -> bool:
    digits = sum(map(str.isdigit, match.group()))
    return _stands_alone(match) and _FEWEST_DIGITS <= digits <= _MOST_DIGITS
