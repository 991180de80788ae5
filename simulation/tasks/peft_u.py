"""PEFT-U: texts that people label differently, from the official files (Clarke et al., arXiv 2407.18078).

A folder for each data set holds `user_data_no_leak.json`, `{user: {"train" | "val" | "test": {id: {"text", "label":
[…]}}}}`, as the authors' `peft_u/preprocess/convert_data_format.py` writes it
(github.com/ChrisIsKing/Parameter-Efficient-Personalization); the data itself was not here. A text that somebody is
asked about is in nobody's training part there: `user_data_leaked.json`, where it may be, is not read.

A history is the training part in the order of the file, for there are no times. The benchmark's figure is the mean of
the persons' accuracies. The prompt is ours: the authors' has an instruction for each data set. Labels are all that the
file has; where a text may have several, a reply is right if it names one of them, as the authors count it, but not a
part of one, which they let pass. Not covered: the data sets whose replies are written freely.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.folder import shown
from florilegium.simulation.tasks.official import read_json, text_of
from florilegium.simulation.tasks.task import Item, Task, TaskUser

FILE = "user_data_no_leak.json"
PARTS = {"dev": "val", "test": "test"}
Labelled = dict[str, tuple[str, tuple[str, ...]]]  # a text and its labels, by id


def load_peft_u(folder: Path, file: str) -> tuple[Task, list[TaskUser]]:
    """The task, and the people who have a training part and are asked something, by id. Raises `DataError`."""
    path, part = folder / FILE, PARTS[file]
    people = {user: _parts(parts, f"{path}, user {user!r}") for user, parts in _object(read_json(path), path).items()}
    labels = [given for parts in people.values() for of in parts.values() for _, given in of.values()]
    task = _task(
        folder.name, tuple(sorted({label for given in labels for label in given})), max(map(len, labels), default=1)
    )
    known = {text for parts in people.values() for text in parts["train"]}
    if leaked := sorted(known & {text for parts in people.values() for text in parts[part]}):
        raise DataError(f"{path}: text {leaked[0]!r} is asked about and stands in a training part; is it {FILE}?")
    able = {user: parts for user, parts in sorted(people.items()) if parts["train"] and parts[part]}
    return task, [_user(task, user, parts["train"], parts[part]) for user, parts in able.items()]


def _task(name: str, labels: tuple[str, ...], most: int) -> Task:
    several = most > 1
    how = "one or more of the following, separated by commas" if several else "one of the following"
    return Task(
        f"peft-u:{name}",
        ("label accuracy",) if several else ("accuracy", "f1"),
        () if several else labels,
        asked=f"How does the user label this text? Just answer with {how}: {', '.join(labels)}. text: {{text}}",
        shown_as='the label of the text: "{text}" is "{target}" ',
    )


def _user(task: Task, user: str, past: Labelled, later: Labelled) -> TaskUser:
    def items(found: Labelled, start: int) -> list[Item]:
        given = enumerate(found.items(), start=start)
        return [Item(identity, text, ", ".join(labels), float(n)) for n, (identity, (text, labels)) in given]

    return TaskUser(user, tuple(items(past, 0)), tuple(task.ask(item) for item in items(later, len(past))))


def _parts(parts: Any, where: str) -> dict[str, Labelled]:
    found = _object(parts, where)
    return {part: _labelled(found.get(part, {}), f"{where}, {part}") for part in ("train", *PARTS.values())}


def _labelled(samples: Any, where: str) -> Labelled:
    found: Labelled = {}
    for identity, sample in _object(samples, where).items():
        place = f"{where}, {identity!r}"
        labels = _object(sample, place).get("label")
        if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
            raise DataError(f"{place}: label = {shown(labels)} must be a list of texts that is not empty")
        found[identity] = text_of(sample, "text", place), tuple(label.strip() for label in labels)
    return found


def _object(value: Any, where: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, found {shown(value)}")
    return value
