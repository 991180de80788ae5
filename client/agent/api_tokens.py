"""Tokens of programs that may use the OpenAI-compatible endpoint; of each only a hash is kept.

A token is 256 random bits, so that a plain SHA-256 of it tells nothing. Not covered: what a program does with its own.
"""

from __future__ import annotations

import re
import time
from hashlib import sha256
from hmac import compare_digest
from secrets import token_urlsafe
from threading import Lock

from florilegium.client.agent.errors import AgentError
from florilegium.client.agent.vault import Vault

API_TOKENS = "api tokens"  # the fact of the vault
PREFIX = "florilegium-"  # by which scanners find one that was published
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
MOST = 32


class ApiTokens:
    """The tokens that there are, by the name of the program that each was made for."""

    def __init__(self, vault: Vault) -> None:
        self._vault, self._turn = vault, Lock()
        self._known: dict[str, dict[str, object]] = vault.fact(API_TOKENS, {})  # name → hash, made

    def new(self, name: str) -> str:
        """A new token, told this once. Raises `AgentError` for a name that is taken or is none."""
        if not NAME.fullmatch(name):
            raise AgentError(f"{name!r} is no name of a token: 1 to 64 letters, digits, - and _")
        with self._turn:
            if name in self._known:
                raise AgentError(f"there is a token {name!r}: take another name, or revoke it first")
            if len(self._known) >= MOST:
                raise AgentError(f"there are {MOST} tokens, the most: revoke one first")
            token = PREFIX + token_urlsafe(32)
            self._write({**self._known, name: {"hash": _hashed(token), "made": time.time()}})
        return token

    def listed(self) -> list[dict[str, object]]:
        """Name and time of each, oldest first; nothing that opens anything."""
        return [{"name": name, "made": entry["made"]} for name, entry in self._known.items()]

    def revoke(self, name: str) -> None:
        """From now on its requests are refused. Raises `AgentError` where there is none."""
        with self._turn:
            if name not in self._known:
                raise AgentError(f"there is no token {name!r}: {', '.join(self._known) or 'there are none'}")
            self._write({n: entry for n, entry in self._known.items() if n != name})

    def knows(self, shown: str) -> bool:
        """Whether this is one of them; in a time that does not tell which, or how nearly."""
        hashed = _hashed(shown)
        return any([compare_digest(hashed, str(entry["hash"])) for entry in list(self._known.values())])

    def _write(self, known: dict[str, dict[str, object]]) -> None:
        self._vault.set_fact(API_TOKENS, known)
        self._known = known


def _hashed(token: str) -> str:
    return sha256(token.encode()).hexdigest()
