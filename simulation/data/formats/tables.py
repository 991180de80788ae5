"""Tables as rows: CSV and TSV; Parquet, Arrow and what `datasets` saves, through the optional package pyarrow."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.formats.opened import lines_of
from florilegium.simulation.data.formats.reading import Located


def delimiter_of(line: str) -> str:
    """The mark that parts the header of a table; "" where none does."""
    return max("\t,;", key=line.count) if any(mark in line for mark in "\t,;") else ""


def read_csv(path: Path) -> Iterator[Located]:
    """Rows by the names in the first line, each with the line that it ends in."""
    csv.field_size_limit(sys.maxsize)
    numbered = lines_of(path)
    before, header = next(((number, line) for number, line in numbered if line.strip()), (1, ""))
    lines, mark = (f"{line}\n" for _, line in numbered), delimiter_of(header)
    if not mark:
        raise DataError(f"{path}, line {before}: holds no header of a table")
    if "\r" in header:
        raise DataError(f"{path}, line {before}: holds a bare carriage return; save it with line ends of its own")
    columns = next(csv.reader([header], delimiter=mark))
    if twice := next((name for name in columns if columns.count(name) > 1), None):
        raise DataError(f"{path}, line {before}: two columns are called {twice!r}")
    rows = csv.reader(lines, delimiter=mark, strict=True)
    try:
        for row in rows:
            where = f"{path}, line {rows.line_num + before}"
            if row and len(row) != len(columns):
                raise DataError(f"{where}: {len(row)} fields where the header names {len(columns)}")
            if row:
                yield where, dict(zip(columns, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num + before}: {error}") from None


def read_parquet(path: Path) -> Iterator[Located]:
    """Rows of a Parquet file, a batch at a time."""
    try:
        table = _pyarrow("parquet", path).ParquetFile(path)
        yield from _rows(path, table.iter_batches())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}); is the file whole?") from None


def read_arrow(path: Path) -> Iterator[Located]:
    """Rows of an Arrow file or stream."""
    ipc = _pyarrow("ipc", path)
    try:
        with path.open("rb") as stream:
            if stream.read(6) == b"ARROW1":
                reader = ipc.open_file(path)
                yield from _rows(path, (reader.get_batch(i) for i in range(reader.num_record_batches)))
            else:
                stream.seek(0)
                yield from _rows(path, ipc.open_stream(stream))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as Arrow ({error}); is the file whole?") from None


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of what `datasets.save_to_disk` left, of all splits in their order; [] where it left nothing."""
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            return [path for split in splits for path in saved_files(folder / split)]
        if (folder / "state.json").is_file():
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            return [folder / part["filename"] for part in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: what datasets saved there is not whole ({error})") from None
    return []


def _rows(path: Path, batches: Any) -> Iterator[Located]:
    n = 0
    for batch in batches:
        for row in batch.to_pylist():
            n += 1
            yield f"{path}, row {n}", row


def _pyarrow(module: str, path: Path) -> Any:
    try:
        return import_module(f"pyarrow.{module}")
    except ImportError:
        raise DataError(f"{path} needs the package pyarrow: pip install 'florilegium[tables]'") from None
