"""Where data sets that are not packages lie on this machine, and how their lines are read."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import sys
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from florilegium.simulation.data.errors import DataError

Row = dict[str, Any]
ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".ndjson")
CONVERT = "write one JSON object a line, with user, prompt and response"
OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\x00": lzma.open}  # by first bytes
OTHERS = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "compressed with bzip2",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    BOM_UTF16_LE: "a text in UTF-16",
    BOM_UTF16_BE: "a text in UTF-16",
}


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
    """The objects of a file of JSON Lines, each with its line number from 1; blank lines are skipped.

    Whether it is compressed is read off its first bytes, whatever its ending. Raises `DataError` with the file and the
    line where something else than one JSON object stands, or where the compressed file breaks off.
    """
    number = 0
    try:
        with _opener(path)(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path}, line {number}"
                text = _decoded(line.removeprefix(BOM_UTF8) if number == 1 else line, where)
                if text.strip():
                    yield number, _object(text, where)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; give the path of a file of JSON Lines") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; give the path of a file of JSON Lines") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}, line {number + 1} cannot be read ({error}); is the file whole?") from error


def is_file_name(name: str) -> bool:
    """Whether a data set's name is that of a file of JSON Lines: one that is there, or one that ends like it."""
    return Path(name).expanduser().is_file() or name.lower().endswith(ENDINGS)


def without_repeats(pairs: list[tuple[str, Any]]) -> Row:
    """An object of JSON; raises `ValueError` for a key that it has twice, of which JSON would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in found if keys.count(key) > 1)!r} occurs twice")
    return found


def shown(value: object) -> str:
    """A value for an error's line: the beginning, where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"an integer of more than {sys.get_int_max_str_digits()} digits"
    return text if len(text) <= 60 else f"{text[:60]}…"


def _opener(path: Path) -> Callable[..., Any]:
    with path.open("rb") as stream:
        start = stream.read(16)
    for first, kind in OTHERS.items():
        if start.startswith(first):
            raise DataError(f"{path} is {kind}, not JSON Lines in UTF-8; {CONVERT}")
    return next((opener for first, opener in OPENERS.items() if start.startswith(first)), open)


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {error.start + 1} is not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from None


def _object(line: str, where: str) -> Row:
    reason = ""
    try:
        value = json.loads(line, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        value = None
        reason = " (nested too deeply)" if isinstance(error, RecursionError) else f" ({error})"
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected one JSON object, found {shown(line.strip())}{reason}{_format(line)}")
    return value


def _format(line: str) -> str:
    """What a file is that is not JSON Lines, judged by one of its lines."""
    text = line.strip()
    if text.startswith("["):
        return f"; a JSON array is not read: {CONVERT}, for example with jq -c '.[]'"
    if text == "{":
        return f"; JSON over several lines is not read: {CONVERT}, for example with jq -c ."
    return f"; {CONVERT}" if not text.startswith("{") else ""
