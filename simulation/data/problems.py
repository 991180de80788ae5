"""The commonest problems of a file of rows that cannot be read, each with its lines: for who is to mend it.

A reader ends at the first wrong row; here every row is tried by itself. Covers JSON Lines and tables of text in UTF-8,
compressed or not. Not covered: JSON documents over several lines, exports of programs, Parquet and Arrow.
"""

from __future__ import annotations

import csv
import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.folder import Row
from florilegium.simulation.data.formats.opened import opened
from florilegium.simulation.data.formats.reading import Located, Reading
from florilegium.simulation.data.formats.recognise import ROW_FORMATS
from florilegium.simulation.data.formats.tables import delimiter_of
from florilegium.simulation.data.jsonl import KEYS as OUR_KEYS
from florilegium.simulation.data.jsonl import exchange, has_time
from florilegium.simulation.data.synonyms import READ

COMMONEST, LINES_SHOWN = 5, 5
KEYS = {*OUR_KEYS, *READ}
OWN_PLACE = re.compile(r"^(, turn \d+)?: ")
OWN_VALUE = re.compile(r" = .*? must be |, found .*$| \(.*$|: byte \d+ is ")


class Problems:
    """Kinds of problems, with the lines of each."""

    def __init__(self) -> None:
        self.lines: dict[str, list[int]] = {}

    def note(self, what: str, line: int) -> None:
        self.lines.setdefault(what, []).append(line)

    def told(self) -> list[str]:
        """The commonest kinds, each with its first lines."""
        ranked = sorted(self.lines.items(), key=lambda kind: -len(kind[1]))[:COMMONEST]
        return [f"{len(lines):,} × {what}: {_listed(lines)}" for what, lines in ranked]


def problems_of(path: Path, reading: Reading) -> list[str]:
    """Lines for people; [] of what is no file of rows, or whose rows are right one by one.

    And of rows without any key that is known, of which not every line is wrong but what the file is taken for.
    """
    found = Problems()
    try:
        rows = _rows(path, found)
        first = next(rows, None)
        if first is None or not _is_known(first[1][1], reading):
            return []
        reading.check_named(first[1][1], first[1][0])
        read = _reader(first[1][1], reading)
        for number, located in chain([first], rows):
            try:
                read(located)
            except DataError as error:
                found.note(_kind(str(error).removeprefix(located[0])), number)
    except DataError:
        return []  # of the whole file, and told already
    return found.told()


def _is_known(first: Row, reading: Reading) -> bool:
    return bool(KEYS & first.keys()) or any(form.fits(first, reading) for form in ROW_FORMATS.values())


def _reader(first: Row, reading: Reading) -> Callable[[Located], object]:
    """How a row is tried, of a file that begins with this one; those of no other format are ours."""
    ours = {"user", "prompt", "response"} <= first.keys() and not any(name for _, name in reading.fields)
    form = next((form for form in ROW_FORMATS.values() if form.fits(first, reading)), None)
    if ours or form is None:
        return lambda located: exchange(located[1], located[0], has_time(first))
    return lambda located: list(form.read([located], reading))


def _rows(path: Path, found: Problems) -> Iterator[tuple[int, Located]]:
    """Every row that is one, with the number of its line; nothing of a file that does not begin with a row."""
    lines = _lines(path, found)
    number, first = next(((number, line) for number, line in lines if line.strip()), (0, ""))
    if isinstance(_object(first), dict):
        yield from _of_json(path, chain([(number, first)], lines), found)
    elif delimiter_of(first) and not first.lstrip().startswith(("{", "[")):
        yield from _of_table(path, first, number, (line for _, line in lines), found)


def _lines(path: Path, found: Problems) -> Iterator[tuple[int, str]]:
    """All lines; what is no text is an empty one."""
    with opened(path) as stream:
        for number, raw in enumerate(stream, start=1):
            try:
                yield number, raw.removeprefix(BOM_UTF8).decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                found.note("not UTF-8", number)
                yield number, ""


def _of_json(path: Path, lines: Iterable[tuple[int, str]], found: Problems) -> Iterator[tuple[int, Located]]:
    for number, line in lines:
        row = _object(line) if line.strip() else None
        if isinstance(row, dict):
            yield number, (f"{path}, line {number}", row)
        elif row is not None:
            found.note(row, number)


def _object(line: str) -> Row | str:
    """The object of a line, or what is wrong with it."""
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError):
        return "not JSON"
    return value if isinstance(value, dict) else "JSON, but no object"


def _of_table(
    path: Path, header: str, before: int, lines: Iterable[str], found: Problems
) -> Iterator[tuple[int, Located]]:
    """Rows by the names of the header, which is line `before`; a row may go over several lines, and has its last."""
    if "\r" in header:  # all of it is one line
        return
    mark = delimiter_of(header)
    columns = next(csv.reader([header], delimiter=mark))
    rows = csv.reader((f"{line}\n" for line in lines), delimiter=mark)
    try:
        for row in rows:
            number = before + rows.line_num
            if len(row) == len(columns):
                yield number, (f"{path}, line {number}", dict(zip(columns, row, strict=True)))
            elif row:
                found.note(f"{len(row)} fields where the header names {len(columns)}", number)
    except csv.Error as error:  # what follows cannot be told apart
        found.note(f"no table: {error}", before + rows.line_num)


def _kind(message: str) -> str:
    """What is wrong, without the turn and the value of one row.

    >>> _kind(", turn 3: content = ['a'] must be a text")
    'content must be a text'
    """
    message = OWN_PLACE.sub("", message)
    return OWN_VALUE.sub(lambda own: " must be " if own[0].endswith(" must be ") else "", message)


def _listed(lines: list[int]) -> str:
    shown = ", ".join(f"{line:,}" for line in lines[:LINES_SHOWN])
    more = f" and {len(lines) - LINES_SHOWN:,} more" if len(lines) > LINES_SHOWN else ""
    return f"line{'s' if len(lines) > 1 else ''} {shown}{more}"
