"""A secret of 256 bits in n parts, of which any t give it back and fewer tell nothing (Shamir 1979).

The secret is a polynomial's value at 0, over the integers modulo 2²⁵⁶ + 297; part x is its value at x = 1 … n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

PRIME = 2**256 + 297
PART_BYTES = 33


def split(secret: bytes, threshold: int, places: Sequence[int], coefficients: Sequence[int]) -> dict[int, bytes]:
    """The part for each place; `coefficients` are t − 1 secret numbers, uniform modulo `PRIME`."""
    if len(secret) != 32 or len(coefficients) != threshold - 1 or not 1 <= threshold <= len(places):
        raise ValueError(f"a secret of {len(secret)} bytes in {len(places)} parts with threshold {threshold}")
    if len(set(places)) != len(places) or not all(0 < x < PRIME for x in places):
        raise ValueError("places must be different and above 0")
    polynomial = [int.from_bytes(secret, "big"), *coefficients]
    return {x: _value(polynomial, x).to_bytes(PART_BYTES, "big") for x in places}


def joined(parts: Mapping[int, bytes]) -> bytes:
    """The secret, of as many parts as the threshold; of wrong or too few ones something else, or ValueError."""
    secret = 0
    for x, weight in _weights(tuple(sorted(parts))).items():
        secret = (secret + weight * int.from_bytes(parts[x], "big")) % PRIME
    if secret >= 2**256:
        raise ValueError("these are not parts of one secret")
    return secret.to_bytes(32, "big")


def _value(polynomial: Sequence[int], x: int) -> int:
    found = 0
    for coefficient in reversed(polynomial):
        found = (found * x + coefficient) % PRIME
    return found


@lru_cache(maxsize=4096)
def _weights(places: tuple[int, ...]) -> dict[int, int]:
    """Lagrange's, at 0."""
    found = {}
    for x in places:
        above = below = 1
        for other in places:
            if other != x:
                above, below = above * other % PRIME, below * (other - x) % PRIME
        found[x] = above * pow(below, -1, PRIME) % PRIME
    return found
