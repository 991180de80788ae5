"""How files of accounts and of states are opened: what was written is there after a power cut, or not at all.

With a key a file is encrypted page by page (SQLCipher: AES-256, an HMAC of each page), and what is deleted is
overwritten. Not covered: who may read the key.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import cast

KEY_HEX = 64  # digits of a key


@contextmanager
def connected(path: Path, key: str = "") -> Iterator[sqlite3.Connection]:
    """An SQLite file, which many processes may write in turns; `key`, 64 hexadecimal digits, encrypts it.

    Raises `sqlite3.DatabaseError`, for a wrong key too.
    """
    with _turn_of(path) if key else nullcontext(), _encrypted(path, key) if key else _plain(path) as connection:
        connection.execute("PRAGMA journal_mode = TRUNCATE")  # no memory shared: works on a network's disk too
        connection.execute("PRAGMA synchronous = FULL")  # on the disk, not only with the system
        yield connection


@lru_cache(maxsize=64)
def _turn_of(path: Path) -> RLock:
    """A device's threads take turns: where SQLite has them wait for one that writes, it lets them sleep too long."""
    return RLock()


@contextmanager
def _plain(path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(path, timeout=60, isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()


@contextmanager
def _encrypted(path: Path, key: str) -> Iterator[sqlite3.Connection]:
    from sqlcipher3 import dbapi2 as sqlcipher  # of the extra `device`

    if len(key) != KEY_HEX or not set(key) <= set("0123456789abcdef"):
        raise sqlite3.DatabaseError(f"a key has {KEY_HEX} hexadecimal digits")
    connection = sqlcipher.connect(str(path), timeout=60, isolation_level=None)
    try:
        connection.execute("PRAGMA cipher_log_level = NONE")
        connection.execute(f"PRAGMA key = \"x'{key}'\"")
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()  # whether the key fits
        yield cast(sqlite3.Connection, connection)
    except sqlcipher.DatabaseError as error:
        raise sqlite3.DatabaseError(str(error)) from error
    finally:
        connection.close()
