"""Where the devices of a run are kept: in so many folders that several processes can write at once.

A device stays in its shard for the whole run. A shard may be written by any process that sees its folder: on a
cluster they are on shared storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from florilegium.client.observation import Observation
from florilegium.client.state import DeviceState
from florilegium.client.state_store import LAST, DeviceStore
from florilegium.privacy.ledger import Account, Answer, Budget, Ledger, Request
from florilegium.privacy.seeds import derive_seed

Item = TypeVar("Item")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Shards:
    """The shards that a run was created with."""

    folder: Path

    @classmethod
    def create(cls, folder: Path, count: int) -> Shards:
        """So many empty ones."""
        for number in range(count):
            (folder / f"{number:04d}").mkdir(parents=True)
        return cls(folder)

    @cached_property
    def folders(self) -> tuple[Path, ...]:
        return tuple(sorted(path for path in self.folder.iterdir() if path.is_dir()))

    def of(self, device: str) -> int:
        return derive_seed(0, device, "shard") % len(self.folders)

    @cached_property
    def states(self) -> ShardedStore:
        """Of the devices."""
        return ShardedStore(self, "states")

    @cached_property
    def controls(self) -> ShardedStore:
        """Of the devices as they would be without a server."""
        return ShardedStore(self, "controls")

    @cached_property
    def ledger(self) -> ShardedLedger:
        return ShardedLedger(self)

    @property
    def size_bytes(self) -> int:
        """What all of it takes on the disk."""
        return sum(path.stat().st_size for folder in self.folders for path in folder.iterdir())

    def grouped(self, items: Iterable[Item], device: Callable[[Item], str]) -> dict[int, list[Item]]:
        """By shard, in their order."""
        groups: dict[int, list[Item]] = {}
        for item in items:
            groups.setdefault(self.of(device(item)), []).append(item)
        return groups


class ShardedStore:
    """`DeviceStore` over all shards. What is saved together is whole in each shard, not in all of them at once."""

    def __init__(self, shards: Shards, name: str) -> None:
        self.shards = shards
        self.stores = [DeviceStore(folder / f"{name}.db") for folder in shards.folders]

    def save(
        self, states: Sequence[DeviceState], stage: str, observations: Sequence[Observation] | None = None
    ) -> list[str]:
        there: list[str] = []
        notes = dict(zip((s.id for s in states), observations or [Observation()] * len(states), strict=True))
        for shard, some in self.shards.grouped(states, lambda s: s.id).items():
            there += self.stores[shard].save(some, stage, [notes[s.id] for s in some])
        return there

    def find(self, devices: Sequence[str], until: str = LAST) -> dict[str, tuple[str, DeviceState] | None]:
        return self._all(devices, lambda store, some: store.find(some, until))

    def stages(self, devices: Sequence[str]) -> dict[str, str]:
        return self._all(devices, lambda store, some: store.stages(some))

    def observations(self, devices: Sequence[str], since: str, until: str) -> dict[str, list[Observation]]:
        return self._all(devices, lambda store, some: store.observations(some, since, until))

    def _all(
        self, devices: Sequence[str], ask: Callable[[DeviceStore, list[str]], Mapping[str, Value]]
    ) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for shard, some in self.shards.grouped(devices, str).items():
            found |= ask(self.stores[shard], some)
        return found


class ShardedLedger:
    """`Ledger` over all shards: each pays for its own devices."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self.ledgers = [Ledger(folder / "ledger.db") for folder in shards.folders]

    def reserve(self, requests: Sequence[Request], budget: Budget) -> list[Answer]:
        answers: dict[str, Answer] = {}
        for shard, some in self.shards.grouped(requests, lambda r: r.device).items():
            answers |= {r.device: a for r, a in zip(some, self.ledgers[shard].reserve(some, budget), strict=True)}
        return [answers[r.device] for r in requests]

    def accounts(self, devices: Sequence[tuple[str, str]]) -> list[Account | None]:
        found: dict[str, Account | None] = {}
        for shard, some in self.shards.grouped(devices, lambda d: d[0]).items():
            found |= {d[0]: a for d, a in zip(some, self.ledgers[shard].accounts(some), strict=True)}
        return [found[device] for device, _ in devices]

    def account(self, device: str, genesis: str) -> Account | None:
        return self.accounts([(device, genesis)])[0]
