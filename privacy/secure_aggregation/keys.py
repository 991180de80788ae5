"""The keys of secure aggregation, all from `cryptography`: X25519, HKDF of SHA-256, ChaCha20, Ed25519.

Every key is for one purpose, one federation and one round, which are in what HKDF is told.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES, SIGNATURE_BYTES, TAG_BYTES = 32, 64, 16
Told = Sequence[str | int]


def derived(secret: bytes, purpose: str, told: Told = (), size: int = KEY_BYTES) -> bytes:
    """A key from a secret, for one purpose."""
    return HKDF(SHA256(), size, None, json.dumps([purpose, *told]).encode()).derive(secret)


def public_key(private: bytes) -> bytes:
    """Of X25519."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def is_usable(public: bytes) -> bool:
    """Whether this is the one way to write a key of X25519 with which nobody else knows what is agreed.

    Another way to write the same key, with its highest bit set or above the field, would be another device's double.
    """
    if len(public) != KEY_BYTES or int.from_bytes(public, "little") >= 2**255 - 19:
        return False
    try:
        agreed(bytes(KEY_BYTES), public)
    except ValueError:
        return False
    return True


@lru_cache(maxsize=2**16)
def agreed(private: bytes, public: bytes) -> bytes:
    """What two devices know and nobody else. Raises ValueError for a public key that would make it known."""
    return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))


def sealed(key: bytes, text: bytes, told: Told) -> bytes:
    """Encrypted and authenticated, once for a key: the nonce is always the same."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), text, json.dumps([*told]).encode())


def opened(key: bytes, sent: bytes, told: Told) -> bytes:
    """Raises ValueError for anything else than what was sealed."""
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sent, json.dumps([*told]).encode())
    except InvalidTag:
        raise ValueError("what came is not what was sealed") from None


def mask(seed: bytes, width: int) -> npt.NDArray[np.uint32]:
    """(P,) uniform numbers of 32 bits: the stream of ChaCha20 with this key."""
    stream = Cipher(ChaCha20(seed, bytes(16)), mode=None).encryptor().update(bytes(4 * width))
    return np.frombuffer(stream, dtype="<u4")


def identity_key(secret: bytes) -> Ed25519PrivateKey:
    """A device's own, for as long as it has this secret."""
    return Ed25519PrivateKey.from_private_bytes(derived(secret, "florilegium identity"))


def signed(private: Ed25519PrivateKey, purpose: str, told: Sequence[object]) -> bytes:
    return private.sign(_message(purpose, told))


def is_signed(public: bytes, signature: bytes, purpose: str, told: Sequence[object]) -> bool:
    return _is_signed(public, signature, _message(purpose, told))


@lru_cache(maxsize=2**14)  # where many devices are simulated each looks at the same ones
def _is_signed(public: bytes, signature: bytes, message: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _message(purpose: str, told: Sequence[object]) -> bytes:
    return json.dumps([f"florilegium {purpose} 1", *told]).encode()
