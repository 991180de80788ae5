"""LongLaMP: long texts with a history per person, from the official files (Kumar et al., arXiv 2407.11016).

Of the data set `LongLaMP/LongLaMP` on the hub a folder holds the shards of one configuration, `{split}-*.parquet`, or
what `datasets` writes of it as JSON Lines, `{split}.jsonl`; splits are train, val and test. A row has the person
(`name`, `reviewerId` or `author`), `input`, `output` and `profile`, a list of objects. That form was read off several
programs that use the data, prompts and what is searched by off one that is derived from the authors' code; the data
itself was not here. Configurations that end in `_user` part the people, those in `_temporal` part times; both are read.

A person's history is what all of their questions have in their profiles, without what one of them asks for. The
benchmark's METEOR is left out: it needs WordNet's data, which nltk has to fetch. Not covered: completion of emails (a
licensed corpus).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.folder import Row, json_lines
from florilegium.simulation.data.formats.reading import Located
from florilegium.simulation.data.formats.tables import read_parquet
from florilegium.simulation.tasks.official import Asked, rows_of, seconds_of, text_of, with_common_history
from florilegium.simulation.tasks.populations import plain
from florilegium.simulation.tasks.task import Item, Query, Task, TaskUser, as_patterns, in_the_style

ROUGE = ("rouge-1", "rouge-L")
SPLITS = {"train": "train", "dev": "val", "test": "test"}


@dataclass(frozen=True)
class Kind:
    """A task and the fields of its files: whose it is, and of an item what is told (a template), written and entitled.

    What a question is searched by stands behind `marker`, where there is one.
    """

    task: Task
    person: str
    told: str
    fields: tuple[str, ...]  # of `told`
    written: str
    title: str = ""
    marker: str = ""


KINDS = {
    "abstract": Kind(
        Task(
            "longlamp:abstract",
            ROUGE,
            practice=('Generate an abstract for the title "{text}"', "{target}"),
            shown_as='"{target}" is the abstract for the title "{text}"',
            joined=in_the_style,
            searched="{text} {target}",
            own="{target}",
        ),
        "name",
        told="{title}",
        fields=("title",),
        written="abstract",
        marker="items:",
    ),
    "review": Kind(
        Task(
            "longlamp:review",
            ROUGE,
            practice=('Generate the review text: {text}. The summary of the review text is "{title}".', "{target}"),
            shown_as='{text}. "{title}" is summary for "{target}" ',
            joined=as_patterns,
            searched="{text} {title} {target}",
            searched_with="{text} {title}",
            own="{target}",
        ),
        "reviewerId",
        told='"{overall}" is a rating for the product with description "{description}"',
        fields=("overall", "description"),
        written="reviewText",
        title="summary",
    ),
    "topic": Kind(
        Task(
            "longlamp:topic",
            ROUGE,
            practice=("Generate the content for a reddit post {text}", "{target}"),
            shown_as='"{text}" is a summary for "{target}" ',
            joined=as_patterns,
            searched="{text} {target}",
            own="{target}",
        ),
        "author",
        told="{summary}",
        fields=("summary",),
        written="content",
    ),
}


def load_longlamp(folder: Path, name: str, file: str) -> list[TaskUser]:
    """The people of one split of the task `name` (a key of `KINDS`), by id. Raises `DataError`."""
    kind, split = KINDS[name], SPLITS[file]
    asked: dict[str, list[Asked]] = {}
    for n, (where, row) in enumerate(_rows(folder, split)):
        history = _profile(row, kind, where)
        time = max((item.time for item in history.values()), default=0.0)
        prompt, gold = text_of(row, "input", where), text_of(row, "output", where)
        _, _, behind = prompt.partition(kind.marker) if kind.marker else ("", "", "")
        query = Query(f"{split}:{n}", prompt, gold, behind.strip() or prompt, time=time)
        asked.setdefault(text_of(row, kind.person, where), []).append((query, history))
    return [_without_golds(with_common_history(person, asked[person])) for person in sorted(asked)]


def _without_golds(user: TaskUser) -> TaskUser:
    golds = {plain(query.target) for query in user.queries}
    return replace(user, history=tuple(item for item in user.history if plain(item.target) not in golds))


def _profile(row: Row, kind: Kind, where: str) -> dict[str, Item]:
    """Items by id, or by what they hold where they have none; without years the order of the file is that of time."""
    profile = rows_of(row.get("profile"), f"{where}, profile")
    dated = [item.get("year") is not None for item in profile]
    if any(dated) and not all(dated):
        raise DataError(f"{where}: some items of its profile have a year and others none; give all or none")
    items: dict[str, Item] = {}
    for n, fields in enumerate(profile):
        item = _item(fields, kind, f"{where}, item {n + 1}")
        items.setdefault(item.id, replace(item, time=seconds_of(fields["year"], where) if dated[n] else float(n)))
    return items


def _item(fields: dict[str, Any], kind: Kind, where: str) -> Item:
    told = kind.told.format(**{key: text_of(fields, key, where) for key in kind.fields})
    written = text_of(fields, kind.written, where)
    title = text_of(fields, kind.title, where) if kind.title else ""
    named = fields.get("id") is not None
    held = sha256("\x1f".join((told, title, written)).encode()).hexdigest()[:16]
    return Item(text_of(fields, "id", where) if named else held, told, written, title=title)


def _rows(folder: Path, split: str) -> Iterator[Located]:
    shards, lines = sorted(folder.glob(f"{split}-*.parquet")), folder / f"{split}.jsonl"
    if shards:
        for shard in shards:
            yield from read_parquet(shard)
    elif lines.exists():
        for number, row in json_lines(lines):
            yield f"{lines}, line {number}", row
    else:
        raise DataError(f"{folder} holds neither {split}-*.parquet nor {lines.name}; name one configuration's folder")
