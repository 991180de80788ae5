"""Flower's SuperNode as a process of the courier's, whose port on this machine serves its owner's processes alone.

Flower listens there for what takes its tasks, with a secret, and with uvicorn's own bounds, which are none for a head
or for connections: another user of the machine could fill its memory. On Linux no byte of theirs is read.
"""

from __future__ import annotations

import asyncio
from functools import partial

import uvicorn
from flwr.supernode.cli.flower_supernode import flower_supernode
from uvicorn.protocols.http.h11_impl import H11Protocol

from client.agent.guests import by_user


class OwnersAlone(H11Protocol):
    """A connection that is cut off before anything of it is read if it is another user's."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if by_user("", transport.get_extra_info("socket")):
            transport.abort()
        else:
            super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.transport:
            super().connection_lost(exc)


def main() -> None:
    """`flower-supernode`, with its options."""
    uvicorn.Config = partial(uvicorn.Config, http=OwnersAlone, ws="none")  # type: ignore[assignment,misc]
    flower_supernode()


if __name__ == "__main__":
    main()
