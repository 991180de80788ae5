"""Seeds that depend on what is drawn and on nothing else: not on the order of work, not on a global generator."""

from __future__ import annotations

from hashlib import blake2b


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A number below 2⁶³ from the experiment's seed and a purpose, such as device, round and phase."""
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
