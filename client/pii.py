"""Texts that point at a person by a pattern: addresses, numbers, links. Names and places are not recognised."""

from __future__ import annotations

import re

PATTERNS = {
    "e-mail": re.compile(r"[\w.+-]+@[\w-]+\.\w+"),
    "link": re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE),
    "handle": re.compile(r"(?<!\w)@\w{3,}"),
    "ip address": re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}\b"),
    "long number": re.compile(r"\d(?:[ ()./-]{0,2}\d){6,}"),  # telephones, cards, accounts, identity numbers
    "date of birth": re.compile(r"\b(?:born|dob|birthday)\b.{0,20}\d", re.IGNORECASE),
    "street": re.compile(r"\b\d{1,5} (?:\w+ ){1,3}(?:street|st|road|rd|avenue|ave|lane|drive)\b", re.IGNORECASE),
}


def personal_data(text: str) -> list[str]:
    """The names of the patterns that a text matches.

    >>> personal_data("write to ann@example.org or call +1 (202) 555-0143")
    ['e-mail', 'long number']
    """
    return [name for name, pattern in PATTERNS.items() if pattern.search(text)]
