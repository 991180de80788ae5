"""Does an adapter make a model its person's? By person, each measure beside what real replies come to.

`ceiling` is what the person's own later replies come to, `floor` what other people's do in their place. A measure
whose ceiling is not shown to be above its floor cannot tell these people apart, and is not reported
(`person.verdict`). Everything here is a function of texts and of `Evidence`; nothing asks the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from florilegium.client.dialogue import Dialogue
from florilegium.client.words import words
from florilegium.simulation.evaluation.metrics import interval
from florilegium.simulation.evaluation.person.evidence import JUDGED, Evidence
from florilegium.simulation.evaluation.person.style import (
    CharacterStyle,
    Likelihood,
    Matrix,
    WordStyle,
    joined,
    of_others,
    ranks,
    rights,
)

OWN = 1.5  # times as often as everybody a person uses a token that counts as their own
CHOICES = (4, 10)
LOWER_IS_BETTER = ("others-nll", "neutral-nll", "repetition")
STYLES: Mapping[str, Callable[[Sequence[str]], WordStyle | CharacterStyle]] = {
    "words": WordStyle.of, "characters": CharacterStyle.of,
}  # fmt: skip
By = Sequence[float]  # a figure of each person


@dataclass(frozen=True)
class Texts:
    """What K people have written: what their devices have met, and what is held out."""

    known: Sequence[Sequence[str]]
    later: Sequence[Sequence[str]]  # cut to the length of generated replies, as many as are generated
    generated: Mapping[str, Sequence[Sequence[str]]]  # by arm

    @property
    def replies(self) -> int:
        """A person, at least."""
        return min(map(len, self.later))


@dataclass(frozen=True)
class Measure:
    """One measure of K people under each arm."""

    name: str
    arms: Mapping[str, By]
    floor: By = ()
    ceiling: By = ()
    gate: tuple[By, By] | None = None  # what must differ, floor and ceiling, if they are in other units
    replies: int = 0  # of each person, that it is made of
    needed: int = (
        0  # real replies of each person with which it tells these people apart; 0: not looked for, or not found
    )
    about: str = ""

    @property
    def tells(self) -> bool:
        """Whether real people are told apart: 95 % interval of ceiling − floor by person; true where nothing has to."""
        floor, ceiling = self.gate or (self.floor, self.ceiling)
        return not floor or told_apart(floor, ceiling)


def told_apart(floor: By, ceiling: By) -> bool:
    return interval((np.array(ceiling) - np.array(floor)).tolist())[0] > 0


def style(texts: Texts) -> list[Measure]:
    """Area under the curve, and share right, of attributing each person's generated replies to them."""
    made, own = [], range(len(texts.known))
    for kind, of in STYLES.items():
        profiles = of([joined(t) for t in texts.known])
        later = profiles.scores([joined(t) for t in texts.later])
        found = {arm: profiles.scores([joined(t) for t in said]) for arm, said in texts.generated.items()}
        needed = replies_needed(of, texts)
        for name, measured in ((f"style-{kind}", ranks), (f"style-{kind}-right", rights)):
            arms = {arm: measured(scores, own) for arm, scores in found.items()}
            floor, ceiling = of_others(later, measured), measured(later, own)
            made.append(Measure(name, arms, floor, ceiling, None, texts.replies, needed))
    return made


