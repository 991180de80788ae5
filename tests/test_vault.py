"""A device's vault under many threads: each waits for the disk once, none of them for long, nothing is lost."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from threading import Event, Thread

import pytest

from florilegium.client.agent.errors import VaultError
from florilegium.client.agent.vault import GroupCommit, Vault
from florilegium.privacy.common.database import connected
from florilegium.simulation.benchmarks.agent import measure


def test_writes_that_come_while_one_is_under_way_are_one_transaction_after_it(tmp_path: Path) -> None:
    vault, begun, may_go, transactions = Vault(tmp_path / "v.db", token_hex(32)), Event(), Event(), []

    @contextmanager
    def opened() -> Iterator[sqlite3.Connection]:
        transactions.append(len(transactions))
        begun.set()
        assert may_go.wait(20)
        with vault.open() as connection:
            yield connection

    ids = [vault.add(f"prompt {k}", "hm", "").id for k in range(6)]
    together, told = GroupCommit(opened), dict[str, int]()

    def write(identity: str, k: int) -> None:
        told[identity] = together.write(
            lambda c: c.execute("UPDATE dialogue SET wanted = ? WHERE id = ?", (f"reply {k}", identity)).rowcount
        )

    threads = [Thread(target=write, args=(identity, k), daemon=True) for k, identity in enumerate(ids)]
    threads[0].start()
    assert begun.wait(20)
    for thread in threads[1:]:
        thread.start()
    while together._waiting.qsize() < 5:
        pass
    assert not told  # nobody is told before it is on the disk
    may_go.set()
    for thread in threads:
        thread.join(20)  # one that waits for what nobody writes would wait for ever
    assert transactions == [0, 1] and told == dict.fromkeys(ids, 1)
    assert [t.wanted for t in vault.turns()] == [f"reply {k}" for k in range(6)]


def test_what_cannot_be_written_is_told_to_all_and_the_next_is_written(tmp_path: Path) -> None:
    vault, broken = Vault(tmp_path / "v.db", token_hex(32)), [True]

    @contextmanager
    def opened() -> Iterator[sqlite3.Connection]:
        if broken[0]:
            raise VaultError("no room")
        with vault.open() as connection:
            yield connection

    together = GroupCommit(opened)
    with pytest.raises(VaultError, match="no room"):
        together.write(lambda connection: 1)
    broken[0] = False
    assert together.write(lambda connection: 2) == 2


def test_a_devices_threads_take_turns(tmp_path: Path) -> None:
    """And one that has its turn may open the file again."""
    path, key, inside = tmp_path / "v.db", token_hex(32), Event()

    def enter() -> None:
        with connected(path, key):
            inside.set()

    other = Thread(target=enter)
    with connected(path, key), connected(path, key):
        other.start()
        assert not inside.wait(0.2)
    other.join(20)
    assert inside.is_set()


@pytest.mark.slow
def test_a_page_bears_a_hundred_clients_and_loses_nothing() -> None:
    for found in measure([8, 100], 3.0, print):
        assert (found.failed, found.lost) == (0, 0) and found.requests_s > 0
