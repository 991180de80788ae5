"""With which code a run was made: a hash of the sources, in its folder, on which driver and workers must agree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import florilegium
from florilegium.privacy.common.registry import source_files
from florilegium.simulation.runs.errors import RunError

PACKAGES = ("privacy", "client", "server", "simulation")
NOTED = "sources.sha256"


def sources_sha256(extensions: Iterable[str] = ()) -> str:
    """A hash of the sources of the four packages, and of the modules of these names (`privacy.common.registry`)."""
    return _sources_sha256(tuple(sorted(set(extensions))))


@lru_cache(maxsize=8)  # what was imported does not change with the file
def _sources_sha256(extensions: tuple[str, ...]) -> str:
    digest = sha256()
    root = Path(florilegium.__file__).parent
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    for module, path in source_files(extensions).items():
        digest.update(module.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def write_sources(folder: Path, extensions: Iterable[str] = ()) -> None:
    """Notes the code of this process in the folder of a run."""
    (folder / NOTED).write_text(sources_sha256(extensions) + "\n", encoding="utf-8")


def check_sources(folder: Path, extensions: Sequence[str] = ()) -> None:
    """Raises `RunError` when this process runs other code than the one that made the run's folder."""
    stored = (folder / NOTED).read_text(encoding="utf-8").strip()
    if stored != sources_sha256(extensions):
        own = f" or of {', '.join(extensions)}" if extensions else ""
        raise RunError(f"the code in {Path(florilegium.__file__).parent}{own} is not the code that started {folder}")
