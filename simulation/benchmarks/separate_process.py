"""What a benchmark asks, in a process of its own: what asks would wait for it within one interpreter."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import psutil

from florilegium.privacy.common.errors import UserError


@contextmanager
def apart(serve: Callable[..., object], *arguments: object) -> Iterator[tuple[Any, psutil.Process]]:
    """What `serve(*arguments, pipe)` sends as it begins, and its process, which lasts as long as this.

    Raises `UserError` where it ends before; what it says of that is on the terminal.
    """
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(*arguments, there), daemon=True)
    process.start()
    there.close()  # or nobody would tell that the other one is gone
    try:
        try:
            told = here.recv()
        except EOFError:
            process.join()
            raise UserError(f"what was to be measured ended before it began, exit code {process.exitcode}") from None
        yield told, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.join()
        here.close()


@dataclass
class Memory:
    """The largest resident memory of a process that was seen so far."""

    largest_bytes: int = 0


@asynccontextmanager
async def memory_watched(watched: psutil.Process) -> AsyncIterator[Memory]:
    """The memory of a process, looked at five times a second for as long as this lasts."""
    memory = Memory()

    async def watch() -> None:
        while True:
            memory.largest_bytes = max(memory.largest_bytes, watched.memory_info().rss)
            await asyncio.sleep(0.2)

    watching = asyncio.create_task(watch())
    try:
        yield memory
    finally:
        watching.cancel()


async def answered(reader: asyncio.StreamReader) -> bytes:
    """The body of an answer over HTTP; raises ValueError for any answer but 200."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    if not head.startswith("http/1.1 200"):
        raise ValueError(head.partition("\r\n")[0])
    return await reader.readexactly(int(head.partition("content-length: ")[2].partition("\r\n")[0]))
