"""The server's side of a round of secure aggregation: it passes messages on, and learns the sum of those who came.

Device by device it sees keys, sealed parts, and numbers behind masks (`privacy.secure_aggregation.session` has the
steps). A sum is given only when every mask in it has been taken off, which the devices' own commitments show; else
there is none. Not covered: a device that sends other numbers than it learned spoils the sum, as nobody sees them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import numpy as np

from florilegium.privacy.secure_aggregation.adverts import Advert, is_registered, pair_seed, scope, seed_hash
from florilegium.privacy.secure_aggregation.keys import Told, is_signed, mask, public_key
from florilegium.privacy.secure_aggregation.neighbours import (
    Neighbourhood,
    RoundRefusedError,
    SumLimits,
    list_hash,
    names_of,
    neighbourhoods,
)
from florilegium.privacy.secure_aggregation.session import Numbers
from florilegium.privacy.secure_aggregation.sharing import joined


class SecureSum:
    """One round. Each `take_…` is one device's answer at that step; what is late, false, or said twice, is left out."""

    def __init__(self, of: tuple[str, int], width: int, bits: int, limits: SumLimits, registrar: bytes) -> None:
        """`of` is the federation and the round; `registrar` says which devices there are."""
        self.of, self.width, self.bits, self.limits, self.registrar = of, width, bits, limits, registrar
        self.adverts: dict[str, Advert] = {}
        self.shares: dict[str, Mapping[str, bytes]] = {}  # by sender, then by neighbour: sealed
        self.came: list[str] = []  # whose masked numbers are in the sum
        self.confirmations: dict[str, bytes] = {}
        self.parts: dict[str, Mapping[str, bytes]] = {}  # by holder, then by owner
        self._total = np.zeros(width, dtype=np.uint32)
        self._around: Mapping[str, Neighbourhood] = {}
        self._scope: Told = ()

    # -- what devices say -------------------------------------------------------------------------------------------

    def take_advert(self, device: str, advert: Advert) -> None:
        """Step 1. Raises ValueError for one that other devices would refuse."""
        if not is_registered(self.of, self.registrar, device, advert):
            raise ValueError("not registered")
        self.adverts.setdefault(device, advert)

    def close_keys(self) -> None:
        """Who is in the round. Raises `RoundRefusedError` where they are too few."""
        names = names_of(list(self.adverts))
        self._around = neighbourhoods(names, self.limits)
        self._scope = scope(self.of, names, self.adverts, self.limits)

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
        """Step 4. Raises ValueError for a signature that is none."""
        if device not in self.came:
            return
        told = [*self._scope, list_hash(names_of(self.members)), list_hash(names_of(self.came))]
        if not is_signed(self.adverts[device].identity, signature, "survivors", told):
            raise ValueError("not signed")
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
        if people < self.limits.survivors:
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
                    with_other = mask(pair_seed(key, (device, other), self.adverts, self._scope), self.width)
                    total = total - with_other if other < device else total + with_other
        return total & np.uint32((1 << self.bits) - 1)

    def plain_total(self) -> Numbers:
        """The sum (P,) where nothing was masked. Raises `RoundRefusedError` where too few came."""
        self.check(len(self.came))
        return self._total & np.uint32((1 << self.bits) - 1)

    def _secret(self, device: str) -> bytes:
        """The seed of the own mask of one who came, or the masking key of one who did not.

        Of any parts in a row, by their places, that give what the device has said it is: a false one may be among all.
        """
        around = self._around[device]
        there = sorted(
            (around.place(holder), parts[device])
            for holder, parts in self.parts.items()
            if holder in around.holders and device in parts
        )
        if len(there) < around.threshold:
            raise RoundRefusedError("too-few")
        for first in range(len(there)):
            some = dict((there + there)[first : first + around.threshold])
            with suppress(ValueError):
                if self._fits(secret := joined(some), device):
                    return secret
        raise RoundRefusedError("bad-parts")

    def _fits(self, secret: bytes, device: str) -> bool:
        advert = self.adverts[device]
        if device in self.came:
            return seed_hash(secret) == advert.own_mask_hash
        return public_key(secret) == advert.masking_key
