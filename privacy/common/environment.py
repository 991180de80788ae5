"""The environment of a process: what libraries read of it when they are loaded, and where data and models lie."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from sysconfig import get_paths

from florilegium.privacy.common.errors import UserError

VARIABLES = (
    "FLORILEGIUM_DATA",
    "FLORILEGIUM_CACHE",
    "XDG_CACHE_HOME",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "HF_DATASETS_CACHE",
)
DEFAULTS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "GOMP_SPINCOUNT": "1000",  # torch's threads spin for each other: ruinous beside other work
    "OPENBLAS_NUM_THREADS": "1",  # the same of numpy's, whose matrices here are small
}


def prepare_process() -> None:
    """What is done first in every process, a notebook's as the command's, so that all get the same bits.

    What the environment says already stays.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    make_absolute()


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """A variable that this process, and those that it starts meanwhile, have."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def umask() -> int:
    """What files are made with: for their owner alone, or as FLORILEGIUM_UMASK says. Raises `UserError`."""
    text = os.environ.get("FLORILEGIUM_UMASK", "077")
    if not re.fullmatch("0?[0-7]{3}", text):
        raise UserError(f"FLORILEGIUM_UMASK = {text!r} must be three octal digits, as 077 or 022")
    return int(text, 8)


@contextmanager
def private_files() -> Iterator[None]:
    """Files that this process makes meanwhile, or one that it starts, are made as the command makes them."""
    before = os.umask(umask())
    try:
        yield
    finally:
        os.umask(before)


def make_absolute() -> None:
    """Makes the folders that the environment names absolute, for this process and those that it starts.

    Engines start processes in other folders. The hub's client reads its variables once, when it is imported.
    """
    for name in VARIABLES:
        if named := os.environ.get(name):
            os.environ[name] = str(Path(named).expanduser().absolute())
    if named := os.environ.get("PYTHONPATH"):
        os.environ["PYTHONPATH"] = os.pathsep.join(str(Path(p).absolute()) for p in named.split(os.pathsep) if p)


def lend_imports(folders: Iterable[str]) -> None:
    """Processes that this one starts import from these folders too: where a user's modules were found."""
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    installed = [get_paths()[kind] for kind in ("stdlib", "purelib", "platlib")]
    own = [f for f in folders if not any(Path(f).is_relative_to(place) for place in installed)]
    more = [f for f in own if f not in known]
    if more:
        os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, known), *more])
