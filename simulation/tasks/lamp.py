"""LaMP's seven public tasks, from the official files of whoever has them (Salemi et al., arXiv 2304.11406).

A folder holds `{split}_questions.json`, `[{id, input, profile: [{id, date?, …}], user_id?}]`, and
`{split}_outputs.json`, `{"task": "LaMP_2", "golds": [{id, output}]}`. The time-based split names a `user_id`; in the
user-based one each question is a user. Prompts, what is retrieved by, and how items enter a prompt follow the
authors' code (github.com/LaMP-Benchmark/LaMP, `LaMP/prompts/prompts.py`), without its cuts to a tokenizer's length.
The data is CC BY-NC-SA 4.0 and no part of this project. LaMP 6 (a licensed mail corpus) is not covered.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from florilegium.simulation.data.errors import DataError
from florilegium.simulation.tasks.official import read_json, rows_of, seconds_of, text_of, with_common_history
from florilegium.simulation.tasks.task import Item, Query, Task, TaskUser, after_title, as_patterns, by_a_person

NEWS = (
    "women, religion, politics, style & beauty, entertainment, culture & arts, sports, science & technology, travel, "
    "business, crime, education, healthy living, parents, food & drink"
)
TAGS = (
    "sci-fi, based on a book, comedy, action, twist ending, dystopia, dark comedy, classic, psychology, fantasy, "
    "romance, thought-provoking, social commentary, violence, true story"
)
ROUGE = ("rouge-1", "rouge-L")


@dataclass(frozen=True)
class Official:
    """A task, and the fields of its history in the files.

    A prompt's text stands behind the first `marker`; where that is empty, the prompt has two options.
    """

    task: Task
    file_names: tuple[str, ...]  # of the task, in `outputs`
    text: str
    target: str = ""
    title: str = ""
    marker: str = ":"


# The history of 1 and 7 has no label. OPPU (arXiv 2402.04401) completes "paper title: … reference: …" and "tweet: …";
# the official history has an abstract and no reference, so that stands there, as in the authors' own per-user PEFT.
OFFICIAL = {
    "1": Official(
        Task(
            "lamp:1",
            ("accuracy", "f1"),
            ("[1]", "[2]"),
            practice=("paper title: {title} abstract:", "{text}"),
            searched_with="{title}",
            shown_as='"{title}"',
            joined=after_title,
            searched="{title} {text}",
        ),
        ("LaMP_1",),
        text="abstract",
        title="title",
        marker="",
    ),
    "2N": Official(
        Task(
            "lamp:2N",
            ("accuracy", "f1"),
            tuple(NEWS.split(", ")),
            asked="Which category does this article relate to among the following categories? Just answer with the "
            f"category name without further explanation. categories: [{NEWS}] article: {{text}}",
            shown_as='the category for the article: "{text}" is "{target}" ',
            searched="{title} {text}",
        ),
        ("LaMP_2", "LaMP_2N"),
        text="text",
        target="category",
        title="title",
        marker="article:",
    ),
    "2M": Official(
        Task(
            "lamp:2M",
            ("accuracy", "f1"),
            tuple(TAGS.split(", ")),
            asked="Which tag does this movie relate to among the following tags? Just answer with the tag name without "
            f"further explanation. tags: [{TAGS}] description: {{text}}",
            shown_as='the tag for the movie: "{text}" is "{target}" ',
        ),
        ("LaMP_2", "LaMP_2M"),
        text="description",
        target="tag",
        marker="description:",
    ),
    "3": Official(
        Task(
            "lamp:3",
            ("mae", "rmse"),
            ("1", "2", "3", "4", "5"),
            asked="What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 "
            "without further explanation. review: {text}",
            shown_as='{target} is the score for "{text}" ',
        ),
        ("LaMP_3",),
        text="text",
        target="score",
        marker="review:",
    ),
    "4": Official(
        Task(
            "lamp:4",
            ROUGE,
            asked="Generate a headline for the following article: {text}",
            shown_as='"{target}" is the title for "{text}" ',
            searched="{target} {text}",
        ),
        ("LaMP_4",),
        text="text",
        target="title",
        marker="article:",
    ),
    "5": Official(
        Task(
            "lamp:5",
            ROUGE,
            asked="Generate a title for the following abstract of a paper: {text}",
            shown_as='"{target}" is a title for "{text}" ',
            joined=as_patterns,
            searched="{target} {text}",
        ),
        ("LaMP_5",),
        text="abstract",
        target="title",
        marker="paper:",
    ),
    "7": Official(
        Task(
            "lamp:7",
            ROUGE,
            practice=("tweet:", "{text}"),
            searched_with="",
            joined=by_a_person,
        ),
        ("LaMP_7",),
        text="text",
    ),
}


def load_lamp(folder: Path, number: str, split: str) -> list[TaskUser]:
    """The users of one split of task `number` (a key of `OFFICIAL`), by id.

    A user's history is what all of the user's questions have in their profiles, so that nothing in it is later than
    one of them. Raises `DataError` with file and id for whatever is missing or of another form.
    """
    official = OFFICIAL[number]
    questions_path, outputs_path = folder / f"{split}_questions.json", folder / f"{split}_outputs.json"
    golds = _golds(outputs_path, official)
    asked: dict[str, list[tuple[Query, dict[str, Item]]]] = {}
    for n, row in enumerate(rows_of(read_json(questions_path), str(questions_path))):
        where = f"{questions_path}, question {row.get('id', f'number {n + 1}')!r}"
        identity = text_of(row, "id", where)
        if identity not in golds:
            raise DataError(f"{where}: {outputs_path.name} has no gold for it; are both files of the same split?")
        history = _profile(row, official, where)
        query = _query(row, golds[identity], official, max((i.time for i in history.values()), default=0.0), where)
        asked.setdefault(str(row.get("user_id", identity)), []).append((query, history))
    return [with_common_history(user, asked[user]) for user in sorted(asked)]


def _query(row: dict[str, Any], gold: str, official: Official, time: float, where: str) -> Query:
    identity, prompt = text_of(row, "id", where), text_of(row, "input", where)
    if not official.marker:
        found = re.search(r'\[1\]: "(.*)" \[2\]: "(.*)"', prompt, re.DOTALL)
        if not found:
            raise DataError(f'{where}: input must hold [1]: "…" [2]: "…"; is the file of LaMP_1?')
        return Query(identity, prompt, gold, f"{found[1]} {found[2]}", (found[1], found[2]), time)
    _, marker, text = prompt.partition(official.marker)
    if not marker:
        raise DataError(f"{where}: input lacks {official.marker!r}; is the file of {official.file_names[-1]}?")
    return Query(identity, prompt, gold, text.strip(), time=time)


def _profile(row: dict[str, Any], official: Official, where: str) -> dict[str, Item]:
    """Items by id; without dates the order of the file is that of time."""
    profile = rows_of(row.get("profile"), f"{where}, profile")
    if len({"date" in item for item in profile}) > 1:
        raise DataError(f"{where}: some items of its profile have a date and others none; give all or none")
    items: dict[str, Item] = {}
    for n, fields in enumerate(profile):
        here = f"{where}, item {fields.get('id', f'number {n + 1}')!r}"
        text, target, title = (text_of(fields, k, here) if k else "" for k in _keys(official))
        time = seconds_of(fields["date"], here) if "date" in fields else float(n)
        identity = text_of(fields, "id", here)
        items[identity] = Item(identity, text, target, time, title)
    return items


def _keys(official: Official) -> tuple[str, str, str]:
    return official.text, official.target, official.title


def _golds(path: Path, official: Official) -> dict[str, str]:
    outputs = read_json(path)
    if not isinstance(outputs, dict) or "golds" not in outputs:
        raise DataError(f'{path}: expected {{"task": …, "golds": […]}}')
    named = str(outputs.get("task")).replace("-", "_")
    if named not in official.file_names:
        raise DataError(f"{path}: task = {named!r} must be {' or '.join(official.file_names)} for {official.task.name}")
    golds: dict[str, str] = {}
    for n, row in enumerate(rows_of(outputs["golds"], f"{path}, golds")):
        where = f"{path}, gold {row.get('id', f'number {n + 1}')!r}"
        gold = text_of(row, "output", where)
        if official.task.labels and gold not in official.task.labels:
            raise DataError(f"{where}: output = {gold!r} is no label of {official.task.name}")
        golds[text_of(row, "id", where)] = gold
    return golds
