"""What a file is, by its content, and its conversations. A new format is a function and a line in a table here."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from zipfile import BadZipFile, ZipFile, is_zipfile

from florilegium.simulation.data.conversations import Conversation
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.folder import Row, shown
from florilegium.simulation.data.formats.exports import discord, is_discord, is_slack, is_telegram, slack, telegram
from florilegium.simulation.data.formats.mail import mails
from florilegium.simulation.data.formats.media import but_media, texts_of
from florilegium.simulation.data.formats.messages import Message, paired, read_log
from florilegium.simulation.data.formats.opened import ARROW, PARQUET, UTF16, ZIP, is_json_lines, json_values, start_of
from florilegium.simulation.data.formats.reading import FieldNames, Located, Reading
from florilegium.simulation.data.formats.rows import (
    read_alpaca,
    read_openai,
    read_pairs,
    read_preferences,
    read_sharegpt,
)
from florilegium.simulation.data.formats.signal import (
    is_signal,
    is_signal_export,
    signal,
    signal_export,
    signal_markdown,
)
from florilegium.simulation.data.formats.tables import delimiter_of, read_arrow, read_csv, read_parquet, saved_files
from florilegium.simulation.data.formats.whatsapp import looks_like_another_chat, looks_like_whatsapp, read_whatsapp
from florilegium.simulation.data.jsonl import KEYS, read_jsonl
from florilegium.simulation.data.synonyms import is_foreign

OURS = "jsonl"
OURS_TOLD = "JSON Lines of user, prompt and response"
LOOKED_AT = 8  # files of an export: some can be empty


class RowFormat(NamedTuple):
    """Rows of one shape: its name for people, what its first row has, and how rows become conversations."""

    told: str
    fits: Callable[[Row, Reading], bool]
    read: Callable[[Iterable[Located], Reading], Iterator[Conversation]]


class Export(NamedTuple):
    """A program's JSON: its name for people, whether a document is of it, and its messages."""

    told: str
    fits: Callable[[Any], bool]
    messages: Callable[..., Iterator[Message]]  # of documents, the reading and, in a folder, what a chat is called
    files: re.Pattern[str] | None = None  # how its files in folders are called, where other files lie beside them


def _has(*keys: str) -> Callable[[Row, Reading], bool]:
    return lambda row, _: set(keys) <= row.keys()


def _holds(*roles: str) -> Callable[[Row, Reading], bool]:
    return lambda row, reading: all(reading.key(role, row) for role in roles)


ROW_FORMATS: dict[str, RowFormat] = {
    "openai": RowFormat("OpenAI messages", _has("messages"), read_openai),
    "sharegpt": RowFormat("ShareGPT", _has("conversations"), read_sharegpt),
    "preferences": RowFormat("preference pairs", _has("chosen", "rejected"), read_preferences),
    "alpaca": RowFormat(
        "Alpaca",
        lambda row, reading: "instruction" in row and not reading.fields.prompt and bool(reading.key("response", row)),
        read_alpaca,
    ),
    "pairs": RowFormat("prompts and responses", _holds("prompt", "response"), read_pairs),
    "log": RowFormat(
        "a log of messages",
        lambda row, reading: _holds("user", "text")(row, reading) and not {"prompt", "response", "role"} & row.keys(),
        read_log,
    ),
}
EXPORTS: dict[str, Export] = {
    "telegram": Export("a Telegram export", is_telegram, telegram),
    "discord": Export("a Discord export", is_discord, discord),
    "slack": Export("a Slack export", is_slack, slack, re.compile(r"\d{4}-\d{2}-\d{2}\.json")),
    "signal": Export("Signal's own export", is_signal, signal, re.compile(r"main\.jsonl")),
    "signal-export": Export("chats of signal-export", is_signal_export, signal_export, re.compile(r"data\.json")),
}
SIGNAL_CHAT = "chat.md"  # beside data.json, or alone
FORMATS = (OURS, *ROW_FORMATS, *EXPORTS, "whatsapp", "mbox")


def read_source(path: Path, reading: Reading, named: str = "") -> Iterator[Conversation]:
    """The conversations of a file or a folder, of a format of `FORMATS` that is named or recognised.

    Raises `DataError` with the place and the reason for what cannot be read.
    """
    straight = path.is_file() and not is_zipfile(path)
    for conversation in _read(path, reading, named):
        reading.conversations += 1
        reading.check_replies()
        reading.by_line = straight and reading.read_as == OURS_TOLD
        yield conversation if reading.by_line else replace(conversation, id=f"{path.name}:{reading.conversations}")


