"""The file that holds what devices remember between rounds.

A device that is killed goes on from the last stage that it finished.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from florilegium.client.observation import Observation
from florilegium.client.pool import Pool
from florilegium.client.selection.buffer import Buffer
from florilegium.client.selection.config import SelectionConfig
from florilegium.client.selection.entry import BufferEntry, Vectors
from florilegium.client.state import DeviceState, StateError
from florilegium.client.synthesize import Pair
from florilegium.privacy.common.database import connected
from florilegium.privacy.common.errors import DeviceFaultError
from florilegium.privacy.common.registry import looking

MEMORY = "memory."  # begins the names of the arrays that a policy remembers


OF_A_BIN = ("id", "prompt", "domain", "eoe", "dss", "idd", "value")


LAST = "~"  # sorts after every stage


_TABLE = """
CREATE TABLE IF NOT EXISTS state (
    device TEXT, stage TEXT, page TEXT, facts TEXT, arrays BLOB, UNIQUE (device, stage)
)
"""


_NEWEST = "SELECT stage, facts, arrays FROM state WHERE device = ? AND stage <= ? ORDER BY stage DESC LIMIT 1"


_STAGE = "SELECT max(stage) FROM state WHERE device = ?"


_PAGES = "SELECT page FROM state WHERE device = ? AND stage BETWEEN ? AND ? ORDER BY stage"


_INSERT = "INSERT OR IGNORE INTO state VALUES (?, ?, ?, ?, ?)"


_FORGET = (
    "DELETE FROM state WHERE device = ?1 AND stage < (SELECT max(stage) FROM state WHERE device = ?1 AND stage < ?2)"
)


class StoreError(DeviceFaultError):
    """The file of the states cannot be read or written, as on a full disk."""


class DeviceStore:
    """One SQLite file with a row for each device and stage. A stage is `(round, phase)`; later ones sort later.

    What is saved together is there together or not at all, whenever the process is killed. The file grows to what is
    kept at one time, not with the rounds.
    """

    def __init__(self, path: Path, key: str = "") -> None:
        """Raises `StoreError` for a file that is not a store; `key` encrypts it."""
        self.path, self._key = path, key
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._connected() as connection:
            connection.execute("PRAGMA page_size = 16384")  # of a new file
            connection.execute(_TABLE)

    def save(
        self,
        states: Sequence[DeviceState],
        stage: str,
        observations: Sequence[Observation] | None = None,
        also: Callable[[sqlite3.Connection], None] = lambda connection: None,
    ) -> list[str]:
        """Keeps the states, each with what was observed of it, and of earlier stages only the newest.

        A device that has finished the stage keeps what it has: another process may have sent it. Returns these devices.
        What `also` writes to the same file is there with the states, or not at all.
        """
        notes = observations or [Observation()] * len(states)
        rows = [
            (s.id, stage, json.dumps(seen.seen()), json.dumps(_facts(s)), save_arrays(_arrays(s)))
            for s, seen in zip(states, notes, strict=True)
        ]
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            there = [row[0] for row in rows if not connection.execute(_INSERT, row).rowcount]
            connection.executemany(_FORGET, [(s.id, stage) for s in states])
            also(connection)
            connection.execute("COMMIT")
        return there

    def load(self, device: str, stage: str) -> DeviceState:
        """Raises `StateError` naming the stage that is missing."""
        found = self.find([device], stage)[device]
        if found is None or found[0] != stage:
            raise StateError(f"{self.path}: device {device} has not finished {stage}")
        return found[1]

    def find(self, devices: Sequence[str], until: str = LAST) -> dict[str, tuple[str, DeviceState] | None]:
        """Of each device its last stage that does not sort after `until`, with the state."""
        with self._connected() as connection:
            rows = [connection.execute(_NEWEST, (device, until)).fetchone() for device in devices]
        return {d: (row[0], _state(*row[1:])) if row else None for d, row in zip(devices, rows, strict=True)}

    def stages(self, devices: Sequence[str]) -> dict[str, str]:
        """The last stage of each device; empty for one that is not known."""
        with self._connected() as connection:
            rows = [connection.execute(_STAGE, (device,)).fetchone() for device in devices]
        return {device: row[0] or "" for device, row in zip(devices, rows, strict=True)}

    def observations(self, devices: Sequence[str], since: str, until: str) -> dict[str, list[Observation]]:
        """What was observed of each device in the stages from `since` to `until`."""
        with self._connected() as connection:
            found = {d: connection.execute(_PAGES, (d, since, until)).fetchall() for d in devices}
        return {device: [Observation.of(json.loads(seen)) for (seen,) in rows] for device, rows in found.items()}

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        try:
            with connected(self.path, self._key) as connection:
                yield connection
        except sqlite3.DatabaseError as error:
            raise StoreError(f"{self.path}: {error}; what was finished is kept: mend it and resume") from error


def _facts(state: DeviceState) -> dict[str, object]:
    bins = [{name: getattr(kept, name) for name in OF_A_BIN} for kept in state.buffer.bins]
    return {
        "id": state.id,
        "secret": state.secret,
        "arrived": state.arrived,
        "head": state.head,
        "asked": state.asked,
        "replies": state.replies,
        "echoes": sorted(state.echoes),
        "annotations": state.annotations,
        "synthetic": state.synthetic,
        "descendants": state.pool_synthetic,
        "pool": {"capacity": state.pool.capacity, "slots": state.pool.slots, "seen": state.pool.seen},
        "buffer": {"config": _written(state.buffer.config), "bins": bins},
    }


def _arrays(state: DeviceState) -> dict[str, Vectors]:
    arrays = {"personal": state.personal.contiguous().numpy()}
    arrays |= {f"{MEMORY}{name}": np.asarray(value, order="C") for name, value in state.buffer.memory.items()}
    if state.sent is not None:
        arrays["sent"] = state.sent.contiguous().numpy()
    if state.buffer.bins:
        arrays["embeddings"] = np.stack([k.embedding for k in state.buffer.bins])
    return arrays


def _state(told: str, stored: bytes) -> DeviceState:
    import torch  # the folder of a run is looked at without it

    facts, arrays = json.loads(told), load_arrays(stored)
    buffer, pool, sent = facts["buffer"], facts["pool"], arrays.get("sent")
    embeddings = arrays["embeddings"] if buffer["bins"] else ()
    bins = tuple(BufferEntry(embedding=e, **b) for b, e in zip(buffer["bins"], embeddings, strict=True))
    memory = {name.removeprefix(MEMORY): array for name, array in arrays.items() if name.startswith(MEMORY)}
    return DeviceState(
        id=facts["id"],
        buffer=Buffer(_read(buffer["config"]), bins, memory),
        pool=Pool(pool["capacity"], tuple((i, p) for i, p in pool["slots"]), pool["seen"]),
        personal=torch.from_numpy(arrays["personal"]),
        secret=facts["secret"],
        arrived=facts["arrived"],
        head=facts["head"],
        sent=None if sent is None else torch.from_numpy(sent),
        asked=facts["asked"],
        replies=facts["replies"],
        echoes=frozenset(facts["echoes"]),
        annotations=facts["annotations"],
        synthetic=_pairs(facts["synthetic"]),
        pool_synthetic=_pairs(facts["descendants"]),
    )


@lru_cache(maxsize=64)
def _written(config: SelectionConfig) -> str:
    return config.model_dump_json()


@lru_cache(maxsize=64)
def _read(config: str) -> SelectionConfig:
    with looking():  # its policy is imported where it is used
        return SelectionConfig.model_validate_json(config)


def _pairs(stored: dict[str, list[Pair]]) -> dict[str, tuple[Pair, ...]]:
    return {identity: tuple((p, r) for p, r in made) for identity, made in stored.items()}
