"""Seeds that depend on what is drawn and on nothing else: not on the order of work, not on a global generator."""

from __future__ import annotations

import secrets
from hashlib import blake2b


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A number below 2⁶³ from a seed and a purpose, such as device, round and phase."""
    return int.from_bytes(_digest(8, seed, *purpose), "big") >> 1


def derive_key(secret: int, *purpose: str | int) -> int:
    """A number below 2¹²⁸: a key for what must not be guessed, such as noise."""
    return int.from_bytes(_digest(16, secret, *purpose), "big")


def fresh_secret() -> int:
    """128 bits from the operating system."""
    return secrets.randbits(128)


def _digest(size: int, *parts: str | int) -> bytes:
    return blake2b("\x1f".join(map(str, parts)).encode(), digest_size=size).digest()
