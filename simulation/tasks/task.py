"""A task of a personal language model: what is asked, with a history per user, and how it is written (after LaMP).

Most types are those of LaMP (Salemi et al., arXiv 2304.11406). A task is data and templates over the fields of
an item; nothing here reads a file or knows a model. Cutting long texts to a model's context is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from florilegium.client.dialogue import Dialogue

Join = Callable[[str, str], str]  # retrieved items, joined, and the prompt; the prompt with the items in it


@dataclass(frozen=True, slots=True)
class Item:
    """One thing in a user's history."""

    id: str
    text: str
    target: str = ""  # empty where the history has no label
    time: float = 0.0
    title: str = ""  # only where a task has one beside the text


@dataclass(frozen=True, slots=True)
class Query:
    """One thing that is asked of the model, with the reply that is right.

    `input` is the task's complete prompt, `search` what a retriever is given, `options` the texts that the labels of
    a choice stand for. `time` is not before that of any item of the history.
    """

    id: str
    input: str
    target: str
    search: str
    options: tuple[str, ...] = ()
    time: float = 0.0


@dataclass(frozen=True, slots=True)
class TaskUser:
    """A person: a history, oldest first, and what is asked after it.

    Where one person is asked at several moments, each moment is a user of its own, with the history up to it, and
    `person` is whose it is; else it is empty.
    """

    id: str
    history: tuple[Item, ...]
    queries: tuple[Query, ...]
    person: str = ""

    @property
    def owner(self) -> str:
        """The person: the same for all of their moments."""
        return self.person or self.id


def before(items: str, prompt: str) -> str:
    return f"{items}. {prompt}"


def above(items: str, prompt: str) -> str:
    return f"{items}\n\n{prompt}"


def as_patterns(items: str, prompt: str) -> str:
    return f"{items}. Following the given patterns {prompt}"


def in_the_style(items: str, prompt: str) -> str:
    return f"{items}. Use the above abstracts as context to understand the style and language of the user and, {prompt}"


def by_a_person(items: str, prompt: str) -> str:
    return f"{items} are written by a person. Following the given patterns {prompt}"


def after_title(items: str, prompt: str) -> str:
    """Behind the first "title" of the prompt: the user's other titles."""
    head, word, tail = prompt.partition("title")
    return f"{head}{word}, and {items}{tail}" if word else prompt


@dataclass(frozen=True)
class Task:
    """What is asked and how. Templates have the fields {text}, {target} and {title} of an item.

    `asked` is the prompt of an item, empty where queries are not made of items. `labels` is the closed set of replies,
    or empty. `practice` is the prompt and the reply of a history item as a training example: by default that of a
    query. `shown_as` is an item that was retrieved, `between` stands between two of them, `joined` is how they enter a
    prompt, `searched` what a retriever compares an item by, `searched_with` what it is given where the item is a
    training example (never the reply; empty: nothing to look by), `own` what of an item its user wrote.
    """

    name: str
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()
    asked: str = ""
    practice: tuple[str, str] | None = None
    shown_as: str = '"{text}" '
    joined: Join = field(default=before, repr=False)  # its address is another in each process
    searched: str = "{text}"
    searched_with: str = "{text}"
    own: str = "{text}"
    between: str = ", and "

    def example(self, item: Item) -> Dialogue:
        """A history item as a training example."""
        prompt, reply = self.practice or (self.asked, "{target}")
        return Dialogue(item.id, _fill(prompt, item), _fill(reply, item), item.time)

    def ask(self, item: Item) -> Query:
        """A held-out item as a query."""
        return Query(item.id, _fill(self.asked, item), item.target, item.text, time=item.time)

    def question(self, query: Query) -> Dialogue:
        """The prompt and the right reply."""
        return Dialogue(query.id, query.input, query.target, query.time)

    def shown(self, item: Item) -> str:
        """The item as it stands in a prompt."""
        return _fill(self.shown_as, item)

    def with_items(self, prompt: str, shown: Sequence[str]) -> str:
        """The prompt with retrieved items; without any, the prompt itself."""
        return self.joined(self.between.join(shown), prompt) if shown else prompt

    def search(self, item: Item) -> str:
        """What a retriever is given where the item is a training example."""
        return _fill(self.searched_with, item)

    def written(self, item: Item) -> str:
        """The user's own words, without the task's."""
        return _fill(self.own, item)

    def document(self, item: Item) -> str:
        """What a retriever compares the item by."""
        return _fill(self.searched, item)


def _fill(template: str, item: Item) -> str:
    return template.format(text=item.text, target=item.target, title=item.title)
