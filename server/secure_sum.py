"""The server's side of a round of secure aggregation: it passes messages on, and learns the sum of those who came.

Device by device it sees keys, sealed parts, and numbers behind masks (`privacy.secure_aggregation.session` has the
steps). A sum is given only when every mask in it has been taken off, which the devices' own commitments show; else
there is none. Not covered: a device that sends other numbers than it learned spoils the sum, as nobody sees them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from florilegium.privacy.secure_aggregation.keys import mask, public_key
from florilegium.privacy.secure_aggregation.neighbours import Neighbourhood, RoundRefusedError, neighbourhoods
from florilegium.privacy.secure_aggregation.session import Advert, Numbers, pair_seed, seed_hash
from florilegium.privacy.secure_aggregation.sharing import joined


class SecureSum:
    """One round. Each `take_…` is one device's answer at that step; what is late, or said twice, is left out."""

    def __init__(self, federation: str, number: int, width: int, bits: int, survivors: int, colluding: int) -> None:
        self.of, self.width, self.bits = (federation, number), width, bits
        self.survivors, self.colluding = survivors, colluding
        self.adverts: dict[str, Advert] = {}
        self.shares: dict[str, Mapping[str, bytes]] = {}  # by sender, then by neighbour: sealed
        self.came: list[str] = []  # whose masked numbers are in the sum
        self.confirmations: dict[str, bytes] = {}
        self.parts: dict[str, Mapping[str, bytes]] = {}  # by holder, then by owner
        self._total = np.zeros(width, dtype=np.uint32)
        self._around: Mapping[str, Neighbourhood] = {}

    # -- what devices say -------------------------------------------------------------------------------------------

    def take_advert(self, device: str, advert: Advert) -> None:
        """Step 1."""
        self.adverts.setdefault(device, advert)

    def close_keys(self) -> None:
        """Who is in the round. Raises `RoundRefusedError` where they are too few."""
        self._around = neighbourhoods(tuple(sorted(self.adverts)), self.survivors, self.colluding)

    @property
    def names(self) -> list[str]:
        return sorted(self.adverts)

    def adverts_for(self, device: str) -> dict[str, Advert]:
        """Of its neighbours and itself."""
        return {name: self.adverts[name] for name in self._around[device].holders}

    def take_shares(self, device: str, shares: Mapping[str, bytes]) -> None:
        """Step 2: one sealed pair of parts for each neighbour."""
        if device in self._around and set(shares) == set(self._around[device].holders) - {device}:
            self.shares.setdefault(device, dict(shares))

    def inbox(self, device: str) -> dict[str, bytes]:
        """What its neighbours have sealed for it."""
        return {name: self.shares[name][device] for name in self._around[device].holders
                if name in self.shares and name != device}  # fmt: skip

    @property
    def members(self) -> list[str]:
        """Whose parts have come."""
        return sorted(self.shares)

    def take_masked(self, device: str, numbers: Numbers) -> None:
        """Step 3."""
        if device in self.shares and device not in self.came and numbers.shape == (self.width,):
            self._total += numbers
            self.came.append(device)

    def take_confirmation(self, device: str, signature: bytes) -> None:
        """Step 4."""
        if device in self.came:
            self.confirmations.setdefault(device, signature)

    def confirmations_for(self, device: str) -> dict[str, bytes]:
        """Of its neighbourhood."""
        return {n: self.confirmations[n] for n in self._around[device].holders if n in self.confirmations}

    def take_parts(self, device: str, parts: Mapping[str, bytes]) -> None:
        """Step 5."""
        if device in self.confirmations:
            self.parts.setdefault(device, dict(parts))

    # -- what it comes to -------------------------------------------------------------------------------------------

    def check(self, people: int) -> None:
        """Raises `RoundRefusedError` where so many are fewer than the sum may be of."""
        if people < self.survivors:
            raise RoundRefusedError("too-few")

    def total(self) -> Numbers:
        """The sum (P,) modulo 2^bits of the numbers of those who came, without any mask.

        Raises `RoundRefusedError` where too few parts came, or parts that do not fit what their owners had said.
        """
        self.check(len(self.came))
        total, came = self._total.copy(), set(self.came)
        for device in self.came:
            total -= mask(self._secret(device), self.width)
        for device in set(self.shares) - came:  # their masks with those who came are still in
            key = self._secret(device)
            for other in self._around[device].holders:
                if other in came:
                    with_other = mask(pair_seed(key, self.adverts[other].masking_key, self.of), self.width)
                    total = total - with_other if other < device else total + with_other
        return total & np.uint32((1 << self.bits) - 1)

    def plain_total(self) -> Numbers:
        """The sum (P,) where nothing was masked. Raises `RoundRefusedError` where too few came."""
        self.check(len(self.came))
        return self._total & np.uint32((1 << self.bits) - 1)

    def _secret(self, device: str) -> bytes:
        """The seed of the own mask of one who came, or the masking key of one who did not."""
        around = self._around[device]
        there = {around.place(holder): parts[device] for holder, parts in self.parts.items()
                 if holder in around.holders and device in parts}  # fmt: skip
        needed = dict(list(sorted(there.items()))[: around.threshold])
        if len(needed) < around.threshold:
            raise RoundRefusedError("too-few")
        try:
            secret = joined(needed)
        except ValueError:
            raise RoundRefusedError("bad-parts") from None
        advert = self.adverts[device]
        fits = seed_hash(secret) == advert.own_mask_hash if device in self.came else (
            public_key(secret) == advert.masking_key
        )  # fmt: skip
        if not fits:
            raise RoundRefusedError("bad-parts")
        return secret
