"""What the model says of people's later replies with one adapter or another on, asked of the devices (a `Job`).

Of each person some held-out replies: each beside other people's replies to prompts like its own, token by token, and
under the adapter of everybody else; and neutral text under the person's own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import bm25s
import numpy as np

from florilegium.client.dialogue import Dialogue
from florilegium.client.personalization.retrieve import best_first
from florilegium.client.words import words
from florilegium.simulation.devices.simulated import SimulatedDevices
from florilegium.simulation.evaluation.arms import Arms
from florilegium.simulation.evaluation.metrics import Arm
from florilegium.simulation.evaluation.person.neutral import NEUTRAL

logging.getLogger("bm25s").setLevel(logging.WARNING)  # else it tells of each index
T = TypeVar("T")
MOST = 10  # replies of which one is the person's
JUDGED = ("base", "personal", "shuffled")  # arms; the others cost as much and say little more


@dataclass(frozen=True)
class Questions:
    """Under which arms, and for each of the arms' devices and queries the candidates: the person's own comes first."""

    arms: Arms
    candidates: Mapping[str, Sequence[Sequence[Dialogue]]]


@dataclass(frozen=True)
class Evidence:
    """What was found of one person."""

    choices: Mapping[str, list[list[float]]]  # by arm, by query: nats a token of each candidate
    ids: list[list[int]]  # the tokens of the person's own replies
    tokens: Mapping[str, list[list[float]]]  # by arm, by query: NLL of each of them
    by_adapter: list[float]  # of all of them, nats a token, under the adapter of each person
    neutral: Mapping[str, float]  # by arm, nats a token


def like_replies(held_out: Sequence[Sequence[Dialogue]], queries: int) -> list[list[list[Dialogue]]]:
    """Of each person and query the own dialogue and, under its prompt, the replies of others to the likest prompts.

    At most `MOST` in all. Likeness is BM25's over the words of prompts; nobody's reply that reads as the own one does.
    """
    every = [(k, d) for k, own in enumerate(held_out) for d in own]
    index = bm25s.BM25()
    index.index([words(d.prompt) or [""] for _, d in every], show_progress=False)
    return [[_candidates(k, d, every, index) for d in own[:queries]] for k, own in enumerate(held_out)]


def _candidates(
    person: int, asked: Dialogue, every: Sequence[tuple[int, Dialogue]], index: bm25s.BM25
) -> list[Dialogue]:
    known = [w for w in words(asked.prompt) if w in index.vocab_dict]
    order = best_first(index.get_scores(known) if known else np.zeros(len(every)))
    found = {asked.response.strip(): asked}
    for owner, other in (every[i] for i in order):
        if owner != person and len(found) < MOST:
            found.setdefault(other.response.strip(), Dialogue(other.id, asked.prompt, other.response))
    return list(found.values())


def judged(devices: SimulatedDevices, names: Sequence[str], asked: Questions) -> dict[str, Evidence]:
    """The evidence of each of these people."""
    lm, format = devices.context.lm, devices.context.lm.format
    arms, given = asked.arms.of(names, devices), [asked.candidates[name] for name in names]
    everybody = asked.arms.of(asked.arms.names, devices)["personal"]
    own = [[candidates[0] for candidates in of_person] for of_person in given]
    examples = [format.dialogues(replies) for replies in own]
    choices = {arm: _choices(devices, given, on) for arm, on in arms.items()}
    tokens = {arm: _apart(lm.engine.token_losses(*_flat(examples), on), own) for arm, on in arms.items()}
    neutral = {arm: _neutral(devices, len(names), on) for arm, on in arms.items()}
    matrix = _matrix(devices, own, everybody, len(asked.arms.names))
    return {
        name: Evidence(
            {arm: choices[arm][k] for arm in arms},
            [list(e.reply[-e.targets :]) for e in examples[k]],
            {arm: tokens[arm][k] for arm in arms},
            matrix[k],
            {arm: neutral[arm][k] for arm in arms},
        )
        for k, name in enumerate(names)
    }


def _choices(
    devices: SimulatedDevices, given: Sequence[Sequence[Sequence[Dialogue]]], on: Arm
) -> list[list[list[float]]]:
    """By person and query, nats a token of each candidate."""
    lm = devices.context.lm
    asked = [(k, d) for k, of_person in enumerate(given) for candidates in of_person for d in candidates]
    scores = iter(lm.score(lm.format.dialogues([d for _, d in asked]), [k for k, _ in asked], on))
    return [[[(s := next(scores)).nll / s.tokens for _ in candidates] for candidates in of] for of in given]


def _matrix(devices: SimulatedDevices, own: Sequence[Sequence[Dialogue]], on: Arm, people: int) -> list[list[float]]:
    """Of each person's replies the nats a token under each of so many people's adapters."""
    lm = devices.context.lm
    examples = lm.format.dialogues([d for replies in own for d in replies])
    scores = iter(lm.score(examples * people, [a for a in range(people) for _ in examples], on))
    found: list[list[float]] = [[] for _ in own]
    for _ in range(people):
        for k, replies in enumerate(own):
            some = [next(scores) for _ in replies]
            found[k].append(sum(s.nll for s in some) / sum(s.tokens for s in some))
    return found


def _neutral(devices: SimulatedDevices, people: int, on: Arm) -> list[float]:
    lm = devices.context.lm
    examples = lm.format.dialogues(NEUTRAL)
    rows = people if on else 1  # the base says the same to everybody
    scores = lm.score(examples * rows, [k for k in range(rows) for _ in examples], on)
    size, tokens = len(examples), sum(e.targets for e in examples)
    found = [sum(s.nll for s in scores[k * size : (k + 1) * size]) / tokens for k in range(rows)]
    return found * (people // rows)


def _flat(of_people: Sequence[Sequence[T]]) -> tuple[list[T], list[int]]:
    return [x for some in of_people for x in some], [k for k, some in enumerate(of_people) for _ in some]


def _apart(found: Sequence[T], like: Sequence[Sequence[object]]) -> list[list[T]]:
    each = iter(found)
    return [[next(each) for _ in some] for some in like]