def _read(path: Path, reading: Reading, named: str) -> Iterator[Conversation]:
    if path.is_dir():
        return _folder(path, reading, named)
    if not path.exists():
        raise DataError(f"{path} does not exist; give the path of a file or a folder")
    start = start_of(path)
    if start.startswith(ZIP):
        return _zip(path, reading, named)
    if rows := _table(path, start):
        return of_rows(path, rows, reading, named)
    text = start.decode("utf-16" if start[:2] in UTF16 else "utf-8-sig", "replace").lstrip()
    if named in ("", "signal-export") and path.suffix == ".md" and looks_like_whatsapp(text):
        reading.take_for(EXPORTS["signal-export"].told)
        return paired(signal_markdown(path, reading), reading)
    if named == "whatsapp" or (not named and looks_like_whatsapp(text)):
        reading.take_for("a WhatsApp chat")
        return read_whatsapp(path, reading)
    if named == "mbox" or (not named and text.startswith("From ") and "\nFrom:" in text.replace("\r", "")):
        reading.take_for("mail in mbox")
        return paired(mails(path, reading), reading)
    if text.startswith(("{", "[")):
        return _json(path, reading, named)
    if not named and looks_like_another_chat(text):
        raise DataError(
            f"{path}, line 1: looks like a chat of WhatsApp's with dates of a form that is not known here; export it "
            f"with the phone set to English"
        )
    header = text.splitlines()[0] if text.strip() else ""
    if named != OURS and delimiter_of(header):
        return of_rows(path, read_csv(path), reading, named)
    return _ours(path, reading)


def _ours(path: Path, reading: Reading) -> Iterator[Conversation]:
    reading.read_as = OURS_TOLD
    return read_jsonl(path)


def _table(path: Path, start: bytes) -> Iterator[Located] | None:
    if start.startswith(PARQUET):
        return read_parquet(path)
    return read_arrow(path) if start.startswith(ARROW) else None


def _json(path: Path, reading: Reading, named: str) -> Iterator[Conversation]:
    values = json_values(path)
    first = next(values)
    second = next(values, None)
    documents: Iterator[tuple[str, Any]] = chain([first], [second] if second else [], values)
    for key, export in EXPORTS.items():
        if named == key or (not named and export.fits(first[1])):
            reading.take_for(export.told)
            return paired(export.messages(documents, reading), reading)
    wrapped = second is None and _is_wrapped(first[1], reading)
    if named == OURS or (not named and not wrapped and _is_ours(path, first[1], reading)):
        return _ours(path, reading)
    if wrapped:
        documents = iter([(first[0], _rows_in(first[1]))])
    return of_rows(path, _unpacked(documents), reading, named)


def _is_ours(path: Path, first: Any, reading: Reading) -> bool:
    """Whether the strict reader is to judge a file: a line an object, with our keys or none that is known.

    Where there are others beside ours that have no meaning here, rows are read by what their columns are called.
    """
    if not isinstance(first, dict) or not is_json_lines(path):
        return False
    ours = {"user", "prompt", "response"} <= first.keys() and reading.fields == FieldNames()
    if ours and (others := [key for key in first if key not in KEYS]) and all(is_foreign(key, KEYS) for key in others):
        reading.note(f"passed over: {', '.join(others)}")
        return False
    return ours or not fits(first, reading)


def _is_wrapped(document: Any, reading: Reading) -> bool:
    """Whether the one object of a file holds one list of rows, and nobody's name beside it, as {"data": [...]} does."""
    if not isinstance(document, dict) or {"messages", "conversations", "chosen", *KEYS} & document.keys():
        return False
    return bool(_rows_in(document)) and not reading.key("user", document) and not reading.key("conversation", document)


