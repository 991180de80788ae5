"""Where the environment says that data, models and caches lie, before anybody changes the working directory."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLES = (
    "FLORILEGIUM_DATA",
    "FLORILEGIUM_CACHE",
    "XDG_CACHE_HOME",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "HF_DATASETS_CACHE",
)


def make_absolute() -> None:
    """Makes the folders that the environment names absolute, for this process and those that it starts.

    Engines start processes in other folders. The hub's client reads its variables once, when it is imported.
    """
    for name in VARIABLES:
        if named := os.environ.get(name):
            os.environ[name] = str(Path(named).expanduser().absolute())
