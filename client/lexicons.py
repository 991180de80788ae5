"""Word lists by domain, for the domain-specific score.

The bundled lists are the project's own, short and general; nothing of a licensed lexicon is in them.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files

Lexicons = Mapping[str, frozenset[str]]
WORD = re.compile(r"[a-z']+")


def words(text: str) -> list[str]:
    """Lower-case words of a text: the tokens that the lexicons count."""
    return WORD.findall(text.lower())


@lru_cache(maxsize=1)
def bundled() -> Lexicons:
    """Domain → words, from `client/lexicons.toml`."""
    listed = tomllib.loads(files("client").joinpath("lexicons.toml").read_text(encoding="utf-8"))
    return {name: frozenset(words.split()) for name, words in listed.items()}
