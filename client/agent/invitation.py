"""An invitation: all that a device needs to join a federation, in one file of its operator's, good for one device once.

It holds the terms, the server's address, the certificate of its authority and a secret. Who has the file before the
device that it is meant for can join in its place, under its name: hand it over as you would a key. The same as one line
of capitals and digits, some 1,000 of them, is what a QR code carries.
"""

from __future__ import annotations

import base64
import binascii
import ssl
import tomllib
import zlib
from pathlib import Path

import httpx
import tomli_w
from pydantic import Field

from florilegium.client.agent.errors import DeviceError
from florilegium.client.agent.folder import write_private
from florilegium.client.agent.terms import Terms
from florilegium.privacy.common.base_config import Config

JOIN = "/v1/fleet/join"
PATIENCE_S = 30.0
MARK = "FLORILEGIUM1:"  # before an invitation as a line
LARGEST_LINE, LARGEST = 2**13, 2**16  # characters of a line, bytes of what it unpacks to
# What most invitations say, which a line need not say again (zlib's preset dictionary): never changed under this mark.
USUAL = (
    b'"certificates":"-----BEGIN CERTIFICATE-----\\n-----END CERTIFICATE-----\\n","terms":{"name":"","model":"'
    b'smollm2-135m","model":"nano","base":"86862a08","operator":"","rounds":3,"seed":1,"shared":{"adapter":{"kind":"lora","rank":4,'
    b'"alpha":64.0,"targets":["v_proj"],"factors":"b","virtual_tokens":8},"source":"pool","pool_capacity":64,'
    b'"sampling_rate":0.5,"sampling":"poisson","steps_per_round":1,"synthetic":0,"learning_rate":1.0,'
    b'"adamw_learning_rate":0.003,"batch_size":8,"upload":"fp32","proximal":0.0},"fraction":1.0,"min_devices":3,'
    b'"largest_norm_l2":0.0,"patience_s":600.0}}{"device":"","server":"",:9092","secret":"'
)


class Invitation(Config):
    """What the file says."""

    device: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="under which the server keeps it")
    server: str = Field(pattern=r"^[^/]+:[0-9]{1,5}$", description="host:port")
    secret: str = Field(pattern=r"^[0-9a-f]{64}$")
    certificates: str = Field(description="of the server's authority, in PEM")
    terms: Terms


def read_invitation(path: Path) -> Invitation | None:
    """None for a file that is none; raises `DeviceError` for one that is broken."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
        return Invitation.model_validate(tree) if "secret" in tree else None
    except (OSError, ValueError) as error:
        raise DeviceError(f"{path} is neither an invitation nor the terms of a federation: {error}") from None


def as_line(invitation: Invitation) -> str:
    """All of an invitation as `MARK` and base 32: what a QR code holds in its alphanumeric mode."""
    packer = zlib.compressobj(9, zdict=USUAL)
    packed = packer.compress(invitation.model_dump_json().encode()) + packer.flush()
    return MARK + base64.b32encode(packed).decode().rstrip("=")


def read_line(line: str) -> Invitation:
    """What `as_line` wrote, spaces around it aside. Raises `DeviceError` for what is no such line."""
    told = line.strip().removeprefix(MARK)
    try:
        if len(told) > LARGEST_LINE:
            raise ValueError(f"longer than {LARGEST_LINE} characters")  # noqa: TRY301  # one word for all that it is not
        unpacker = zlib.decompressobj(zdict=USUAL)
        text = unpacker.decompress(base64.b32decode(told + "=" * (-len(told) % 8)), LARGEST)
        if not unpacker.eof or unpacker.unused_data:
            raise ValueError("it breaks off, or something follows it")  # noqa: TRY301
        return Invitation.model_validate_json(text)
    except (ValueError, binascii.Error, zlib.error) as error:
        raise DeviceError(f"{line.strip()[:40]!r} is no whole invitation: scan the code again ({error})") from None


def write_invitation(path: Path, invitation: Invitation) -> None:
    """For its reader alone. Raises `DeviceError` where there is a file."""
    try:
        write_private(path, tomli_w.dumps(invitation.model_dump(mode="json", exclude_none=True)).encode())
    except FileExistsError:
        raise DeviceError(f"{path} is there already") from None


def accept(invitation: Invitation, public_key: str) -> None:
    """Shows the server this device's key, once. Raises `DeviceError` where it is not let in."""
    told = {"device": invitation.device, "secret": invitation.secret, "key": public_key}
    try:
        trust = ssl.create_default_context(cadata=invitation.certificates)
        with httpx.Client(verify=trust, timeout=PATIENCE_S, trust_env=False) as client:
            answer = client.post(f"https://{invitation.server}{JOIN}", json=told)
    except (httpx.HTTPError, ssl.SSLError) as error:
        raise DeviceError(f"{invitation.server} was not reached: {error}; is it running?") from None
    if answer.status_code != httpx.codes.OK:
        raise DeviceError(f"{invitation.server} does not take this invitation (any more): ask its operator for another")
