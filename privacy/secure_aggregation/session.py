"""One device in one round of secure aggregation: what it says at each step, and what it does not say.

    keys      two fresh public keys, signed with the device's own key, which the registrar has signed
    shares    parts of its two secrets, for its neighbours, encrypted to each
    masked    its numbers, behind a mask of its own and one with each neighbour, which cancel in the sum
    confirm   a signature under the lists of devices whose parts, and whose masked numbers, have come
    unmask    of those who came the part of their own mask, of those who did not the part of their key

Bonawitz et al. 2017 (CCS, Fig. 4), with the neighbourhoods of `neighbours`. Beyond the paper the list of those whose
parts have come is confirmed too: with another one for each half of the devices a server would learn two sums, each with
the noise of half of them (their Theorem 6.5 grants that). A step is answered once; asked again for the same it says the
same, asked for something else it says nothing any more. Secrets follow from a seed that is the session's alone. Not
covered: that a server stops a round, or leaves devices out of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from typing import TypedDict

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from florilegium.privacy.secure_aggregation.adverts import Advert, is_registered, pair_seed, scope, seed_hash
from florilegium.privacy.secure_aggregation.keys import (
    Told,
    agreed,
    derived,
    is_signed,
    mask,
    opened,
    public_key,
    sealed,
    signed,
)
from florilegium.privacy.secure_aggregation.neighbours import (
    LEAST,
    Neighbourhood,
    RoundRefusedError,
    SumLimits,
    list_hash,
    names_of,
    neighbourhoods,
)
from florilegium.privacy.secure_aggregation.sharing import PART_BYTES, PRIME, split

Numbers = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Scene:
    """What a session is about, and its owner's limits; no server changes them."""

    federation: str
    round: int
    device: str
    registrar: bytes  # Ed25519: who says which devices there are
    limits: SumLimits

    @property
    def of(self) -> tuple[str, int]:
        return self.federation, self.round


