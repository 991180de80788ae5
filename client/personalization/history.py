"""A person's history as methods of personalisation see it, and how a prompt is put together from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from florilegium.client.dialogue import Dialogue


@dataclass(frozen=True, slots=True)
class Asked:
    """Something that the model is asked."""

    prompt: str
    search: str  # what a retriever is given; empty where a question has nothing to look by
    options: tuple[str, ...] = ()  # texts that the labels of a choice stand for
    labels: tuple[str, ...] = ()  # what is said of each option, such as [1], [2], …


@dataclass(frozen=True, slots=True)
class Past:
    """One thing in a history: what it is to a retriever, in a prompt, and as an example to learn from."""

    document: str  # in which a retriever looks
    shown: str  # as it is written into a prompt
    example: Dialogue
    search: str  # what a retriever would have been given, had this been the question

    @property
    def asked(self) -> Asked:
        return Asked(self.example.prompt, self.search)


History = Sequence[Past]  # oldest first


@dataclass(frozen=True, slots=True)
class Person:
    """A history, and later questions with the replies that are right.

    Where one person is asked at several moments, each is one of these, and `person` is whose it is.
    """

    id: str
    history: tuple[Past, ...]
    questions: tuple[tuple[Asked, Dialogue], ...] = ()
    person: str = ""

    @property
    def owner(self) -> str:
        """The same for all moments of one person."""
        return self.person or self.id


WithItems = Callable[[str, Sequence[str]], str]  # (prompt, items as they are shown) → prompt with them


def in_front(prompt: str, shown: Sequence[str]) -> str:
    """The items before the prompt, one a line."""
    return "\n".join([*shown, prompt])


@dataclass(frozen=True, slots=True)
class Wording:
    """How a task puts items, and what a model has said of a person, into a prompt."""

    with_items: WithItems = in_front
    of_profile: str = "The user: {profile}"

    def prompt(self, asked: Asked, shown: Sequence[str] = (), profile: str = "") -> str:
        """Profile, then items, then the question (OPPU's order)."""
        text = self.with_items(asked.prompt, shown) if shown else asked.prompt
        return f"{self.of_profile.format(profile=profile)}\n{text}" if profile else text
