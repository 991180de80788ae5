"""The privacy of a device: what is protected, against whom, and how much may be spent.

These are the device's own limits. What a server asks for is checked against them and never changes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from privacy.accounting import Adjacency
from privacy.config import Config

Mode = Literal["example-local", "none"]


@dataclass(frozen=True, slots=True)
class Promise:
    """What a mode promises, in the words that every report prints."""

    unit: str
    adjacency: Adjacency
    trust: str
    not_covered: str


PROMISES: dict[Mode, Promise] = {
    "example-local": Promise(
        unit="one dialogue (a prompt and its reply)",
        adjacency="replace-one",
        trust="the server is not trusted: noise is added on the device",
        not_covered="what spans many dialogues; that, when and how fast a device answers",
    ),
    "none": Promise(
        unit="none",
        adjacency="replace-one",
        trust="no privacy: for simulation only",
        not_covered="everything: the releases carry no noise",
    ),
}


class PrivacyConfig(Config):
    """The budget of one device for the whole run and how its gradients are bounded."""

    mode: Mode = "example-local"
    epsilon: float = Field(8.0, gt=0, description="for the whole run, at `delta`")
    delta: float = Field(1e-5, gt=0, lt=1)
    clip_norm_l2: float = Field(1.0, gt=0, description="bound on the gradient of one dialogue")
    secret: Literal["seed", "os"] = Field(
        "seed",
        description="where a device's secret, for noise and coins, comes from; seed: repeatable, simulation only",
    )

    @property
    def promise(self) -> Promise:
        return PROMISES[self.mode]