def replies_needed(of: Callable[[Sequence[str]], WordStyle | CharacterStyle], texts: Texts) -> int:
    """The smallest power of two of real replies a person whose ceiling is shown to be above the floor; 0: none is.

    Tried on the last third of what was known and on what is held out, with the first two thirds known.
    """
    parts = [
        (t[: -len(t) // 3], [*t[-len(t) // 3 :], *later]) for t, later in zip(texts.known, texts.later, strict=True)
    ]
    profiles = of([joined(known) for known, _ in parts])
    count = 1
    while count <= min(len(later) for _, later in parts):
        scores = profiles.scores([joined(later[:count]) for _, later in parts])
        if told_apart(of_others(scores, ranks), ranks(scores, range(len(parts)))):
            return count
        count *= 2
    return 0


def choices(known: Sequence[Sequence[str]], candidates: Sequence[Sequence[Sequence[Dialogue]]],
            evidence: Sequence[Evidence]) -> list[Measure]:  # fmt: skip
    """The share of replies that are found among k by their NLL a token; ceiling and floor choose by the texts alone.

    The ceiling takes the candidate whose characters are likeliest for the person, the floor for the next person.
    """
    by = Likelihood.of_characters([joined(t) for t in known])
    people, made = len(known), []
    own, strangers = (
        [[[-by.score((k + shift) % people, d.response) for d in few] for few in of] for k, of in enumerate(candidates)]
        for shift in (0, 1)
    )
    for count in CHOICES:
        if min(len(few) for of in candidates for few in of) >= count:
            arms = {arm: [_right(e.choices[arm], count) for e in evidence] for arm in _judged(evidence)}
            floor, ceiling = ([_right(few, count) for few in of] for of in (strangers, own))
            made.append(Measure(f"choice-{count}", arms, floor, ceiling, None, _queries(evidence)))
    return made


def rank(evidence: Sequence[Evidence], of_style: Sequence[Measure]) -> list[Measure]:
    """Where one's own adapter stands among everybody's, by the NLL of one's replies: 1 is first, 0 last.

    `shuffled` is the place of the next person's. Floor and ceiling are those of attributing replies by characters.
    """
    losses: Matrix = -np.array([e.by_adapter for e in evidence])  # (K, K): person, adapter
    own = np.arange(len(losses))
    strangers = np.roll(own, -1)
    made = []
    for name, measured, like in (("rank", ranks, "style-characters"), ("rank-first", rights, "style-characters-right")):
        (by,) = (m for m in of_style if m.name == like)
        arms = {"personal": measured(losses, own.tolist()), "shuffled": measured(losses, strangers.tolist())}
        made.append(Measure(name, arms, by.floor, by.ceiling, None, _queries(evidence)))
    return made


def tokens(known: Sequence[Sequence[Sequence[int]]], evidence: Sequence[Evidence]) -> list[Measure]:
    """Nats gained over the base on tokens that the person uses more than others do, and on the rest of their replies.

    `known[k]` are the tokens of each of the replies that person k's device has met: they alone say which are whose.
    """
    by = Likelihood.of([(i for reply in of for i in reply) for of in known])
    people, least = range(len(known)), float(np.log(OWN))
    theirs = [{i for i in by.counts[k] if by.ratio(k, i) > least} for k in people]
    said = [[i for reply in e.ids for i in reply] for e in evidence]
    share = np.array([[np.mean([i in own for i in reply]) for reply in said] for own in theirs])  # (whose, in whose)
    ceiling = np.diag(share)
    floor = (share.sum(1) - ceiling) / (len(said) - 1)
    about = f"{ceiling.mean():.0%} of one's own later tokens, {floor.mean():.0%} of others'"
    gate = (floor.tolist(), ceiling.tolist())
    gained = {
        arm: [_gains(e, arm, own) for e, own in zip(evidence, theirs, strict=True)]
        for arm in _judged(evidence) if arm != "base"
    }  # fmt: skip
    return [
        Measure(name, {arm: [pair[i] for pair in of] for arm, of in gained.items()}, (), (), gate, _queries(evidence),
                0, about)
        for i, name in enumerate(("own-tokens", "other-tokens"))
    ]  # fmt: skip


def lost(evidence: Sequence[Evidence], texts: Texts) -> list[Measure]:
    """What a personal adapter costs: NLL of others' replies and of neutral text, repetition, fewer different words."""
    by_adapter = np.array([e.by_adapter for e in evidence])  # (K, K): person, adapter
    base = np.array([_per_token(e.tokens["base"]) for e in evidence])
    count = len(evidence)
    others = {
        "base": ((base.sum() - base) / (count - 1)).tolist(),
        "personal": ((by_adapter.sum(0) - np.diag(by_adapter)) / (count - 1)).tolist(),
    }
    neutral = {arm: [e.neutral[arm] for e in evidence] for arm in _judged(evidence)}
    made = [
        Measure("others-nll", others, replies=_queries(evidence) * (count - 1)), Measure("neutral-nll", neutral),
    ]  # fmt: skip
    for name, measured in (("repetition", _repetition), ("distinct-2", distinct_pairs)):
        arms = {arm: [measured(t) for t in said] for arm, said in texts.generated.items()}
        real = [measured(t) for t in texts.later]
        made.append(Measure(name, arms, (), real, ((), ()), texts.replies))
    return made


def _right(queries: Sequence[Sequence[float]], count: int) -> float:
    """The share of queries of which the first of so many candidates has the least loss."""
    return float(np.mean([rights(-np.array([few[:count]]), [0])[0] for few in queries]))


def _gains(evidence: Evidence, arm: str, own: Collection[Hashable]) -> tuple[float, float]:
    """Of base − arm, the mean over tokens that are the person's, and over the others; 0 where there are none."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for ids, before, after in zip(evidence.ids, evidence.tokens["base"], evidence.tokens[arm], strict=True):
        for i, b, a in zip(ids, before, after, strict=True):
            found[i in own].append(b - a)
    return tuple(float(np.mean(found[x])) if found[x] else 0.0 for x in (True, False))  # type: ignore[return-value]


def _judged(evidence: Sequence[Evidence]) -> Iterator[str]:
    return (arm for arm in JUDGED if arm in evidence[0].tokens)


def _queries(evidence: Sequence[Evidence]) -> int:
    return min(len(e.ids) for e in evidence)


def _per_token(of_replies: Sequence[Sequence[float]]) -> float:
    return float(np.concatenate(of_replies).mean())


def _pairs(text: str) -> list[tuple[str, str]]:
    return list(pairwise(words(text)))


def _repetition(replies: Sequence[str]) -> float:
    """The share of pairs of words that stood in the same reply before; the mean over replies of two words or more.

    >>> _repetition(["no no no no", "yes or no"])
    0.3333333333333333
    """
    shares = [1 - len(set(pairs)) / len(pairs) for reply in replies if (pairs := _pairs(reply))]
    return float(np.mean(shares)) if shares else 0.0


def distinct_pairs(replies: Sequence[str]) -> float:
    """Different pairs of words by all pairs of a person's replies (Li et al. 2016, arXiv 1510.03055).

    >>> distinct_pairs(["a b c", "a b d"])
    0.75
    """
    pairs = [pair for reply in replies for pair in _pairs(reply)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
