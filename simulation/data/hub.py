"""Reader of a data set of the Hugging Face hub, through the optional package `datasets`.

Rows are recognised as those of files are, or read as one exchange each where `hub_fields` names columns. Rows without
a column for users are anonymous and are dealt to devices later. Streaming and data sets that run code of their own are
not covered: turn such data into a jsonl file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from importlib import import_module
from typing import Any

from pydantic import Field

from florilegium.privacy.common.base_config import Config
from florilegium.privacy.common.errors import first_line
from florilegium.privacy.common.suggestions import did_you_mean
from florilegium.simulation.data.conversations import Conversation, Turn
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.folder import shown
from florilegium.simulation.data.formats.reading import FieldNames, Reading
from florilegium.simulation.data.formats.recognise import fits, of_rows
from florilegium.simulation.data.jsonl import seconds
from florilegium.simulation.data.synonyms import columns_for

ROLES = ("user", "time", "prompt", "response", "domain")
ANSWER_WITHIN_S = 8.0
INSTEAD = "name a .jsonl file with user, prompt and response in [data] name instead"


class HubFields(Config):
    """Which columns of a hub data set hold what. An empty name means that the data set has no such column."""

    user: str = Field("", description="column of who wrote the reply")
    time: str = Field("", description="column of when")
    prompt: str = Field(default="prompt", min_length=1, description="column of what was asked")
    response: str = Field(default="response", min_length=1, description="column of the reply")
    domain: str = Field("", description="column of the topic; empty: none")
    subset: str = Field(default="", description="the hub's name of one configuration of the data set")
    part: str = Field(default="train", description="the hub's own split that is read")
    revision: str = Field(default="main", description="branch, tag or commit; a commit makes a run repeatable")

    def named(self) -> list[str]:
        """The roles whose columns are others than a data set has without more words."""
        return [role for role in ROLES if getattr(self, role) != type(self).model_fields[role].default]


def read_hub(dataset: str, fields: HubFields, reading: Reading | None = None) -> Iterator[Conversation]:
    """The conversations of its rows: of a known format, or of two turns each, the prompt and the reply.

    Raises `DataError` at once where the package, the network, the data set or a column is missing. With
    `HF_HUB_OFFLINE=1` only a copy that was downloaded before is read.
    """
    reading = reading or Reading()
    table = _load(dataset, fields)
    for n, conversation in enumerate(_conversations(dataset, table, fields, reading)):
        reading.conversations += 1
        reading.check_replies()
        yield replace(conversation, id=f"{dataset}:{n}")


def _conversations(dataset: str, table: Any, fields: HubFields, reading: Reading) -> Iterator[Conversation]:
    exchanges = {fields.prompt, fields.response} <= set(table.column_names)
    if not fields.named() and (reading.fields != FieldNames() or (not exchanges and _is_known(table, reading))):
        rows = ((f"hub data set {dataset!r}, row {i}", row) for i, row in enumerate(table))
        return of_rows(f"hub data set {dataset!r}", rows, reading)
    if reading.labelled:
        fields = fields.model_copy(update={"domain": reading.fields.domain})
    if also := [role for role, name in reading.fields if name and not (role == "domain" and reading.labelled)]:
        raise DataError(
            f"data.fields.{also[0]} = {getattr(reading.fields, also[0])!r} beside data.hub_fields.{fields.named()[0]}; "
            f"name columns in one of the two sections"
        )
    reading.read_as = f"columns {fields.prompt} and {fields.response}"
    likely = [] if fields.user else columns_for("user", table.column_names)
    if likely:
        reading.note(f"its column {likely[0]!r} may name users; data.hub_fields.user={likely[0]} for that")
    return _exchanges(dataset, table, fields)


def _is_known(table: Any, reading: Reading) -> bool:
    first = next(iter(table), None)
    return first is not None and fits(first, reading)


def _exchanges(dataset: str, table: Any, fields: HubFields) -> Iterator[Conversation]:
    _check_columns(dataset, fields, table.column_names)
    for i, row in enumerate(table):
        where = f"hub data set {dataset!r}, row {i}"
        user = _text(row, fields, "user", where) if fields.user else ""
        if fields.user and not user:
            raise DataError(f"{where}: {fields.user} is empty; {INSTEAD}")
        time = _time(row[fields.time], where) if fields.time else 0.0
        said = [_text(row, fields, role, where) for role in ("prompt", "response")]
        domain = _text(row, fields, "domain", where) if fields.domain else ""
        turns = (Turn("asker", said[0], time), Turn(user, said[1], time))
        yield Conversation(f"{dataset}:{i}", turns, domain, replies_by=None if fields.user else "")


def _load(dataset: str, fields: HubFields) -> Any:
    """The table, after one short question whether the hub answers: `datasets` itself would retry for long."""
    try:
        datasets, hub = import_module("datasets"), import_module("huggingface_hub")
    except ImportError:
        raise DataError(
            f"hub data set {dataset!r} needs the package datasets: pip install 'florilegium[hub]', or {INSTEAD}"
        ) from None
    try:
        hub.HfApi().dataset_info(dataset, revision=fields.revision, timeout=ANSWER_WITHIN_S)
    except hub.errors.OfflineModeIsEnabled:
        pass  # a copy in the cache can still be read
    except Exception as error:  # the HTTP library, and so the type, differs between versions of huggingface_hub
        raise DataError(
            f"hub data set {dataset!r} cannot be reached ({first_line(error)[:200]}); check its id and the network, "
            f"set HF_HUB_OFFLINE=1 to read a downloaded copy, or {INSTEAD}"
        ) from error
    try:
        return datasets.load_dataset(dataset, fields.subset or None, split=fields.part, revision=fields.revision)
    except Exception as error:  # any builder's failure, of any type
        raise DataError(
            f"hub data set {dataset!r} cannot be loaded ({first_line(error)[:200]}); check hub_fields.subset = "
            f"{fields.subset!r}, part = {fields.part!r} and revision = {fields.revision!r}, or {INSTEAD}"
        ) from error


def _check_columns(dataset: str, fields: HubFields, columns: list[str]) -> None:
    for role in ROLES:
        column = getattr(fields, role)
        if column and column not in columns:
            likely = columns_for(role, columns)
            near = f"did you mean {likely[0]!r}?" if likely else did_you_mean(column, columns, 0.75)
            hint = near or f"it has {', '.join(columns)};"
            raise DataError(f"hub data set {dataset!r} has no column {column!r}; {hint} set hub_fields.{role}")


def _text(row: dict[str, Any], fields: HubFields, role: str, where: str) -> str:
    """A text, or a number or a date as one. Of anything else `str` would make a text that nobody wrote."""
    column = getattr(fields, role)
    value = row[column]
    if value is None:
        return ""
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    if not isinstance(value, str) and not number and not isinstance(value, date):
        raise DataError(
            f"{where}: column {column!r} (hub_fields.{role}) holds {_kind(value)} where a text belongs; "
            f"name another column, or {INSTEAD}"
        )
    return value.isoformat() if isinstance(value, date) else str(value)


def _kind(value: object) -> str:
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, dict):
        return f"a group of {', '.join(map(str, value))}"
    return f"{shown(value)}, of the type {type(value).__name__},"


def _time(value: object, where: str) -> float:
    try:
        return seconds(value)
    except ValueError:
        raise DataError(
            f"{where}: time = {shown(value)} must be seconds, a date or ISO 8601; or leave hub_fields.time empty"
        ) from None
