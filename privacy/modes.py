"""The privacy of a device: what is protected, against whom, and how much may be spent.

These are the device's own limits. What a server asks for is checked against them and never changes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator

from florilegium.privacy.accounting import Adjacency
from florilegium.privacy.common.base_config import Config
from florilegium.privacy.ledger import Budget

Mode = Literal["example-local", "example-distributed", "user-local", "user-distributed", "user-central", "none"]
DISTRIBUTED: tuple[Mode, ...] = ("example-distributed", "user-distributed")


@dataclass(frozen=True, slots=True)
class PrivacyUnit:
    """What a mode promises, in the words that every report prints."""

    unit: str
    of: str  # what a budget belongs to: "dialogue" or "device"
    adjacency: Adjacency
    trust: str
    not_covered: str


TOGETHER = (
    "nobody is trusted alone: each device adds a share of the noise, and the server learns a sum of enough of them "
    "(secure aggregation), as long as no more devices than [secure_aggregation] names are in league with it"
)
PRIVACY_UNITS: dict[Mode, PrivacyUnit] = {
    "example-local": PrivacyUnit(
        unit="one dialogue (a prompt and its reply)",
        of="dialogue",
        adjacency="replace-one",
        trust="the server is not trusted: noise is added on the device",
        not_covered="what spans many dialogues; that, when and how fast a device answers",
    ),
    "example-distributed": PrivacyUnit(
        unit="one dialogue (a prompt and its reply)",
        of="dialogue",
        adjacency="replace-one",
        trust=TOGETHER,
        not_covered="what spans many dialogues; that, when and how fast a device answers",
    ),
    "user-local": PrivacyUnit(
        unit="one device: everything that its user ever said",
        of="device",
        adjacency="replace-one",
        trust="the server is not trusted: noise is added on the device",
        not_covered="that, when and how fast a device answers",
    ),
    "user-distributed": PrivacyUnit(
        unit="one device: everything that its user ever said",
        of="device",
        adjacency="add-or-remove-one",
        trust=TOGETHER,
        not_covered="that, when and how fast a device answers",
    ),
    "user-central": PrivacyUnit(
        unit="one device: everything that its user ever said",
        of="device",
        adjacency="add-or-remove-one",
        trust="the server is trusted: it sees each device's clipped change and adds the noise to the sum",
        not_covered="anything towards the server; that, when and how fast a device answers",
    ),
    "none": PrivacyUnit(
        unit="none",
        of="device",
        adjacency="replace-one",
        trust="no privacy: for simulation only",
        not_covered="everything: the releases carry no noise",
    ),
}


NOT_ACCOUNTED_BY = {
    "gdp": "approximates by a limit theorem and reports less than is spent",
    "rdp": "reports more than is spent, so that budget is wasted",
    "prv": "is the cross-check of florilegium audit, with an error of its own",
}


class PrivacyConfig(Config):
    """The budget of one device for the whole run and how its gradients are bounded."""

    mode: Mode = Field(
        "example-local", description="what is protected, a dialogue or a device, and where noise is added"
    )
    epsilon: float = Field(
        8.0, gt=0, le=100, description="of each dialogue, or in user-* of a device for its life; at `delta`"
    )
    delta: float = Field(
        1e-5, gt=0, lt=1, description="chance with which ε may not hold; below one by the number of what is protected"
    )
    accountant: str = Field("pld", description="what adds up ε: privacy loss distributions")
    clip_norm_l2: float = Field(1.0, gt=0, description="bound on a dialogue's gradient, or in user-* on a whole change")
    releases: int = Field(
        0, ge=0, description="that a dialogue, or in user-* a device, may be part of; then it is retired; 0: all rounds"
    )
    clips: Literal["dialogue", "change"] = Field(
        "dialogue",
        description="in `none` alone, as a control without noise; elsewhere what is clipped follows from mode",
    )
    secret: Literal["seed", "os"] = Field(
        "seed",
        description="where a device's secret, for noise and coins, comes from; seed: repeatable, simulation only",
    )

    @field_validator("accountant")
    @classmethod
    def _bounds_from_above(cls, value: str) -> str:
        if value != "pld":
            reason = NOT_ACCOUNTED_BY.get(value, "is not known")
            raise ValueError(f"{value} {reason}; 'pld' (privacy loss distributions) decides")
        return value

    @property
    def promise(self) -> PrivacyUnit:
        """What the mode protects, against whom."""
        return PRIVACY_UNITS[self.mode]

    @property
    def distributed(self) -> bool:
        """Whether devices add the noise together, and a server learns a sum of theirs alone."""
        return self.mode in DISTRIBUTED

    @property
    def seen_as_sums(self) -> bool:
        """Whether a promise is about a round's sum alone, whoever makes it, and not about each release."""
        return self.distributed or self.mode == "user-central"

    @property
    def by_dialogue(self) -> bool:
        """Whether each dialogue's gradient is clipped, in noisy steps, or a device's whole change."""
        return self.clips == "dialogue" if self.mode == "none" else self.promise.of == "dialogue"

    @property
    def budget(self) -> Budget:
        """What the ledger holds a device to; without end in `none`."""
        limit = math.inf if self.mode == "none" else self.epsilon
        in_sum = self.mode == "user-distributed"  # of the two modes of a real device, that which is not replace-one
        return Budget(limit, self.delta, self.promise.adjacency, self.promise.of, in_sum)
