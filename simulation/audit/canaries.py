"""Dialogues of which a fair coin decides whether their device meets them: what attacks must find out.

In either case another dialogue stands in that place of the stream if this one does not: the neighbours of the
accounting ("replace one"). Whoever attacks knows the model, the dialogues, all settings and everything that was
released; the coins and the devices' secrets are what is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from florilegium.client.dialogue import Dialogue
from florilegium.client.words import bare
from florilegium.privacy.seeds import derive_seed
from florilegium.simulation.settings import ConfigError

PROMPT_WORDS, REPLY_WORDS = 12, 1  # of a canary: a short reply that nobody expects pulls hard
Streams = Sequence[Sequence[Dialogue]]


@dataclass(frozen=True)
class Canary:
    """A dialogue that may have been met by one device."""

    device: int
    dialogue: Dialogue
    member: bool


def plant(streams: Streams, count: int, seed: int) -> tuple[list[list[Dialogue]], list[Canary]]:
    """Puts at least `count` dialogues of random words up for places, as many in each stream for its length.

    A coin decides of each whether it takes its place. Raises `ConfigError` where there are fewer places.
    """
    rng = np.random.Generator(np.random.Philox(key=derive_seed(seed, "canaries")))
    words = sorted({w for stream in streams for d in stream for w in bare(d.prompt)})
    room = sum(map(len, streams))
    if count > room:
        raise ConfigError(f"{room} dialogues have no place for {count} canaries; ask for fewer, or take more devices")
    planted, canaries = [list(stream) for stream in streams], []
    for device, stream in enumerate(planted):
        for place in rng.choice(len(stream), size=-(-count * len(stream) // room), replace=False):
            prompt, reply = (" ".join(rng.choice(words, size=n)) for n in (PROMPT_WORDS, REPLY_WORDS))
            canary = Canary(device, Dialogue(stream[place].id, prompt, reply), bool(rng.random() < 0.5))
            canaries.append(canary)
            if canary.member:
                stream[place] = canary.dialogue
    return planted, canaries


def hide(streams: Streams, share: float, seed: int) -> tuple[list[list[Dialogue]], list[Canary]]:
    """Of this share of each stream, in random pairs, one dialogue is met and the other hidden, as a coin says."""
    rng = np.random.Generator(np.random.Philox(key=derive_seed(seed, "hidden")))
    left, canaries = [], []
    for device, stream in enumerate(streams):
        pairs = rng.permutation(len(stream))[: 2 * int(share * len(stream) / 2)].reshape(-1, 2)
        met, gone = list(stream), set[int]()
        for one, two in pairs.tolist():
            shown, hidden = (one, two) if rng.random() < 0.5 else (two, one)
            met[one], gone = stream[shown], gone | {two}
            canaries += [Canary(device, stream[shown], True), Canary(device, stream[hidden], False)]
        left.append([d for place, d in enumerate(met) if place not in gone])
    return left, canaries
