"""Where data sets that are not packages lie on this machine, and how their lines are read."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from simulation.data.errors import DataError

Row = dict[str, Any]
OPENERS: dict[str, Callable[..., Any]] = {".jsonl": open, ".jsonl.gz": gzip.open, ".jsonl.xz": lzma.open}


def data_folder() -> Path:
    """The folder named by `FLORILEGIUM_DATA`; raises `DataError` when it is unset or not a folder."""
    named = os.environ.get("FLORILEGIUM_DATA")
    if not named:
        raise DataError("FLORILEGIUM_DATA is unset; set it to the folder that holds the .jsonl.xz files")
    folder = Path(named)
    if not folder.is_dir():
        raise DataError(f"FLORILEGIUM_DATA = {named!r} is not a folder; name the one that holds the .jsonl.xz files")
    return folder


def json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    """The objects of a .jsonl, .jsonl.gz or .jsonl.xz file, each with its line number from 1; blank lines are skipped.

    Raises `DataError` with the file and the line where something else than one JSON object stands, or where the
    compressed file breaks off.
    """
    number = 0
    try:
        with _opener(path)(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _object(line, f"{path}, line {number}")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; give the path of a file that ends in {', '.join(OPENERS)}") from None
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}, line {number + 1} cannot be read ({error}); is the file whole and UTF-8?") from error


def _opener(path: Path) -> Callable[..., Any]:
    for ending, opener in OPENERS.items():
        if path.name.endswith(ending):
            return opener
    raise DataError(f"{path} must end in one of {', '.join(OPENERS)}")


def _object(line: str, where: str) -> Row:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: expected one JSON object, found {line.strip()[:60]!r} ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected one JSON object, found {line.strip()[:60]!r}")
    return value
