"""An invitation: all that a device needs to join a federation, in one file of its operator's, good for one device once.

It holds the terms, the server's address, the certificate of its authority and a secret. Who has the file before the
device that it is meant for can join in its place, under its name: hand it over as you would a key.
"""

from __future__ import annotations

import ssl
import tomllib
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
