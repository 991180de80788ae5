"""Files as lines and JSON values with their places: compressed or not, in UTF-8 or UTF-16, never half."""

from __future__ import annotations

import bz2
import io
import json
import lzma
import re
import sys
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from florilegium.simulation.data import folder
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.folder import shown, without_repeats

ZSTD = b"\x28\xb5\x2f\xfd"
OPENERS: dict[bytes, Any] = {**folder.OPENERS, b"BZh": bz2.open}
NOT_BLANK = re.compile(r"\S")
ZIP, PARQUET = b"PK\x03\x04", b"PAR1"
ARROW = (b"ARROW1", b"\xff\xff\xff\xff")  # a file, a stream
UTF16 = (BOM_UTF16_LE, BOM_UTF16_BE)


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file, decompressed; raises `DataError` where it is missing, cut off or cannot be decompressed."""
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
        known = next((opener for mark, opener in OPENERS.items() if start.startswith(mark)), open)
        opener = _zstd(path) if start.startswith(ZSTD) else known
        with opener(path, "rb") as stream:
            yield io.BufferedReader(stream)
    except (OSError, EOFError, lzma.LZMAError, zlib.error, _zstd_error()) as error:
        raise DataError(f"{path} cannot be read ({error}); is the file whole?") from error


def _zstd_error() -> type[Exception]:
    """What Python's own module raises for broken zstd, where it is loaded."""
    return getattr(sys.modules.get("compression.zstd"), "ZstdError", OSError)


def _zstd(path: Path) -> Callable[..., Any]:
    """Python's own module, or pyarrow: both raise where a file breaks off, as the package zstandard does not."""
    try:
        return cast(Callable[..., Any], import_module("compression.zstd").open)  # from Python 3.14 on
    except ImportError:
        pass
    try:
        arrow = import_module("pyarrow")
    except ImportError:
        raise DataError(
            f"{path} is compressed with zstd: pip install 'florilegium[tables]', or decompress it with unzstd"
        ) from None
    return lambda path, mode: arrow.input_stream(str(path), compression="zstd")


def start_of(path: Path, size: int = 65_536) -> bytes:
    with opened(path) as stream:
        return stream.read(size)


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Every line with its number from 1, without its end. Raises `DataError` with the line for what is no text."""
    with opened(path) as stream:
        number = 0
        if stream.peek(2)[:2] in UTF16:
            try:
                for number, line in enumerate(io.TextIOWrapper(stream, "utf-16"), start=1):
                    yield number, _clean(line, path, number)
            except UnicodeError as error:
                raise DataError(f"{path}, line {number + 1}: not UTF-16 ({error})") from None
            return
        for number, raw in enumerate(stream, start=1):
            try:
                line = (raw.removeprefix(BOM_UTF8) if number == 1 else raw).decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: byte {error.start + 1} is not UTF-8 ({error.reason}); save it as UTF-8"
                ) from None
            yield number, _clean(line, path, number)


def _clean(line: str, path: Path, number: int) -> str:
    if "\0" in line:
        raise DataError(f"{path}, line {number}: holds a NUL character, so it is no text; is the file whole?")
    return line.rstrip("\r\n")


def json_values(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of JSON Lines, or of documents one after the other, each with the line that it begins in.

    A file whose first line is a whole object is read line by line, any other at once.
    """
    lines = ((number, line) for number, line in lines_of(path) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    if _is_whole(first[1]):
        yield _place(path, first[0]), _parsed(first[1], path, first[0])
        for number, line in lines:
            yield _place(path, number), _parsed(line, path, number)
        return
    yield from _documents(path, "\n".join(line for _, line in lines_of(path)))


def is_json_lines(path: Path) -> bool:
    """Whether the first line is a whole object, in an encoding that the strict reader takes."""
    with path.open("rb") as stream:
        start = stream.read(8)
    line = next((line for _, line in lines_of(path) if line.strip()), "")
    return not start.startswith((b"BZh", ZSTD, *UTF16)) and _is_whole(line)


def _documents(path: Path, whole: str) -> Iterator[tuple[str, Any]]:
    decoder, at, number = json.JSONDecoder(object_pairs_hook=without_repeats), 0, 1
    while begins := NOT_BLANK.search(whole, at):
        number += whole.count("\n", at, begins.start())
        at = begins.start()
        try:
            value, end = decoder.raw_decode(whole, at)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg}); is the file whole?") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON that can be read ({error})") from None
        yield _place(path, number), value
        number += whole.count("\n", at, end)
        at = end


def _is_whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parsed(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{_place(path, number)}: expected one JSON object, found {shown(line)} ({error})") from None


def _place(path: Path, number: int) -> str:
    return f"{path}, line {number}"
