"""Flower's SuperNode as a process of the agent's, whose port on this machine serves its owner's processes alone.

Flower listens there for what takes its tasks, with a secret, and with uvicorn's own bounds, which are none for a head
or for connections: another user of the machine could fill its memory. On Linux no byte of theirs is read.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn
from flwr.supernode.cli.flower_supernode import flower_supernode
from uvicorn.protocols.http.h11_impl import H11Protocol

from florilegium.client.agent.connection_limits import by_user, kernel_tells


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


def close_to_others() -> None:
    """From here on whatever server of uvicorn's this process makes is its owner's alone, or ends.

    Its methods are exchanged, not its names: a Flower that imports them otherwise gets these too.
    """
    set_up, begin = uvicorn.Config.__init__, uvicorn.Server.startup

    def for_owners(self: uvicorn.Config, *args: Any, **named: Any) -> None:  # type: ignore[explicit-any]
        set_up(self, *args, **{**named, "http": OwnersAlone, "ws": "none"})

    async def closed(self: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
        if self.config.http_protocol_class is not OwnersAlone or self.config.ws_protocol_class is not None:
            raise SystemExit("Flower sets the SuperNode's port up in another way: it would be open to others")
        await begin(self, sockets)

    uvicorn.Config.__init__, uvicorn.Server.startup = for_owners, closed  # type: ignore[method-assign]


def main() -> None:
    """`flower-supernode`, with its options."""
    kernel_tells()  # found out while there are descriptors for it
    close_to_others()
    flower_supernode()


if __name__ == "__main__":
    main()
