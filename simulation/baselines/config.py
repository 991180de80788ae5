"""The settings of an experiment in which one personalised rival trains: its name and what is its own."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, field_validator, model_validator

from florilegium.privacy.common.base_config import Config
from florilegium.privacy.common.registry import HOW, check
from florilegium.simulation.config import ExperimentConfig

# of `simulation.baselines.registry`
NAMES = ("local", "fedavg", "fedprox", "ours", "ditto", "fedper", "fedrep", "feddpa", "fedalt")


class BaselineConfig(Config):
    """One rival. FedProx's μ is `shared.proximal`."""

    extensible: ClassVar = ("name",)

    name: str = Field("ours", description=f"{', '.join(NAMES)}, {HOW}")
    learning_rate: float = Field(3e-3, gt=0, description="of AdamW, for whatever is trained")
    steps: int = Field(8, ge=2, description="of a device in a round; who trains two adapters gives half to each")
    batch_size: int = Field(8, ge=1)
    ditto_lambda: float = Field(0.1, ge=0, description="Ditto's pull of each device's own model to the shared one")
    personal_share: float = Field(
        0.5, gt=0, lt=1, description="FedPer, FedRep: of the adapted layers, the last ones, that stay on the device"
    )
    mix: float = Field(
        0.5, ge=0, le=1, description="FedDPA: the local adapter's weight in training, and its largest for a query"
    )
    compared: int = Field(5, ge=1, description="FedDPA: own examples that a query is compared with")

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        return check(value, NAMES)

    @field_validator("steps")
    @classmethod
    def _has_halves(cls, value: int) -> int:
        if value % 2:
            raise ValueError("must be even: who trains two adapters gives half of the steps to each")
        return value


class BaselinesConfig(ExperimentConfig):
    """An experiment with a rival. What a run of [shared], [personal] and [synthesis] does besides is not done."""

    rival: BaselineConfig = BaselineConfig()

    @model_validator(mode="after")
    def _same_size(self) -> Self:
        if self.shared.adapter != self.personal.adapter:
            raise ValueError("shared.adapter and personal.adapter must be equal: rivals are compared at one size")
        factors = self.shared.adapter.factors
        if factors != "both":
            raise ValueError(f"shared.adapter.factors = {factors!r} must be 'both': rivals train all factors")
        return self

    @model_validator(mode="after")
    def _protected(self) -> Self:
        mode, name = self.privacy.mode, self.rival.name
        if mode not in ("none", "user-central"):
            raise ValueError(f"privacy.mode = {mode!r} must be 'none' or 'user-central': rivals clip whole changes")
        if mode != "none" and name == "fedalt":
            raise ValueError("rival.name = 'fedalt' uploads whole adapters, not changes, and has no noise; use 'none'")
        if self.data.users < 2:
            raise ValueError(f"data.users = {self.data.users} must be >= 2: rivals are federations")
        return self
