"""Who shares secrets with whom in a round, and how many of them it takes: public values, the same on every device.

Up to `COMPLETE` devices everybody does with everybody (Bonawitz et al. 2017, CCS). Above, each has k neighbours on a
ring in an order that a hash of the names gives (Harary's graph; Bell et al. 2020, CCS, Sec. 3): what a device computes
and sends grows with k, about the logarithm of the devices. The order follows from who takes part, so a server that
chooses that could try for an order it likes: above `COMPLETE` devices the server is honest but curious.

Of h who hold parts of a secret, c of them in league with the server, ⌊(h + c) / 2⌋ + 1 are needed: an honest one gives
the part of one of two secrets and never of both, so that two sets of parts cannot both be had, nor can two lists of
survivors both be confirmed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256

import numpy as np
from scipy.stats import hypergeom

from florilegium.privacy.common.errors import FlorilegiumError

LEAST, COMPLETE = 3, 128  # devices of a round at all; up to which all are neighbours
FAILURE = 2.0**-40  # chance that a neighbourhood is not what is counted on


REFUSALS = (  # why a device takes no part in a round, or a server has no sum: all follow from what was sent
    "bad-parts", "bad-shares", "not-confirmed", "not-its-round", "not-registered", "out-of-order", "too-few",
    "told-two-stories", "twice-the-same",
)  # fmt: skip


class RoundRefusedError(FlorilegiumError):
    """A round that a device takes no part in, or that comes to no sum; one of `REFUSALS`."""


@dataclass(frozen=True)
class Neighbourhood:
    """Of one device: who holds parts of its secrets, itself too, at which places, and how many are needed."""

    holders: tuple[str, ...]  # sorted
    threshold: int

    def place(self, name: str) -> int:
        """From 1."""
        return self.holders.index(name) + 1


@dataclass(frozen=True)
class SumLimits:
    """Of how many devices a sum may be, and what of them is counted on: on a device its owner's, whatever it is told.

    `survivors` are the fewest that a sum is unmasked of; `colluding` may tell the server what they know.
    """

    devices: int
    survivors: int
    colluding: int = 0

    @property
    def complete(self) -> bool:
        """Whether everybody is everybody's neighbour: no server decides that."""
        return self.devices <= COMPLETE


@lru_cache(maxsize=8)
def neighbourhoods(names: tuple[str, ...], limits: SumLimits) -> dict[str, Neighbourhood]:
    """Of each of these devices (sorted names). Raises `RoundRefusedError` where nobody is safe, or nobody reached."""
    count, survivors, colluding = len(names), limits.survivors, limits.colluding
    if count > limits.devices or list(names) != sorted(set(names)):
        raise RoundRefusedError("not-its-round")
    if not colluding + LEAST <= survivors <= count:
        raise RoundRefusedError("too-few")
    degree, against = (count - 1, colluding) if limits.complete else reach(count, survivors, colluding)
    threshold = (degree + 1 + against) // 2 + 1
    if threshold > degree + 1 or (degree + 1 == count and threshold > survivors):
        raise RoundRefusedError("too-few")
    if degree + 1 == count:
        return dict.fromkeys(names, Neighbourhood(names, threshold))
    told = list_hash(names)
    ring = sorted(names, key=lambda name: sha256(f"{told} {name}".encode()).digest())
    half = degree // 2
    around = {name: [ring[(i + d) % count] for d in range(-half, half + 1)] for i, name in enumerate(ring)}
    return {name: Neighbourhood(tuple(sorted(around[name])), threshold) for name in names}


def holders(limits: SumLimits) -> int:
    """How many have parts of a device's secrets in a round of as many devices as may be, itself among them."""
    if limits.complete:
        return limits.devices
    return reach(limits.devices, limits.survivors, limits.colluding)[0] + 1


@lru_cache(maxsize=64)
def reach(count: int, survivors: int, colluding: int) -> tuple[int, int]:
    """How many neighbours each device has, and how many of a neighbourhood to take as in league with the server.

    The fewest for which, but for a chance of `FAILURE`, no neighbourhood has more of those, each keeps the parts it
    needs, and honest survivors hang together: no k / 2 on end of the ring are lost (Bell et al., Lemma 3.7).
    """
    each, lost = FAILURE / (3 * count), count - survivors
    for degree in range(2, count - 1, 2):
        against = most_of(count, colluding, degree + 1, each)
        gone = most_of(count, lost, degree + 1, each)
        threshold = (degree + 1 + against) // 2 + 1
        cut = ((lost + colluding) / count) ** (degree // 2)
        if threshold <= degree + 1 - gone and cut <= each and degree >= LEAST:
            return degree, against
    return count - 1, colluding


def most_of(count: int, marked: int, drawn: int, chance: float) -> int:
    """The least m such that of so many drawn without return more than m are marked with at most this chance."""
    each = hypergeom(count, marked, drawn).pmf(np.arange(drawn + 1))
    beyond = np.cumsum(each[::-1])[::-1]  # (drawn + 1,): P(X ≥ m)
    return int(np.argmax(np.append(beyond[1:], 0.0) <= chance))


@lru_cache(maxsize=64)
def list_hash(names: tuple[str, ...]) -> str:
    """Of a list of devices."""
    return sha256(json.dumps(names).encode()).hexdigest()


def names_of(devices: Sequence[str]) -> tuple[str, ...]:
    """Sorted, as all of this wants them."""
    return tuple(sorted(devices))
