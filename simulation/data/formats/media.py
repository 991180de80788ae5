"""Which files of a folder or an archive are data: pictures, recordings and documents beside a chat are left out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from mimetypes import guess_type
from pathlib import Path, PurePosixPath

from florilegium.simulation.data.formats.opened import ARROW, OPENERS, PARQUET, UTF16, ZIP, ZSTD
from florilegium.simulation.data.formats.reading import Reading

KINDS = ("image", "audio", "video", "font")
ENDINGS = (".pdf", ".vcf", ".opus", ".webp", ".heic", ".doc", ".docx", ".xls", ".xlsx", ".ppt", ".pptx", ".apk")
ABOUT = re.compile(r"(README|LICENSE)(\.(md|txt|rst))?")  # documents that lie beside data
NOT_TEXT = (*OPENERS, *ARROW, *UTF16, PARQUET, ZIP, ZSTD)  # how files begin that are data all the same
LEFT_OUT = "file that is a picture, a recording or a document"


def texts_of(folder: Path, reading: Reading) -> list[Path]:
    """The files that may be data, in the order of their names; media are counted, what stands beside data is not."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(folder)))
    media = {path for path in paths if is_media_name(path.name) or ABOUT.fullmatch(path.name) or _is_binary(path)}
    for path in sorted(media):
        reading.leave_out(LEFT_OUT, str(path))
    return [path for path in paths if path not in media]


def but_media(names: Iterable[str], archive: Path, reading: Reading) -> list[str]:
    """The members of an archive that are worth unpacking; the others are counted."""
    kept: list[str] = []
    for name in names:
        if is_media_name(name) and not PurePosixPath(name).name.startswith("."):
            reading.leave_out(LEFT_OUT, f"{archive}/{name}")
        elif not is_media_name(name):
            kept.append(name)
    return kept


def is_media_name(name: str) -> bool:
    """Whether a file's ending is that of something else than text or a table.

    >>> is_media_name("IMG-20240501-WA0001.JPG"), is_media_name("_chat.txt")
    (True, False)
    """
    kind = (guess_type(name.lower())[0] or "").partition("/")[0]
    return kind in KINDS or name.lower().endswith(ENDINGS)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_binary(path: Path) -> bool:
    with path.open("rb") as stream:
        start = stream.read(4096)
    return b"\0" in start and not start.startswith(NOT_TEXT)