def _rows_in(document: Row) -> list[Row]:
    """The list of objects that an object holds; [] where it holds none, or several."""
    lists = [v for v in document.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
    return lists[0] if len(lists) == 1 else []


def _unpacked(documents: Iterable[tuple[str, Any]]) -> Iterator[Located]:
    """The rows of lists, and objects as they are."""
    for place, value in documents:
        for n, row in enumerate(value, start=1) if isinstance(value, list) else [(0, value)]:
            where = f"{place}, row {n}" if n else place
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected one JSON object, found {shown(row)}")
            yield where, row


def fits(row: Row, reading: Reading) -> bool:
    """Whether a row is of a known format."""
    return any(form.fits(row, reading) for form in ROW_FORMATS.values())


def of_rows(source: object, rows: Iterator[Located], reading: Reading, named: str = "") -> Iterator[Conversation]:
    """The conversations of rows, of the format that is named or that the first of them has."""
    first = next(rows, None)
    if first is None:
        raise DataError(f"{source} holds no row")
    reading.check_named(first[1], first[0])
    for key, form in ROW_FORMATS.items():
        if named == key or (not named and form.fits(first[1], reading)):
            reading.read_as = form.told
            return form.read(chain([first], rows), reading)
    raise DataError(
        f"{first[0]}: no known format has the keys {shown(list(first[1]))}; say what they hold, as "
        f"data.fields.user={next(iter(first[1]), 'author')!r}, with prompt and response, or with text, of your own"
    )


def _folder(folder: Path, reading: Reading, named: str) -> Iterator[Conversation]:
    """The files of a folder one after the other; of an export, its own files, each folder of which is a chat."""
    if saved := saved_files(folder):
        rows = chain.from_iterable(read_arrow(path) for path in saved)
        return of_rows(folder, rows, reading, named)
    paths = texts_of(folder, reading)
    if not paths:
        raise DataError(f"{folder} holds no file that is a text or a table")
    for key, export in EXPORTS.items():
        files = [path for path in paths if export.files and export.files.fullmatch(path.name)]
        if files and (named == key or (not named and any(_is_of(export, path) for path in files[:LOOKED_AT]))):
            reading.take_for(export.told)
            _leave_aside(paths, files, reading)
            called = _chats(files, folder)
            each = (export.messages(json_values(path), reading, called[path]) for path in files)
            return paired(chain.from_iterable(each), reading)
    if named in ("", "signal-export") and (chats := [path for path in paths if path.name == SIGNAL_CHAT]):
        reading.take_for(EXPORTS["signal-export"].told)
        _leave_aside(paths, chats, reading)
        named_after = _chats(chats, folder)
        return paired(chain.from_iterable(signal_markdown(p, reading, named_after[p]) for p in chats), reading)
    return _one_by_one(paths, reading, named)


def _leave_aside(paths: Iterable[Path], read: Collection[Path], reading: Reading) -> None:
    for path in paths:
        if path not in read:
            reading.leave_out("file beside those of the export", str(path))


def _chats(files: Iterable[Path], folder: Path) -> dict[Path, str]:
    """What the chat of each file is called: after its folder, or by the way there where two are called the same."""
    places = {path: path.parent.relative_to(folder) for path in files}
    apart = len({place.name for place in places.values()}) == len(set(places.values()))
    return {path: (place.name if apart else place.as_posix()) or path.parent.name for path, place in places.items()}


def _is_of(export: Export, path: Path) -> bool:
    return export.fits(next(json_values(path), ("", None))[1])


def _one_by_one(paths: list[Path], reading: Reading, named: str) -> Iterator[Conversation]:
    seen = ""
    for path in paths:
        yield from _read(path, reading, named)
        if seen and reading.read_as != seen:
            raise DataError(f"{path} is {reading.read_as}, but the files before are {seen}; give each its own folder")
        seen = reading.read_as


def _zip(path: Path, reading: Reading, named: str) -> Iterator[Conversation]:
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / path.stem
        folder.mkdir()
        try:
            with ZipFile(path) as archive:
                archive.extractall(folder, but_media(archive.namelist(), path, reading))
        except (BadZipFile, OSError, RuntimeError, NotImplementedError, zlib.error) as error:
            raise DataError(f"{path} cannot be read as a zip archive ({error}); is the file whole?") from None
        files = [p for p in folder.rglob("*") if p.is_file()]
        try:
            yield from _read(files[0] if len(files) == 1 else folder, reading, named)
        except DataError as error:
            raise DataError(str(error).replace(str(folder), str(path))) from None
        finally:
            reading.first = {reason: at.replace(str(folder), str(path)) for reason, at in reading.first.items()}
