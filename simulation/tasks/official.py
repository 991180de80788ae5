"""What the readers of benchmarks' official files share: fields with their places in errors, and whose history is whose.

Every reader raises `DataError` with file and place for whatever is missing or of another form.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.folder import shown
from florilegium.simulation.tasks.task import Item, Query, TaskUser

Asked = tuple[Query, dict[str, Item]]  # a question, and the items that its user has before it, by id


def read_json(path: Path) -> Any:
    """The whole of a file of JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; name the folder of the task's official files, and the split") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON in UTF-8 ({error}); is the file whole?") from error


def rows_of(value: Any, where: str) -> list[dict[str, Any]]:
    """A list of objects."""
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise DataError(f"{where}: expected a list of objects")
    return value


def text_of(row: dict[str, Any], key: str, where: str) -> str:
    """A field that is a text or a number, as a text without spaces around it."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{where}: {key} = {shown(value)} must be a text or a number")
    return str(value).strip().encode("utf-8", "replace").decode()  # half a character becomes a "?"


def literal_of(row: dict[str, Any], key: str, where: str) -> Any:
    """A list or an object that a table holds as a text, in JSON or as Python writes it.

    >>> literal_of({"x": '["a"]'}, "x", "") == literal_of({"x": "['a']"}, "x", "") == ["a"]
    True
    """
    written = text_of(row, key, where)
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(written)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise DataError(f"{where}: {key} = {shown(written)} must be a list or an object, in JSON or as Python writes it")


def seconds_of(date: Any, where: str) -> float:
    """Of a year, a month or a day, such as 2014, 2014-05 or 2014-05-31."""
    try:
        year, month, day = (*map(int, str(date).split("-")), 1, 1)[:3]
        return datetime(year, month, day, tzinfo=UTC).timestamp()
    except ValueError:
        raise DataError(f"{where}: date = {date!r} must be a year, a month or a day, as 2014-05-31") from None


def with_common_history(identity: str, asked: Sequence[Asked]) -> TaskUser:
    """A user whose history is what all of the questions know, so that nothing in it is later than one of them."""
    common = set.intersection(*(set(history) for _, history in asked))
    items = sorted((item for i, item in asked[0][1].items() if i in common), key=lambda item: item.time)
    return TaskUser(identity, tuple(items), tuple(sorted((query for query, _ in asked), key=lambda q: q.time)))


def split_users(users: Iterable[TaskUser], test_users: int = 100) -> tuple[list[TaskUser], list[TaskUser]]:
    """The pool, and apart from it the `test_users` users with the longest histories, as in OPPU (arXiv 2402.04401).

    Who is asked at several moments counts by the longest of their histories, and is in the pool with none of them
    where one is tested on.
    """
    found = list(users)
    longest: dict[str, int] = {}
    for user in found:
        longest[user.owner] = max(longest.get(user.owner, 0), len(user.history))
    found.sort(key=lambda user: (-longest[user.owner], user.owner, -len(user.history), user.id))
    tested = {user.owner for user in found[:test_users]}
    return [user for user in found[test_users:] if user.owner not in tested], found[:test_users]
