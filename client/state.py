"""What a device remembers between rounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from florilegium.client.config import DeviceConfig
from florilegium.client.pool import Pool
from florilegium.client.selection.buffer import Buffer
from florilegium.client.selection.entry import BufferEntry
from florilegium.client.synthesize import Pair
from florilegium.privacy.common.errors import DeviceFaultError
from florilegium.privacy.seeds import derive_key

if TYPE_CHECKING:
    import torch


class StateError(DeviceFaultError):
    """A device's state is missing or does not fit the settings."""


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
    echoes: frozenset[str] = frozenset()  # those of `replies` that are the model's words, which the user liked
    annotations: int = 0  # times the user was asked
    synthetic: dict[str, tuple[Pair, ...]] = field(default_factory=dict)  # dialogue id → those made from it
    pool_synthetic: dict[str, tuple[Pair, ...]] = field(default_factory=dict)  # as `synthetic`, of the pool's dialogues
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
    def own(self) -> dict[str, str]:
        """The replies in the user's own words: what the shared adapter can learn from.

        What the model said holds what it had learned from and what stood before it: other dialogues than that one.
        """
        return {i: reply for i, reply in self.replies.items() if i not in self.echoes}

    @property
    def annotated(self) -> tuple[BufferEntry, ...]:
        """The bins whose reply is known: what the personal adapter can learn from."""
        return tuple(k for k in self.buffer.bins if k.id in self.replies)


def stage(round_number: int, phase: str = "z-done") -> str:
    """The name of a stage; `stage(r)` is the end of round r and sorts after its other phases."""
    return f"{round_number:05d}-{phase}"


States = list[DeviceState]
