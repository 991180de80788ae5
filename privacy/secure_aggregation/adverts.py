"""What devices say of themselves in a round of secure aggregation, and what is bound to it.

All that two devices derive or sign holds who takes part and with which keys: told another list, or another key, they do
not understand each other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from functools import lru_cache
from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from florilegium.privacy.secure_aggregation.keys import (
    KEY_BYTES,
    Told,
    agreed,
    derived,
    is_signed,
    is_usable,
    signed,
)
from florilegium.privacy.secure_aggregation.neighbours import SumLimits, list_hash


@dataclass(frozen=True, slots=True)
class Advert:
    """What a device says of itself in a round; all public."""

    identity: bytes  # Ed25519, of its registration
    certificate: bytes  # the registrar's signature
    sharing_key: bytes  # X25519, to encrypt parts to
    masking_key: bytes  # X25519, for masks
    own_mask_hash: bytes  # of the seed of the device's own mask: what is put together of its parts is checked
    signature: bytes  # of the identity


def scope(
    of: tuple[str, int], names: tuple[str, ...], adverts: Mapping[str, Advert], limits: SumLimits
) -> tuple[str | int, ...]:
    """A round of these devices; where everybody knows everybody, with the keys of all."""
    return *of, list_hash(names), adverts_hash(tuple(sorted(adverts.items()))) if limits.complete else ""


@lru_cache(maxsize=64)
def adverts_hash(adverts: tuple[tuple[str, Advert], ...]) -> str:
    """Of the keys of so many devices."""
    told = [[name, *(value.hex() for value in astuple(advert))] for name, advert in adverts]
    return sha256(json.dumps(told).encode()).hexdigest()


def seed_hash(seed: bytes) -> bytes:
    """Which seed of an own mask it is, told without telling it."""
    return sha256(b"florilegium own mask 1" + seed).digest()


def pair_seed(private: bytes, pair: tuple[str, str], adverts: Mapping[str, Advert], told: Told) -> bytes:
    """Of the mask that two devices have in common; `private` is the masking key of the first of the `pair`.

    Bound to both names and both keys: no other pair has it, whatever keys somebody else says are his.
    """
    keys = [(name, adverts[name].masking_key.hex()) for name in sorted(pair)]
    common = agreed(private, adverts[pair[1]].masking_key)
    return derived(common, "pair mask", [*told, *(part for key in keys for part in key)])


def certified(registrar: Ed25519PrivateKey, federation: str, device: str, identity: bytes) -> bytes:
    """The registrar's signature: this device of this federation has this identity."""
    return signed(registrar, "device", [federation, device, identity.hex()])


def is_certified(registrar: bytes, certificate: bytes, federation: str, device: str, identity: bytes) -> bool:
    """Whether the registrar has signed that."""
    return is_signed(registrar, certificate, "device", [federation, device, identity.hex()])


def is_registered(of: tuple[str, int], registrar: bytes, name: str, advert: Advert) -> bool:
    """Whether the registrar knows this device by this identity, which has signed these keys, and they can be used."""
    keys = (advert.sharing_key, advert.masking_key, advert.own_mask_hash)
    if not all(len(key) == KEY_BYTES for key in (advert.identity, *keys)):
        return False
    told = [*of, name, *(key.hex() for key in keys)]
    return (
        is_certified(registrar, advert.certificate, of[0], name, advert.identity)
        and is_signed(advert.identity, advert.signature, "keys", told)
        and is_usable(advert.sharing_key)
        and is_usable(advert.masking_key)
    )
