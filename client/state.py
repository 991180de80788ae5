"""What a device remembers between rounds, and the file that holds it.

One file a device and round, replaced atomically: a device that is killed goes on from its last whole file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from client.buffer import Buffer, Kept, SelectionConfig
from client.config import DeviceConfig
from client.pool import Pool
from client.synthesize import Pair
from privacy.seeds import derive_key

MEMORY = "memory."  # begins the names of the arrays that a policy remembers
OF_A_BIN = ("id", "prompt", "domain", "eoe", "dss", "idd", "value")


class StateError(RuntimeError):
    """A device's file is missing or does not fit the settings."""


@dataclass(frozen=True)
class DeviceState:
    """One device after a phase."""

    id: str
    buffer: Buffer
    pool: Pool
    personal: torch.Tensor  # (P,) float32 on the CPU
    secret: int  # 128 bits, from which noise and coins are drawn; never leaves
    arrived: int = 0  # dialogues taken from the stream
    replies: dict[str, str] = field(default_factory=dict)  # dialogue id → the user's annotation
    annotations: int = 0  # times the user was asked
    synthetic: dict[str, tuple[Pair, ...]] = field(default_factory=dict)  # dialogue id → those made from it
    descendants: dict[str, tuple[Pair, ...]] = field(default_factory=dict)  # as `synthetic`, of the pool's dialogues
    head: str = ""  # of the ledger when it last paid for this device
    sent: torch.Tensor | None = None  # (P,) of what travelled in the round that is not over: what it repeats if asked
    asked: str = ""  # fingerprint of what had been received for it

    @classmethod
    def new(cls, identity: str, config: DeviceConfig, personal: torch.Tensor, secret: int) -> DeviceState:
        return cls(identity, Buffer(config.selection), Pool(config.shared.pool_capacity), personal, secret)

    @property
    def genesis(self) -> str:
        """What the device's chain in the ledger begins with."""
        return f"{derive_key(self.secret, 'ledger'):032x}"

    @property
    def annotated(self) -> tuple[Kept, ...]:
        """The bins whose reply is known: what the personal adapter can learn from."""
        return tuple(k for k in self.buffer.bins if k.id in self.replies)


class DeviceStore:
    """A folder with a file for each device and stage. A stage is `(round, phase)`; later ones sort later."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, device: str, stage: str) -> Path:
        return self.folder / device / f"{stage}.safetensors"

    def save(self, states: Iterable[DeviceState], stage: str) -> None:
        for state in states:
            path = self.path(state.id, stage)
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {"personal": state.personal.contiguous()}
            tensors |= {f"{MEMORY}{name}": torch.tensor(value) for name, value in state.buffer.memory.items()}
            if state.sent is not None:
                tensors["sent"] = state.sent.contiguous()
            if state.buffer.bins:
                tensors["embeddings"] = torch.from_numpy(np.stack([k.embedding for k in state.buffer.bins]))
            fresh = path.with_suffix(".new")
            save_file(tensors, fresh, metadata={"device": json.dumps(_facts(state))})
            fresh.replace(path)

    def load(self, device: str, stage: str) -> DeviceState:
        """Raises `StateError` naming the file that is missing."""
        path = self.path(device, stage)
        if not path.exists():
            raise StateError(f"{path} is missing: device {device} has not finished {stage}")
        with safe_open(path, "pt") as stored:
            facts = json.loads(stored.metadata()["device"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        return _state(facts, tensors)

    def latest(self, device: str, until: str | None = None) -> str | None:
        """The last stage of a device that does not sort after `until`; without it, of all."""
        stages = sorted(path.stem for path in (self.folder / device).glob("*.safetensors"))
        return next((s for s in reversed(stages) if until is None or s <= until), None)

    def forget(self, device: str, until: str) -> None:
        """Removes the device's files except the newest that does not sort after `until`, and later ones."""
        newest = self.latest(device, until)
        for path in (self.folder / device).glob("*.safetensors"):
            if newest and path.stem < newest:
                path.unlink()


def stage(round_number: int, phase: str = "z-done") -> str:
    """The name of a stage; `stage(r)` is the end of round r and sorts after its other phases."""
    return f"{round_number:05d}-{phase}"


def _facts(state: DeviceState) -> dict[str, Any]:
    bins = [{name: getattr(kept, name) for name in OF_A_BIN} for kept in state.buffer.bins]
    return {
        "id": state.id,
        "secret": state.secret,
        "arrived": state.arrived,
        "head": state.head,
        "asked": state.asked,
        "replies": state.replies,
        "annotations": state.annotations,
        "synthetic": state.synthetic,
        "descendants": state.descendants,
        "pool": asdict(state.pool),
        "buffer": {"config": state.buffer.config.model_dump(mode="json"), "bins": bins},
    }


def _state(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> DeviceState:
    stored = facts["buffer"]
    embeddings = tensors["embeddings"].numpy() if stored["bins"] else ()
    bins = tuple(Kept(embedding=e, **b) for b, e in zip(stored["bins"], embeddings, strict=True))
    memory = {n.removeprefix(MEMORY): t.numpy() for n, t in tensors.items() if n.startswith(MEMORY)}
    pool = facts["pool"]
    return DeviceState(
        id=facts["id"],
        buffer=Buffer(SelectionConfig.model_validate(stored["config"]), bins, memory),
        pool=Pool(pool["capacity"], tuple((i, p) for i, p in pool["slots"]), pool["seen"]),
        personal=tensors["personal"],
        secret=facts["secret"],
        arrived=facts["arrived"],
        head=facts["head"],
        sent=tensors.get("sent"),
        asked=facts["asked"],
        replies=facts["replies"],
        annotations=facts["annotations"],
        synthetic=_pairs(facts["synthetic"]),
        descendants=_pairs(facts["descendants"]),
    )


def _pairs(stored: dict[str, list[Pair]]) -> dict[str, tuple[Pair, ...]]:
    return {identity: tuple((p, r) for p, r in made) for identity, made in stored.items()}