@dataclass
class Session:
    """A device's side of a round. What it was told, step by step, is kept, so that it is not told two stories.

    Every method raises `RoundRefusedError` for what it does not answer; nothing was said then.
    """

    scene: Scene
    seed: bytes  # 32, secret, of this session alone
    identity: Ed25519PrivateKey
    certificate: bytes
    adverts: Mapping[str, Advert] = field(default_factory=dict)  # of its neighbours and itself
    names: tuple[str, ...] = ()  # of all devices
    members: tuple[str, ...] = ()  # of whom all parts have come to the server
    inbox: Mapping[str, bytes] = field(default_factory=dict)  # by sender: parts that were encrypted to this device
    sent: str = ""  # hash of the numbers that have left behind masks
    survivors: tuple[str, ...] = ()
    unmasked: tuple[str, ...] = ()  # whose confirmations it was shown

    # -- what it has ------------------------------------------------------------------------------------------------

    def _key(self, purpose: str) -> bytes:
        return derived(self.seed, purpose, self.scene.of)

    @cached_property
    def advert(self) -> Advert:
        """Step 1."""
        sharing, masking = public_key(self._key("sharing")), public_key(self._key("masking"))
        keys = (sharing, masking, seed_hash(self._key("own mask")))
        signature = signed(self.identity, "keys", [*self.scene.of, self.scene.device, *(key.hex() for key in keys)])
        return Advert(self.identity.public_key().public_bytes_raw(), self.certificate, *keys, signature)

    @property
    def neighbourhood(self) -> Neighbourhood:
        return neighbourhoods(self.names, self.scene.limits)[self.scene.device]

    @cached_property
    def _scope(self) -> Told:
        """From step 2 on: what all that is derived or signed is bound to, this round of these devices alone."""
        return scope(self.scene.of, self.names, self.adverts, self.scene.limits)

    @property
    def neighbours(self) -> list[str]:
        return [name for name in self.neighbourhood.holders if name != self.scene.device]

    # -- step 2 -----------------------------------------------------------------------------------------------------

    def shares(self, names: Sequence[str], adverts: Mapping[str, Advert]) -> dict[str, bytes]:
        """For each neighbour the encrypted parts of this device's secrets.

        `names` are all devices of the round, `adverts` at least those of the neighbours.
        """
        told, scene = names_of(names), self.scene
        if self.names and (told != self.names or any(adverts.get(n) != a for n, a in self.adverts.items())):
            raise RoundRefusedError("told-two-stories")
        if scene.device not in told or adverts.get(scene.device) != self.advert:
            raise RoundRefusedError("not-its-round")
        around = neighbourhoods(told, scene.limits)[scene.device].holders
        found = {name: adverts[name] for name in around if name in adverts}
        registered = (is_registered(scene.of, scene.registrar, name, advert) for name, advert in found.items())
        if set(found) != set(around) or not all(registered):
            raise RoundRefusedError("not-registered")
        if len({key for a in found.values() for key in (a.identity, a.sharing_key, a.masking_key)}) != 3 * len(found):
            raise RoundRefusedError("twice-the-same")
        self.names, self.adverts = told, found
        parts, device = self._parts(), scene.device
        return {name: sealed(self._channel(device, name), parts[name], (device, name)) for name in self.neighbours}

    def _parts(self) -> dict[str, bytes]:
        """By holder: of the seed of the device's own mask, and of its masking key."""
        around = self.neighbourhood
        places = [around.place(name) for name in around.holders]
        own, key = (
            split(self._key(secret), around.threshold, places, self._coefficients(secret, around.threshold - 1))
            for secret in ("own mask", "masking")
        )
        return {name: own[around.place(name)] + key[around.place(name)] for name in around.holders}

    def _coefficients(self, secret: str, count: int) -> list[int]:
        """Uniform modulo the prime, but for a distance of 2⁻¹²⁷."""
        numbers = mask(self._key(f"polynomial of {secret}"), 12 * count).tobytes()
        return [int.from_bytes(numbers[48 * i : 48 * i + 48], "big") % PRIME for i in range(count)]

    def _channel(self, sender: str, to: str) -> bytes:
        """The key for what goes one way between this device and another."""
        other = to if sender == self.scene.device else sender
        common = agreed(self._key("sharing"), self.adverts[other].sharing_key)
        return derived(common, "parts", (*self._scope, sender, to))

    # -- step 3 -----------------------------------------------------------------------------------------------------

    def receive(self, members: Sequence[str], inbox: Mapping[str, bytes]) -> None:
        """Takes the parts that its neighbours among `members` encrypted to this device; before anything is learned."""
        told, scene = names_of(members), self.scene
        if not self.names:
            raise RoundRefusedError("out-of-order")
        if self.members and (told != self.members or dict(inbox) != self.inbox):
            raise RoundRefusedError("told-two-stories")
        if len(set(told)) != len(told) or not set(told) <= set(self.names) or scene.device not in told:
            raise RoundRefusedError("not-its-round")
        if set(inbox) != set(self.neighbours) & set(told):
            raise RoundRefusedError("not-its-round")
        if len(told) < self._fewest or len(inbox) + 1 < self.neighbourhood.threshold:
            raise RoundRefusedError("too-few")
        for name, text in inbox.items():
            self._opened(name, text)
        self.members, self.inbox = told, dict(inbox)

    @property
    def _fewest(self) -> int:
        return max(self.scene.limits.survivors, self.scene.limits.colluding + LEAST)

    def _opened(self, sender: str, text: bytes) -> bytes:
        device = self.scene.device
        try:
            parts = opened(self._channel(sender, device), text, (sender, device))
        except ValueError:
            raise RoundRefusedError("bad-shares") from None
        if len(parts) != 2 * PART_BYTES:
            raise RoundRefusedError("bad-shares")
        return parts

    def masked(self, numbers: npt.NDArray[np.int64], bits: int) -> Numbers:
        """The device's numbers (P,) modulo 2^bits behind their masks: by themselves uniform noise."""
        if not self.inbox:
            raise RoundRefusedError("out-of-order")
        told = sha256(f"{bits} {numbers.dtype} ".encode() + numbers.tobytes()).hexdigest()
        if self.sent not in ("", told):  # the difference of the two would be in the clear
            raise RoundRefusedError("twice-the-same")
        device, key = self.scene.device, self._key("masking")
        total = (numbers & 0xFFFFFFFF).astype(np.uint32) + mask(self._key("own mask"), numbers.size)
        for name in self.inbox:
            with_other = mask(pair_seed(key, (device, name), self.adverts, self._scope), numbers.size)
            total = total + with_other if device < name else total - with_other
        self.sent = told
        return total & np.uint32((1 << bits) - 1)

    # -- steps 4 and 5 ----------------------------------------------------------------------------------------------

    def confirm(self, survivors: Sequence[str]) -> bytes:
        """The signature under those whose masked numbers have come; under one such list only."""
        told, scene = names_of(survivors), self.scene
        if not self.sent:
            raise RoundRefusedError("out-of-order")
        if self.survivors and told != self.survivors:
            raise RoundRefusedError("told-two-stories")
        if len(set(told)) != len(told) or not set(told) <= set(self.members) or scene.device not in told:
            raise RoundRefusedError("not-its-round")
        if len(told) < self._fewest:
            raise RoundRefusedError("too-few")
        self.survivors = told
        return signed(self.identity, "survivors", self._lists)

    @property
    def _lists(self) -> list[object]:
        return [*self._scope, *map(list_hash, (self.members, self.survivors))]

    def unmask(self, confirmations: Mapping[str, bytes]) -> dict[str, bytes]:
        """By neighbour, and itself: the part of its own mask's seed if it survived, else of its masking key.

        Only when as many of the neighbourhood have signed the same list as no other list can have.
        """
        if not self.survivors:
            raise RoundRefusedError("out-of-order")
        scene, around = self.scene, self.neighbourhood
        valid = [
            name for name, signature in confirmations.items()
            if name in around.holders and name in self.survivors
            and is_signed(self.adverts[name].identity, signature, "survivors", self._lists)
        ]  # fmt: skip
        if len(valid) < around.threshold:
            raise RoundRefusedError("not-confirmed")
        self.unmasked = names_of(valid)
        found = {}
        for owner in [scene.device, *self.inbox]:
            parts = self._parts()[scene.device] if owner == scene.device else self._opened(owner, self.inbox[owner])
            found[owner] = parts[:PART_BYTES] if owner in self.survivors else parts[PART_BYTES:]
        return found


class StoredSession(TypedDict):
    """As JSON takes it."""

    adverts: dict[str, list[str]]
    names: list[str]
    members: list[str]
    inbox: dict[str, str]
    sent: str
    survivors: list[str]
    unmasked: list[str]


def stored(session: Session) -> StoredSession:
    """What a session was told and has answered, as JSON takes it; none of its secrets."""
    return {
        "adverts": {name: [value.hex() for value in astuple(advert)] for name, advert in session.adverts.items()},
        "names": list(session.names),
        "members": list(session.members),
        "inbox": {name: text.hex() for name, text in session.inbox.items()},
        "sent": session.sent,
        "survivors": list(session.survivors),
        "unmasked": list(session.unmasked),
    }


def restored(session: Session, told: StoredSession) -> Session:
    """A session with the same secrets, as it was when it was `stored`."""
    return replace(
        session,
        adverts={name: Advert(*map(bytes.fromhex, values)) for name, values in told["adverts"].items()},
        names=tuple(told["names"]),
        members=tuple(told["members"]),
        inbox={name: bytes.fromhex(text) for name, text in told["inbox"].items()},
        sent=told["sent"],
        survivors=tuple(told["survivors"]),
        unmasked=tuple(told["unmasked"]),
    )
