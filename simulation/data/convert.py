"""Any file that can be read as JSON Lines of ours, for `florilegium data import`."""

from __future__ import annotations

import json
from pathlib import Path

from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.folder import Row
from florilegium.simulation.data.formats.reading import Reading
from florilegium.simulation.data.formats.recognise import FORMATS
from florilegium.simulation.data.population import DataConfig, collect, reading_of


def convert(config: DataConfig, out: Path, named: str = "") -> Reading:
    """Writes a new file from which the same people with the same replies are drawn; `named` is one of `FORMATS`.

    Of data that names no users lines name none: the same replies, each of which is a conversation of its own then.
    Raises `DataError` where the file exists, or there is no reply.
    """
    if named and named not in FORMATS:
        raise DataError(f"--as {named} must be one of {', '.join(FORMATS)}")
    if config.partition.kind:
        raise DataError(
            "a partition is drawn anew for each run's users and split; leave data.partition out of an import"
        )
    if out.exists():
        raise DataError(f"{out} exists; name a new file")
    if not out.parent.is_dir():
        raise DataError(f"{out.parent} is no folder; name a file in one that is there")
    reading = reading_of(config)
    replies = collect(config, reading, named)
    if replies.anonymous:
        reading.note(
            "it names no users, and so do the lines: runs deal them to devices; data.fields.user= says what names them"
        )
    if not replies.by_user:
        raise DataError("; ".join([f"{config.name} holds no reply to learn ({reading.told()})", *reading.problems()]))
    with out.open("x", encoding="utf-8") as lines:
        for user, said in replies.by_user.items():
            for reply in said:
                row: Row = {} if replies.anonymous else {"user": user}
                row |= {"time": reply.time, "prompt": reply.prompt, "response": reply.response}
                row |= {"domain": reply.domain} if reply.domain else {}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    return reading
