"""The models on this machine: the bundled one, those that were pulled, those in the cache of the Hugging Face hub.

Reads names, sizes and cards only: no model is loaded and nobody is asked. A licence is what a model's card says of it,
not what holds. Not covered: folders elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CachedRepoInfo, scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from florilegium.client.lm.places import GGUF, HUB_FILES, NAMES, ModelError, check_weights, resolve, source

CARD = "README.md"
VALUE = r"[ \t]*(?:\n[ \t]*-[ \t]*)?['\"]?([^'\"\n#]+?)['\"]?[ \t]*(?:#.*)?$"  # a word of YAML, or the first of a list
LICENCE = re.compile(f"^license:{VALUE}", re.MULTILINE)
LICENCE_NAME = re.compile(f"^license_name:{VALUE}", re.MULTILINE)
UNTOLD = "not told"


@dataclass(frozen=True)
class Listed:
    """A model as `model.name` takes it."""

    name: str
    place: str  # empty: not on this machine
    bytes: int
    licence: str
    why_not: str  # why it cannot be loaded as it lies there; empty: nothing is known against it


def listed(cache: Path | None = None) -> list[Listed]:
    """Those known by name, then those in the hub's cache (`cache`, or where the hub's client has it), by name."""
    return [*map(_known, NAMES), *sorted(_of_the_hub(cache), key=lambda found: found.name)]


def _known(name: str) -> Listed:
    try:
        place = resolve(name)
    except ModelError as error:
        return Listed(name, "", 0, UNTOLD, _without_name(error, name))
    return _of_folder(name, place, source(place).get("licence", ""))


def _of_the_hub(cache: Path | None) -> Iterator[Listed]:
    try:
        repositories = scan_cache_dir(cache).repos
    except (CacheNotFound, ValueError):  # there is none, or what is called so is no folder
        return
    for repository in repositories:
        if repository.repo_type == "model" and (folder := _newest(repository)):
            yield from _of_snapshot(repository.repo_id, folder)


def _newest(repository: CachedRepoInfo) -> Path | None:
    """The snapshot that is meant by the name alone, else the last one."""
    revisions = sorted(repository.revisions, key=lambda r: ("main" in r.refs, r.last_modified))
    return revisions[-1].snapshot_path if revisions else None


def _of_snapshot(name: str, folder: Path) -> Iterator[Listed]:
    """Of what can be a language model: a folder with weights, and each GGUF file in it."""
    files = sorted(p for p in folder.rglob(f"*{GGUF}"))
    yield from (Listed(str(p), str(p), p.stat().st_size, _licence(folder), _objection(p, str(p))) for p in files)
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
        yield _of_folder(name, folder)


def _of_folder(name: str, folder: Path, licence: str = "") -> Listed:
    used = {p for pattern in HUB_FILES for p in folder.glob(pattern) if p.is_file()}
    size = sum(p.stat().st_size for p in used)
    return Listed(name, str(folder), size, licence or _licence(folder), _objection(folder, name))


def _objection(place: Path, name: str) -> str:
    try:
        check_weights(place, name)
    except ModelError as error:
        return _without_name(error, name)
    if place.is_dir() and not any(place.glob("tokenizer*")):
        return "no tokenizer"
    return ""


def _without_name(error: ModelError, name: str) -> str:
    return str(error).removeprefix(f"model {name!r}").removeprefix(":").strip()


def _licence(folder: Path) -> str:
    """What the head of its card says."""
    card = folder / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = text.split("---")[1] if text.startswith("---") else ""
    found, named = LICENCE.search(head), LICENCE_NAME.search(head)
    told = named if named and found and found[1] == "other" else found
    return told[1] if told else UNTOLD
