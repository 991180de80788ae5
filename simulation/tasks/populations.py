"""Whose texts the stand-ins are made of: real users' in their order of time, or cards that are dealt to users.

A card is a `Dialogue` whose prompt is the text of an item and whose response is its target. Splitting in time,
halves and draws are those of `simulation.data.population`; nothing depends on the order of a file's lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from hashlib import sha256

import numpy as np

from florilegium.client.dialogue import Dialogue
from florilegium.privacy.seeds import derive_seed
from florilegium.simulation.data.conversations import READERS, locate
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.folder import json_lines
from florilegium.simulation.data.population import DataConfig, Replies, User, collect, draw, half_of, streams
from florilegium.simulation.tasks.slots import read_slots

People = Mapping[str, tuple[Dialogue, ...]]
MAX_WORDS = 64  # of a talk, a dialogue or an answer that is to be named or titled: a small model's context
LONG_WORDS = 40, 128  # of a text that is to be written at length: left out below, cut above
TASTE = 0.3  # shape of the Gamma that a dealt user's liking of each group is drawn from: below 1, a few are liked much

# Kin of which there are few talks are joined; the two topics that name two (music and movies) are left out.
TOPICS = {
    "music": "music",
    "movies": "movies",
    "nfl_football": "football",
    "disney": "disney",
    "star_wars": "star wars",
    "thriller": "thriller or horror",
    "horror": "thriller or horror",
    "beatles": "the beatles",
    "lady_gaga": "lady gaga",
    "pop": "pop",
    "rock": "rock",
    "rap_hiphop": "hip hop",
    "action": "action or superheroes",
    "superhero": "action or superheroes",
    "fast_furious": "action or superheroes",
    "comedy": "comedy",
    "harry_potter": "harry potter",
    "baseball": "baseball",
    "basketball": "other sports",
    "icehockey": "other sports",
    "fashion": "fashion",
}


def conversation(card: Dialogue) -> str:
    """The conversation that a card is from: its id without the turn."""
    return card.id.rpartition(":")[0]


def replies(data: DataConfig) -> People:
    """What each user of the data set replied to what."""
    return collect(data).by_user


def talks(_: DataConfig) -> People:
    """self_dialogue: the beginning of each talk and its topic, by the worker who wrote both sides."""
    found: dict[str, list[Dialogue]] = {}
    for talk in READERS["self_dialogue"]():
        if talk.domain in TOPICS:
            text = bounded("\n".join(turn.text for turn in talk.turns))
            card = Dialogue(f"{talk.id}:0", text, TOPICS[talk.domain], talk.turns[0].time)
            found.setdefault(talk.turns[0].speaker, []).append(card)
    return {user: tuple(cards) for user, cards in found.items()}


def long_talks(_: DataConfig) -> People:
    """self_dialogue: how each talk begins and the rest of it, by the worker who wrote both sides."""
    found: dict[str, list[Dialogue]] = {}
    for talk in READERS["self_dialogue"]():
        rest = "\n".join(turn.text for turn in talk.turns[1:])
        if len(rest.split()) >= LONG_WORDS[0] and talk.turns[0].text.strip():
            card = Dialogue(
                f"{talk.id}:0", bounded(talk.turns[0].text), bounded(rest, LONG_WORDS[1]), talk.turns[0].time
            )
            found.setdefault(talk.turns[0].speaker, []).append(card)
    return {user: tuple(cards) for user, cards in found.items()}


def feelings() -> Iterator[Dialogue]:
    """empathetic: what the speaker says first and the emotion that it was to show."""
    for talk in READERS["empathetic"]():
        if talk.turns:
            yield Dialogue(f"{talk.id}:0", bounded(talk.turns[0].text), talk.domain, domain=talk.domain)


def situations() -> Iterator[Dialogue]:
    """empathetic: a dialogue and the sentence for its situation, where the dialogue does not hold that sentence."""
    for _, row in json_lines(locate("empathetic")):
        text, situation = bounded("\n".join(said for _, said in row["turns"])), row["situation"].strip()
        if text and situation and plain(situation) not in plain(text):
            yield Dialogue(f"{row['conv']}:0", text, situation, domain=row["emotion"])


def instructions() -> Iterator[Dialogue]:
    """dolly: an answer of 12 words or more and the instruction, of 30 or fewer, that it was written for."""
    for _, row in json_lines(locate("dolly")):
        answer, instruction = row["response"].strip(), row["instruction"].strip()
        if len(answer.split()) >= 12 and 0 < len(instruction.split()) <= 30:
            identity = sha256(f"{instruction}\x1f{row['context']}\x1f{answer}".encode()).hexdigest()[:16]
            yield Dialogue(f"dolly-{identity}:0", bounded(answer), instruction, domain=row["category"])


def slots() -> Iterator[Dialogue]:
    """sgd: a dialogue up to its confirmation with a question for one slot, and the slot's value."""
    for found in read_slots():
        asked = f"{found.context}\nWhich {found.slot}?"
        yield Dialogue(f"{found.dialogue}:0", asked, found.value, domain=found.service)


