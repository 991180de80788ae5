"""The registrar of a federation whose devices add noise together: a key of its own, and what it has signed with it.

It is somebody whom the devices' owners trust to know one device from another, on a machine that is not the server's:
whoever has this key and the operator's can invent devices, whose noise the operator knows. The server needs none of
this; devices look at the signatures themselves.
"""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path

from florilegium.client.agent.distributed_terms import HEX_KEY
from florilegium.client.agent.errors import DeviceError
from florilegium.client.agent.folder import write_private
from florilegium.client.agent.registration import Registration
from florilegium.client.agent.signature import new_key, private_key, public_half
from florilegium.client.agent.terms import Terms
from florilegium.privacy.secure_aggregation.adverts import certified
from florilegium.privacy.secure_aggregation.wire import NAME
from florilegium.simulation.deployment.certificates import OPERATOR_KEY

REGISTRAR_KEY, REGISTERED = "registrar.key", "registered"


def new_registrar(folder: Path) -> str:
    """A key in a new folder; returns its public half. Raises `DeviceError` where there is one, or a server."""
    if (folder / REGISTRAR_KEY).exists():
        raise DeviceError(f"{folder} has a registrar's key already: devices that are registered with it need it")
    if (folder / OPERATOR_KEY).exists():
        raise DeviceError(f"{folder} is a server's: a registrar's key beside its operator's protects nobody")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    private = new_key()
    write_private(folder / REGISTRAR_KEY, private)
    return public_half(private)


def register(folder: Path, terms: Terms, name: str, identity: str) -> Registration:
    """Signs that a device with this identity is `name` in the federation of these terms.

    Raises `DeviceError` for a name or an identity that is somebody else's there, and for terms of another registrar.
    """
    private = _key(folder)
    if terms.distributed is None:
        raise DeviceError(f"the devices of {terms.name!r} add no noise together: its terms name no registrar")
    if terms.distributed.registrar != public_half(private):
        raise DeviceError(f"the terms of {terms.name!r} name another registrar than {folder}")
    if not NAME.fullmatch(name) or name in (".", "..") or not re.fullmatch(HEX_KEY, identity):
        raise DeviceError(f"{name!r}, {identity!r}: a name of 1 to 64 of A-Z, a-z, 0-9, _ . -, and 64 digits of a key")
    _note(folder / REGISTERED / sha256(terms.federation.encode()).hexdigest()[:16], name, identity)
    signature = certified(private_key(private), terms.federation, name, bytes.fromhex(identity))
    return Registration(federation=terms.federation, device=name, identity=identity, certificate=signature.hex())


def registered(folder: Path, terms: Terms) -> dict[str, str]:
    """Who is, by name, with the identity."""
    found = folder / REGISTERED / sha256(terms.federation.encode()).hexdigest()[:16]
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(found.glob("*"))}


def _note(found: Path, name: str, identity: str) -> None:
    """One name has one identity, and one identity one name, before anything is signed."""
    there = {path.name: path.read_text(encoding="utf-8") for path in found.glob("*")}
    if there.get(name, identity) != identity:
        raise DeviceError(f"{name} is registered with another identity already")
    if other := next((n for n, i in there.items() if i == identity and n != name), ""):
        raise DeviceError(f"this identity is {other}'s already: a device is one in a sum")
    found.mkdir(parents=True, exist_ok=True, mode=0o700)
    (found / name).write_text(identity, encoding="utf-8")


def _key(folder: Path) -> bytes:
    try:
        return (folder / REGISTRAR_KEY).read_bytes()
    except OSError:
        raise DeviceError(f"{folder} has no {REGISTRAR_KEY}: florilegium server registrar new {folder}") from None
