"""What a benchmark asks, in a process of its own: what asks would wait for it within one interpreter."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
