"""From people's cards to a task's items and queries.

A maker gets the task, the pool, those who are reported on, and the seed; it gives both as `TaskUser`s.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from florilegium.client.dialogue import Dialogue
from florilegium.client.words import count
from florilegium.privacy.seeds import derive_seed
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.population import User
from florilegium.simulation.tasks.populations import plain
from florilegium.simulation.tasks.task import Item, Query, Task, TaskUser

Split = tuple[list[TaskUser], list[TaskUser]]  # the pool, and the users who are reported on
Met = dict[tuple[str, str], list[tuple[str, Dialogue]]]  # by kind of prompt, who replied and what


def as_recorded(task: Task, pool: list[User], users: list[User], seed: int) -> Split:
    """Prompts are texts, responses targets."""
    return [_task_user(task, user) for user in pool], [_task_user(task, user) for user in users]


def by_length(task: Task, pool: list[User], users: list[User], seed: int) -> Split:
    """The target is the fifth, of all replies in the pool's histories, that the length of the user's reply is in."""
    lengths = [_words(card) for user in pool for card in user.stream]
    cuts = [float(cut) for cut in np.quantile(lengths, (0.2, 0.4, 0.6, 0.8))]

    def rated(user: User) -> User:
        return User(user.id, *(tuple(_rated(c, cuts) for c in part) for part in (user.stream, user.held_out)))

    return as_recorded(task, [rated(user) for user in pool], [rated(user) for user in users], seed)


def of_options(task: Task, pool: list[User], users: list[User], seed: int) -> Split:
    """Each query has the user's reply among as many as there are labels, the others of people in the pool.

    These are to prompts of the same kind: with the same first word, and the same end in a question mark or not; where
    too few met such a prompt, with the same end. Where the right one stands is drawn. The history is the user's
    replies, without labels. A quarter of the pool is in it no more: these give the others' replies, and nothing is
    learned from them.
    """
    others: Met = {}
    strangers = pool[::4]
    pool = [user for k, user in enumerate(pool) if k % 4]
    for user in strangers:
        for card in user.stream:
            for kind in _kinds(card):
                others.setdefault(kind, []).append((user.id, card))

    def chosen(user: User) -> TaskUser:
        queries = tuple(
            _choice(task, card, _distractors(user.id, card, others, len(task.labels) - 1, seed), seed)
            for card in user.held_out
        )
        return TaskUser(user.id, tuple(_reply_item(card) for card in user.stream), queries)

    return [chosen(user) for user in pool], [chosen(user) for user in users]


def _distractors(user: str, card: Dialogue, others: Met, count: int, seed: int) -> list[str]:
    """So many replies of others, no two in the same words, those to the nearest kinds of prompts first."""
    found = {plain(card.response): card.response}
    for kind in (*_kinds(card), *others):
        met = (c for who, c in others.get(kind, ()) if who != user)
        for other in sorted(met, key=lambda other: derive_seed(seed, "distractor", card.id, other.id)):
            found.setdefault(plain(other.response), other.response)
        if len(found) > count:
            return list(found.values())[1 : count + 1]
    raise DataError(f"a choice of {count + 1} replies needs those of others in the pool; raise pool_users")


def _choice(task: Task, card: Dialogue, distractors: list[str], seed: int) -> Query:
    right = derive_seed(seed, "order", card.id) % len(task.labels)
    options = (*distractors[:right], card.response, *distractors[right:])
    asked = " ".join(f'{label}: "{option}"' for label, option in zip(task.labels, options, strict=True))
    prompt = task.asked.format(text=asked, target="", title=card.prompt)
    return Query(card.id, prompt, task.labels[right], " ".join(options), options, card.time)


def _kinds(card: Dialogue) -> tuple[tuple[str, str], tuple[str, str]]:
    end = "?" if card.prompt.rstrip().endswith("?") else "."
    return (plain(card.prompt).partition(" ")[0], end), ("", end)


def _task_user(task: Task, user: User) -> TaskUser:
    queries = tuple(task.ask(_item(card)) for card in user.held_out)
    return TaskUser(user.id, tuple(_item(card) for card in user.stream), queries)


def _item(card: Dialogue) -> Item:
    return Item(card.id, card.prompt, card.response, card.time)


def _reply_item(card: Dialogue) -> Item:
    return Item(card.id, card.response, time=card.time, title=card.prompt)


def _rated(card: Dialogue, cuts: Sequence[float]) -> Dialogue:
    return replace(card, response=str(1 + bisect_right(cuts, _words(card))))


def _words(card: Dialogue) -> int:
    return count(card.response)
