"""How files of accounts and of states are opened: what was written is there after a power cut, or not at all."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def connected(path: Path) -> Iterator[sqlite3.Connection]:
    """An SQLite file, which many processes may write in turns. Raises `sqlite3.DatabaseError`."""
    connection = sqlite3.connect(path, timeout=60, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = TRUNCATE")  # no memory shared: works on a network's disk too
        connection.execute("PRAGMA synchronous = FULL")  # on the disk, not only with the system
        yield connection
    finally:
        connection.close()
