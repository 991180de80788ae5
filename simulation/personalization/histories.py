"""From a task's users to the people that methods are made for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.model import LanguageModel
from florilegium.client.personalization.history import Asked, Past, Person, Wording
from florilegium.client.personalization.retrieve import rankings
from florilegium.simulation.personalization.config import HistoryConfig
from florilegium.simulation.tasks.task import Item, Task, TaskUser


def person(user: TaskUser, task: Task, config: HistoryConfig, name: str) -> Person:
    """A user under a device's name, with as much of the history as the settings leave."""
    items = user.history[-config.most :] if config.most else user.history
    past = tuple((_past if config.labels else _plain)(item, task) for item in items)
    questions = tuple(
        (Asked(q.input, q.search, q.options, task.labels if q.options else ()), task.question(q)) for q in user.queries
    )
    return Person(name, past, questions, user.person)


def wording(task: Task) -> Wording:
    return Wording(task.with_items)


def halved(people: Sequence[Person], config: HistoryConfig, lm: LanguageModel) -> list[Person]:
    """With the half of each history that is nearest to the person's questions, or the one that is farthest."""
    if config.part == "all":
        return list(people)
    ranked = rankings("bm25", [p.history for p in people], lm, [p.id for p in people], 0)
    found = []
    for p, ranking in zip(people, ranked, strict=True):
        asked = Asked("", " ".join(a.search for a, _ in p.questions))
        order = ranking(asked, len(p.history))
        half = order[: len(order) // 2] if config.part == "near" else order[len(order) // 2 :]
        found.append(replace(p, history=tuple(p.history[i] for i in sorted(half))))
    return found


def _past(item: Item, task: Task) -> Past:
    return Past(task.document(item), task.shown(item), task.example(item), task.search(item))


def _plain(item: Item, task: Task) -> Past:
    """What the user wrote and nothing else, to be read and to be continued."""
    text = task.written(item)
    return Past(text, f'"{text}"', Dialogue(item.id, "", text, item.time), "")
