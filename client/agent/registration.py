"""A registration: the registrar's word that a device is one, under a name, for one federation's terms.

The registrar is somebody whom the devices' owners trust not to invent devices, and not the server: its public key is in
the terms, the private half is nowhere near the server. Not covered: that a name is one person's, or one machine's,
which is the registrar's to find out.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from secrets import token_bytes
from typing import TYPE_CHECKING

import tomli_w
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field

from florilegium.client.agent.distributed_terms import HEX_KEY
from florilegium.client.agent.errors import DeviceError
from florilegium.privacy.common.base_config import Config
from florilegium.privacy.secure_aggregation.adverts import is_certified
from florilegium.privacy.secure_aggregation.keys import derived, identity_key

if TYPE_CHECKING:
    from florilegium.client.agent.vault import Vault

LARGEST_FILE = 4096  # bytes
IDENTITY = "identity"  # the fact with the secret that a device's identities follow from


class Registration(Config):
    """What the file says; all public."""

    federation: str = Field(max_length=200, description="name and hash of the terms that it is for")
    device: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="as the server's operator admits it")
    identity: str = Field(pattern=HEX_KEY, description="public half of the key that the device signs with")
    certificate: str = Field(pattern=r"^[0-9a-f]{128}$", description="the registrar's signature")

    def is_of(self, registrar: str, federation: str) -> bool:
        """Whether this registrar has signed it, for this federation."""
        key, identity = bytes.fromhex(registrar), bytes.fromhex(self.identity)
        signature = bytes.fromhex(self.certificate)
        return self.federation == federation and is_certified(key, signature, federation, self.device, identity)


def identity_of(vault: Vault, federation: str) -> Ed25519PrivateKey:
    """The key that a device signs with in a federation, and in no other: nobody sees that two are the same device's."""
    secret: str = vault.fact(IDENTITY, "")
    if not secret:
        secret = token_bytes(32).hex()
        vault.set_fact(IDENTITY, secret)
    return identity_key(derived(bytes.fromhex(secret), "identity in", [federation]))


def public_identity(vault: Vault, federation: str) -> str:
    """Its public half: 64 hexadecimal digits."""
    return identity_of(vault, federation).public_key().public_bytes_raw().hex()


def read_registration(path: Path) -> Registration:
    """Raises `DeviceError` for a file that is none."""
    try:
        with open(path, "rb") as file:
            return Registration.model_validate(tomllib.loads(file.read(LARGEST_FILE).decode()))
    except (OSError, ValueError, RecursionError) as error:
        raise DeviceError(f"{path} is no registration: {error}; florilegium server registrar sign makes one") from None


def write_registration(path: Path, registration: Registration) -> None:
    path.write_text(tomli_w.dumps(registration.model_dump(mode="json")), encoding="utf-8")
