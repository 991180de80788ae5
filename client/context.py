"""What a cohort of devices works with: the model, the settings, the layouts of the adapters, the ledger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from florilegium.client.calibration import sum_code
from florilegium.client.coins import Coins
from florilegium.client.config import DeviceConfig
from florilegium.client.lm.adapter import AdapterLayout, Adapters, Layout, weight_layout
from florilegium.client.lm.model import LanguageModel
from florilegium.client.state import DeviceState
from florilegium.privacy.encoding import ENCODINGS
from florilegium.privacy.ledger import Accounts, LedgerError
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.release import Schema
from florilegium.privacy.secure_aggregation.neighbours import holders
from florilegium.privacy.secure_aggregation.rounded_noise import SumCode
from florilegium.privacy.secure_aggregation.wire import reply_bytes
from florilegium.privacy.seeds import derive_seed


def full_rank(device: str) -> int:
    """The rank of the shared adapter that a device has room for; 0: that of the server's."""
    return 0


# (device, dialogue id) → this user's reply, or an `Echo`; empty where there is none yet
ReplyOf = Callable[[str, str], str]


@dataclass(frozen=True)
class CohortContext:
    """What a cohort works with: the model, the settings, the layouts, the seed and its users."""

    lm: LanguageModel
    config: DeviceConfig
    seed: int
    shared_layout: AdapterLayout
    personal_layout: Layout
    user: ReplyOf
    listener: Callable[[str], None] | None = None  # told the name of each phase that begins
    ledger: Accounts | None = None  # none where nothing is ever released
    experiment: str = "simulation"
    rank_of: Callable[[str], int] = full_rank
    coins: Coins = field(default_factory=Coins)
    personal_start: torch.Tensor | None = None  # (P,) that every device begins with; none: each with one of its own
    public_seed: int | None = None  # the same on all devices of a federation; none: `seed` is

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        config: DeviceConfig,
        seed: int,
        user: ReplyOf,
        listener: Callable[[str], None] | None = None,
        ledger: Accounts | None = None,
    ) -> CohortContext:
        shared = lm.lora_layout(config.shared.adapter, public_seed=derive_seed(seed, "shared"))
        return cls(lm, config, seed, shared, lm.layout(config.personal.adapter), user, listener, ledger)

    @cached_property
    def schema(self) -> Schema:
        """The arrays of a release: names and shapes."""
        return release_schema(self.shared_layout, self.config.shared.upload)

    def sum_code(self, number: int) -> SumCode:
        """How the rows that travel in a round become integers, the same on all devices."""
        seed = self.seed if self.public_seed is None else self.public_seed
        return sum_code(self.config, self.schema, number, seed)

    @property
    def accounts(self) -> Accounts:
        """The ledger; raises `LedgerError` where there is none to pay from."""
        if self.ledger is None:
            raise LedgerError("no ledger was given: nothing can be released")
        return self.ledger

    def shared_rows(self, received: torch.Tensor, devices: Sequence[str]) -> torch.Tensor:
        """What each device has room for of a received adapter: (1, P) where all have for all of it, else (K, P)."""
        row, ranks = received[None, : self.shared_layout.width], [self.rank_of(d) for d in devices]
        if not any(ranks):
            return row
        room = {rank: torch.from_numpy(self.whole.places(1, rank)) for rank in set(ranks)}
        return torch.cat([row * room[rank] for rank in ranks])

    def upload_bytes(self, device: str, plan: RoundPlan) -> int:
        """Bytes of one release on the wire; of a part of a sum, with all that a device says for its masks."""
        if self.config.privacy.distributed:
            return self.sum_code(plan.round).size_bytes + reply_bytes(holders(self.config.summed.limits))
        schema = self.schema.of_round(plan.round, self.rank_of(device))
        return ENCODINGS[schema.encoding].size_bytes(schema)

    def download_bytes(self, with_weights: bool) -> int:
        """Of a shared adapter, all of it, and of the changes of frozen weights beside it, if there are any."""
        return (self.whole.with_weights() if with_weights else self.whole).size_bytes

    @property
    def whole(self) -> Schema:
        """Of a shared adapter, all of it."""
        return replace(self.schema, turns=("",))

    def weights(self, received: torch.Tensor) -> list[Adapters]:
        """What a server sent beside the shared adapter to be added to the frozen weights, as an adapter, if it did."""
        layout, sent = self.shared_layout, received[self.shared_layout.width :]
        return [self.lm.adapters(weight_layout(layout), sent)] if len(sent) else []

    def new_state(self, device: str) -> DeviceState:
        """A device that has met nothing yet, with the adapter that it begins with."""
        personal = self.personal_start
        if personal is None:
            personal = self.personal_layout.start(derive_seed(self.seed, device, "personal"))
        return DeviceState.new(device, self.config, personal, self.coins.secret(device, self))


def release_schema(layout: AdapterLayout, encoding: str = "fp32") -> Schema:
    """The arrays that a release of this layout has: A and B of each layer, or one of them."""
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for layer in layout.layers:
        if layout.trains_a:
            shapes.append((f"{layer.name}.lora_A", (layout.rank, layer.in_features)))
        if layout.trains_b:
            shapes.append((f"{layer.name}.lora_B", (layer.out_features, layout.rank)))
    return Schema(tuple(shapes), ("lora_B", "lora_A") if layout.factors == "alternate" else ("",), encoding)
