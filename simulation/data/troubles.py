"""Troubles of real streams, put into clean ones: what a selection policy is there for.

A share of a stream's dialogues is replaced; the rest, all times and the number stay what they were. What is replaced,
and by what, depends on the stream, the others' streams and the seed alone. Held-out replies are never touched: a
person is tested on their own later words. Every trouble shows in prompts, since a policy reads nothing else, but for
`other-people` and `drift`, where prompt and reply are those that somebody else had. Not covered: attacks on a model
(`simulation.audit`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from florilegium.client.dialogue import Dialogue
from florilegium.client.selection.lexicons import load_lexicons, words
from florilegium.privacy.common.base_config import Config
from florilegium.simulation.data.errors import DataError

Kind = Literal[
    "none", "near-duplicates", "greetings", "boilerplate", "other-people", "topic-burst", "drift", "junk"
]  # fmt: skip
Pair = tuple[str, str]  # a prompt and its reply
Streams = Sequence[Sequence[Dialogue]]  # of other people

SOURCES = 8  # near-duplicates are of one in so many of the dialogues that are left
LONG = 5  # letters of a word that can be a topic
JUNK_WORDS = (16, 10)  # of a prompt and of a reply
GREETINGS = ("hi", "hey", "hello", "hi there", "hey you", "good morning", "hello again", "sup", "yo", "good evening")
ONE_WORD = ("ok", "yes", "no", "hi", "lol", "sure", "thanks", "k", "nice", "hello", "yep", "cool")
PASTED = (
    "This message and its attachments are meant for the addressee only. If you have received it in error, delete it.",
    "Dear customer, your order has been shipped and will arrive within three to five working days. Do not reply.",
    "Please find below the minutes of our last meeting. Comments are welcome until Friday at noon.",
    "By continuing to use this service you agree to our terms and to our notice on privacy and cookies.",
    "Join the call from a computer or a phone. The meeting code and the numbers to dial are listed below.",
    "You receive this newsletter because you are subscribed. Follow the link at the bottom to unsubscribe.",
)


class TroublesConfig(Config):
    """What is wrong with a stream, and with how much of it."""

    kind: Kind = Field(
        "none",
        description="near-duplicates, greetings, boilerplate, other-people, junk: scattered; topic-burst: one run of "
        "others' dialogues about one thing; drift: what comes first is another person's",
    )
    share: float = Field(0.0, ge=0, lt=1, description="of each stream, which is replaced")

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.kind == "none") != (self.share == 0):
            raise ValueError(f"kind = {self.kind!r} with share = {self.share:g}: set both or neither")
        return self


def troubled(
    stream: Sequence[Dialogue], others: Streams, config: TroublesConfig, rng: np.random.Generator
) -> tuple[Dialogue, ...]:
    """The stream with round(share · length) of its dialogues replaced, but not all; `others` are streams of others.

    Raises `DataError` where others' words are asked for and there are too few.
    """
    count = min(round(config.share * len(stream)), len(stream) - 1)
    if config.kind == "none" or count < 1:
        return tuple(stream)
    places = _places(config.kind, len(stream), count, rng)
    left = [d for i, d in enumerate(stream) if i not in places]
    said = _MADE[config.kind](left, others, count, rng)
    put = dict(zip(sorted(places), said, strict=True))
    return tuple(_replaced(d, put[i], config.kind) if i in put else d for i, d in enumerate(stream))


def _replaced(dialogue: Dialogue, pair: Pair, kind: str) -> Dialogue:
    return replace(dialogue, id=f"{dialogue.id}~{kind}", prompt=pair[0], response=pair[1], domain="", context="")


def _places(kind: Kind, length: int, count: int, rng: np.random.Generator) -> set[int]:
    if kind == "drift":
        return set(range(count))
    if kind == "topic-burst":
        begin = int(rng.integers(length - count + 1))
        return set(range(begin, begin + count))
    return set(rng.choice(length, count, replace=False).tolist())


def _near_duplicates(left: Sequence[Dialogue], others: Streams, count: int, rng: np.random.Generator) -> list[Pair]:
    sources = rng.choice(len(left), max(1, len(left) // SOURCES), replace=False)
    drawn = [left[i] for i in rng.choice(sources, count)]
    return [(edited(d.prompt, rng), edited(d.response, rng)) for d in drawn]


def edited(text: str, rng: np.random.Generator) -> str:
    """The text without one of its words, or of a single word with a sign behind it."""
    parts = text.split()
    if len(parts) < 2:
        return text + str(rng.choice(["!", "?", "...", " :)"]))
    del parts[int(rng.integers(len(parts)))]
    return " ".join(parts)


def _greetings(left: Sequence[Dialogue], others: Streams, count: int, rng: np.random.Generator) -> list[Pair]:
    return [(str(rng.choice(GREETINGS)), str(rng.choice(ONE_WORD))) for _ in range(count)]


def _boilerplate(left: Sequence[Dialogue], others: Streams, count: int, rng: np.random.Generator) -> list[Pair]:
    return [(str(rng.choice(PASTED)), str(rng.choice(PASTED))) for _ in range(count)]


def _other_people(left: Sequence[Dialogue], others: Streams, count: int, rng: np.random.Generator) -> list[Pair]:
    return _drawn([(d.prompt, d.response) for said in others for d in said], count, rng)


def _topic_burst(left: Sequence[Dialogue], others: Streams, count: int, rng: np.random.Generator) -> list[Pair]:
    """Of others' dialogues, some of those whose prompts share a word that is not everybody's.

    Of the words that enough prompts have, the topic is one of the rarer half.
    """
    said = [(d.prompt, d.response) for stream in others for d in stream]
    having = [{w for w in words(prompt) if len(w) >= LONG} for prompt, _ in said]
    frequent = Counter(w for found in having for w in sorted(found))
    enough = sorted((n, w) for w, n in frequent.items() if n >= count)
    if not enough:
        raise DataError(f"topic-burst of {count} dialogues: no word is in so many prompts of others; lower share")
    topic = enough[int(rng.integers((len(enough) + 1) // 2))][1]
    return _drawn([pair for pair, found in zip(said, having, strict=True) if topic in found], count, rng)


def _drift(left: Sequence[Dialogue], others: Streams, count: int, rng: np.random.Generator) -> list[Pair]:
    """What another person said first; of several, one behind the other, where one has not said enough."""
    order = rng.permutation(len(others))
    said = [(d.prompt, d.response) for i in order for d in others[i]]
    if len(said) < count:
        raise DataError(_too_few(len(said), count))
    return said[:count]


def _junk(left: Sequence[Dialogue], others: Streams, count: int, rng: np.random.Generator) -> list[Pair]:
    """Words of the general word list in no order: each text scores high in all three of the paper's scores."""
    listed = sorted(set().union(*load_lexicons(("general",)).values()))
    made = [[" ".join(rng.choice(listed, length).tolist()) for length in JUNK_WORDS] for _ in range(count)]
    return [(prompt, reply) for prompt, reply in made]


def _drawn(said: Sequence[Pair], count: int, rng: np.random.Generator) -> list[Pair]:
    if len(said) < count:
        raise DataError(_too_few(len(said), count))
    return [said[i] for i in rng.choice(len(said), count, replace=False)]


def _too_few(there: int, count: int) -> str:
    return f"data.troubles wants {count} dialogues of other people, and there are {there}; lower share or add users"


_MADE: Mapping[str, Callable[[Sequence[Dialogue], Streams, int, np.random.Generator], list[Pair]]] = {
    "near-duplicates": _near_duplicates,
    "greetings": _greetings,
    "boilerplate": _boilerplate,
    "other-people": _other_people,
    "topic-burst": _topic_burst,
    "drift": _drift,
    "junk": _junk,
}