def people(by_user: People, data: DataConfig, seed: int, *, unique: str) -> list[User]:
    """`data.users` users drawn by the seed, none of whose texts (`unique` = "prompt" or "response") occurs twice.

    Of what a user wrote twice in the same words only the first counts: what is held out never stood in the history.
    Raises `DataError` where too few users have enough.
    """
    said = {user: once(cards, unique) for user, cards in by_user.items()}
    found = Replies(said, anonymous=False, empty=0, repeated=0)
    eligible = len(streams(found, data, seed))
    if eligible < data.users:
        raise DataError(
            f"users + pool_users = {data.users}, but {eligible} users of the {data.split} half of {data.name!r} have "
            f"{data.min_pairs} items or more; lower users, pool_users or min_history"
        )
    return list(draw(found, data, seed))


def dealt(cards: Iterable[Dialogue], data: DataConfig, seed: int) -> tuple[People, DataConfig]:
    """Synthetic users: hands of equal size from the cards of one half, each with a taste for some of their domains.

    A hand's taste is the deck's distribution over domains, each weighed by a draw of Gamma(`TASTE`). No card is in two
    hands, and a third of the cards stays in the deck, so that the last hand has a choice too. Who was in no data set
    has no half: the settings returned take all of these users. Raises `DataError` where cards are too few.
    """
    decks: dict[str, list[Dialogue]] = {}
    half = {card.id: card for card in cards if half_of(conversation(card)) == data.split}
    for identity in sorted(half, key=lambda identity: derive_seed(seed, "deck", identity)):
        decks.setdefault(half[identity].domain, []).append(half[identity])
    size = min(data.max_pairs, 2 * len(half) // (3 * data.users))
    if size < data.min_pairs:
        raise DataError(
            f"users + pool_users = {data.users}: the {data.split} half of {data.name!r} gives each {size} items, fewer "
            f"than the {data.min_pairs} of min_history and queries; lower users, pool_users or min_history"
        )
    hands = {f"dealt-{n:05d}": _hand(decks, size, derive_seed(seed, "hand", n)) for n in range(data.users)}
    return hands, data.model_copy(update={"split": "all"})


def once(cards: Iterable[Dialogue], unique: str) -> tuple[Dialogue, ...]:
    """In order of time, and else as they came, only the first of those with the same words in their `unique` field."""
    first: dict[str, Dialogue] = {}
    for card in sorted(cards, key=lambda card: card.time):
        first.setdefault(plain(getattr(card, unique)), card)
    return tuple(first.values())


def bounded(text: str, most: int = MAX_WORDS) -> str:
    """The first `most` words; line breaks count as words' ends and stay."""
    words, kept = 0, []
    for line in text.strip().splitlines():
        kept.append(" ".join(line.split()[: most - words]))
        words += len(line.split())
        if words >= most:
            break
    return "\n".join(kept)


def plain(text: str) -> str:
    """A text without case and with single spaces."""
    return " ".join(text.lower().split())


def _hand(decks: dict[str, list[Dialogue]], size: int, seed: int) -> tuple[Dialogue, ...]:
    rng = np.random.Generator(np.random.Philox(key=seed))
    domains = sorted(decks)
    liking = dict(zip(domains, rng.gamma(TASTE, size=len(domains)), strict=True))
    liking = {domain: like * len(decks[domain]) for domain, like in liking.items()}
    hand: list[Dialogue] = []
    for n in range(size):
        left = [domain for domain in domains if decks[domain]]
        weights = np.array([liking[domain] for domain in left])
        weights = weights if weights.sum() > 0 else np.ones(len(left))
        drawn = left[int(rng.choice(len(left), p=weights / weights.sum()))]
        hand.append(replace(decks[drawn].pop(), time=float(n)))
    return tuple(hand)
