"""Slot values of task dialogues (sgd), recovered from the turns in which the system confirms what it understood.

The files have dialogues and services but no annotation. A system turn that asks for confirmation ("Please confirm:
a table for 2 people at Sino, today at 11:30 am") repeats the values. A pattern of `SERVICES` must match it
exactly once, and the value must have been said in the turns before (after `normal`), so that the question can be
answered from them. What was never said aloud, a default such as 2 people, or was said in other words ("half past 11")
is left out.
docs/tasks.md has how often patterns match and how often they were right.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from florilegium.privacy.seeds import derive_seed
from florilegium.simulation.data.conversations import locate
from florilegium.simulation.data.folder import Row, json_lines
from florilegium.simulation.tasks.metrics import normal

CONTEXT_TURNS = 8
CONFIRMS = re.compile(r"\b(confirm\w*|verify|correct|is (?:that|this) right|sound right)\b", re.IGNORECASE)
DONE = re.compile(r"\b(?:is|are|been|have|has)(?: now| successfully)? confirmed\b", re.IGNORECASE)
NAME = r"([A-Z][\w.']*(?: [A-Z][\w.']*)*)"
TIME = r"\b(\d{1,2}(?::\d\d)? ?[ap]\.?m)\b"
DATE = r"\b(today|the day after tomorrow|(?<!after )tomorrow|next \w+day|March \d+(?:st|nd|rd|th))\b"


@dataclass(frozen=True)
class Service:
    """What a confirmation of this service says, and what is to be found in it."""

    cue: str
    slots: dict[str, str]


SERVICES = {
    "Restaurants": Service(
        r"table|reserv|booking|dining",
        {
            "time": TIME,
            "date": DATE,
            "number of people": r"\b(\d+) (?:people|persons?|peoples)\b",
            "city": rf"\bin {NAME}",
        },
    ),
    "Buses": Service(
        r"\bbus\b",
        {
            "time": TIME,
            "date": DATE,
            "number of people": r"\b(\d+) (?:people|persons?|passengers?)\b",
            "city to leave from": rf"\bfrom {NAME}",
            "city to go to": rf"\bto {NAME}",
        },
    ),
    "Banks": Service(
        r"transfer|send|pay",
        {
            "amount": r"\$(\d[\d,]*(?:\.\d\d)?)",
            "account to pay from": r"\bfrom (?:your|my|the)? ?(checking|savings?)\b",
            "recipient": r"\bto ([A-Z][a-z]+)(?:'s)?\b",
        },
    ),
    "RideSharing": Service(
        r"\b(?:cab|ride|taxi|car|vehicle)\b",
        {
            "number of people": r"\b(\d+) (?:people|persons?|passengers?|seats?)\b",
            "kind of ride": r"\b(shared|pool|luxury|regular)\b",
        },
    ),
    "Events": Service(
        r"ticket|event|concert|game",
        {"date": DATE, "number of tickets": r"\b(\d+) tickets?\b", "city": rf"\bin {NAME}"},
    ),
    "Services": Service(r"appointment|book", {"time": TIME, "date": DATE}),
    "Hotels": Service(
        r"hotel|room|reserv|booking|stay",
        {
            "number of rooms": r"\b(\d+) rooms?\b",
            "number of days": r"\b(\d+) (?:days?|nights?)\b",
            "city": rf"\bin {NAME}",
        },
    ),
    "Music": Service(r"\b(?:play|song)\b", {"place to play it": r"\b(kitchen|bedroom|living room|patio|tv)\b"}),
}


@dataclass(frozen=True)
class Found:
    """A slot of a dialogue: which, its value as confirmed, and what was said before the confirmation."""

    dialogue: str
    service: str
    slot: str
    value: str
    confirmation: str
    context: str


def read_slots() -> Iterator[Found]:
    """One slot of each sgd dialogue that has any: which one depends on the dialogue alone."""
    for _, row in json_lines(locate("sgd")):
        found = [slot for slot in matches(row) if said_before(slot)]
        if found:
            yield min(found, key=lambda slot: derive_seed(0, slot.dialogue, slot.slot))


def matches(row: Row) -> list[Found]:
    """The slots of the first turn of a dialogue that asks for confirmation, for a service that the dialogue has."""
    names = {service.partition("_")[0] for service in row["services"]}
    for i, (who, text) in enumerate(row["turns"]):
        if who == "U" or not CONFIRMS.search(text) or DONE.search(text):
            continue
        context = "\n".join(said for _, said in row["turns"][max(0, i - CONTEXT_TURNS) : i])
        for name in sorted(names & set(SERVICES)):
            if re.search(SERVICES[name].cue, text, re.IGNORECASE):
                values = _values(SERVICES[name], text)
                return [Found(row["id"], name, slot, value, text, context) for slot, value in values.items()]
    return []


def said_before(found: Found) -> bool:
    """Whether the value stands, word by word, in what was said before."""
    return f" {normal(found.value)} " in f" {normal(found.context)} "


def _values(service: Service, text: str) -> dict[str, str]:
    """The slots whose pattern matches exactly once; only names of places and people are read with their case."""
    values = {}
    for slot, pattern in service.slots.items():
        found = re.findall(pattern, text, 0 if "[A-Z]" in pattern else re.IGNORECASE)
        if len(found) == 1:
            values[slot] = found[0].strip(" .")
    return values


def _audit(looked_at: int = 50) -> None:
    """How often patterns match and the value was said before; and some found values, drawn at random, to be read."""
    rows, kept = [row for _, row in json_lines(locate("sgd"))], list(read_slots())
    by_dialogue = [found for row in rows if (found := matches(row))]
    matched = Counter((slot.service, slot.slot) for found in by_dialogue for slot in found)
    said = Counter((slot.service, slot.slot) for found in by_dialogue for slot in found if said_before(slot))
    print(f"{len(rows)} dialogues; in {len(by_dialogue)} a confirmation gives a slot; one is kept of {len(kept)}")
    for (service, slot), count in sorted(matched.items()):
        print(f"| {service} | {slot} | {count} | {said[service, slot]} |")
    for read in sorted(kept, key=lambda found: derive_seed(0, "look", found.dialogue))[:looked_at]:
        print(f"{read.dialogue}: {read.slot} = {read.value!r} <- {read.confirmation}")


if __name__ == "__main__":
    _audit()
