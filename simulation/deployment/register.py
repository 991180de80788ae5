"""Who may join, which is the operator's to say: a file for each device, its name and the public half of its key.

The name is what everything of a device is kept under, whatever it calls itself. A server that runs looks into the
folder every second.
"""

from __future__ import annotations

import logging
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path
from secrets import token_hex

from pydantic import ValidationError

from florilegium.client.agent.errors import DeviceError
from florilegium.client.agent.invitation import Invitation
from florilegium.client.agent.terms import read_terms
from florilegium.privacy.secure_aggregation.wire import NAME
from florilegium.simulation.deployment.certificates import CA
from florilegium.simulation.deployment.link import pem_of

log = logging.getLogger(__name__)
NODES, INVITED = "nodes", "invitations"
KIND = "ecdsa-"  # of a device's key, in OpenSSH's form
LARGEST = 4096  # bytes of a public key's file


def admit(folder: Path, name: str, key: str) -> None:
    """Lets a device in by its public key, the text of its node.pub or a file with it. Raises `DeviceError`."""
    if not NAME.fullmatch(name):
        raise DeviceError(f"{name!r} is no name of a device: 1 to 64 of A-Z, a-z, 0-9, _, . and -")
    given = key if key.startswith((KIND, "ssh-")) else _read(Path(key))
    pem = _pem(given, key)
    there = admitted(folder)
    if there.get(name, pem) != pem:
        raise DeviceError(f"{name} has another key already: florilegium server expel {folder} {name}")
    if other := next((n for n, k in there.items() if k == pem and n != name), ""):
        raise DeviceError(f"this key is {other}'s already")
    (folder / NODES).mkdir(exist_ok=True, mode=0o700)
    _file(folder, name).write_text(given.strip() + "\n", encoding="utf-8")


def expel(folder: Path, name: str) -> None:
    """Lets a device in no more; what it has sent stays in what was made of it. Raises `DeviceError`."""
    if name not in admitted(folder):
        raise DeviceError(f"{name!r} is not admitted; florilegium server list {folder} shows who is")
    _file(folder, name).unlink()


def invite(folder: Path, name: str, server: str) -> Invitation:
    """For a device that is not admitted yet; an earlier invitation under this name is void. Raises `DeviceError`."""
    if not NAME.fullmatch(name) or name in admitted(folder):
        raise DeviceError(f"{name!r} is no name of a device, or is somebody's already: 1 to 64 of A-Z, a-z, 0-9, _ . -")
    terms, secret = read_terms(folder / "terms.toml"), token_hex(32)
    try:
        found = Invitation(
            device=name, server=server, secret=secret, terms=terms, certificates=(folder / CA).read_text("utf-8")
        )
    except ValidationError:
        raise DeviceError(f"{server!r} is no host:port, as server.example:9092") from None
    (folder / INVITED).mkdir(exist_ok=True, mode=0o700)
    (folder / INVITED / name).write_text(_hashed(secret), encoding="utf-8")
    return found


def welcome(folder: Path, name: str, secret: str, key: str) -> bool:
    """Admits a device that shows the secret of its invitation, which is void from then on."""
    path = folder / INVITED / name
    if not NAME.fullmatch(name) or not path.is_file() or not key.startswith(KIND):
        return False
    if not compare_digest(path.read_text(encoding="utf-8"), _hashed(secret)):
        return False
    try:
        path.unlink()  # the first who gets here: for another one it is gone
        admit(folder, name, key)
    except (FileNotFoundError, DeviceError) as error:
        log.warning("an invitation was not taken: %s", type(error).__name__)
        return False
    return True


def _hashed(secret: str) -> str:
    return sha256(secret.encode()).hexdigest()


def admitted(folder: Path) -> dict[str, bytes]:
    """Devices and their keys in PEM, by name; a file that is none is left out, and told."""
    found = dict[str, bytes]()
    for path in sorted((folder / NODES).glob("*.pub")):
        try:
            if NAME.fullmatch(path.stem):
                found[path.stem] = pem_of(_read(path))
        except (ValueError, DeviceError) as error:
            log.warning("%s is not the public key of a device: %s", path, type(error).__name__)
    return found


def fingerprint(pem: bytes) -> str:
    return sha256(pem).hexdigest()[:16]


def _file(folder: Path, name: str) -> Path:
    return folder / NODES / f"{name}.pub"


def _read(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(LARGEST).decode()
    except (OSError, ValueError):
        raise DeviceError(f"{path} cannot be read; it is a device's courier/node.pub, or its text in quotes") from None


def _pem(text: str, given: str) -> bytes:
    try:
        found = pem_of(text)
    except ValueError:
        found = b""
    if not found or not text.startswith(KIND):
        raise DeviceError(f"{given[:60]!r} holds no key of a device (ecdsa-sha2-nistp384 …): its courier/node.pub")
    return found
