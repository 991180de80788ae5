"""The server's own settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from florilegium.privacy.common.base_config import Config
from florilegium.privacy.common.registry import ExtensionError, check, looked_at
from florilegium.server.aggregation import RULES, new_rule
from florilegium.server.optimizers import OPTIMIZERS, new_optimizer


class ServerConfig(Config):
    """How the server samples devices and what it makes of their releases."""

    extensible: ClassVar = {"rule": RULES, "optimizer": OPTIMIZERS}

    sampled_share: float = Field(1.0, gt=0, le=1, description="share of the devices asked in each round")
    rule: str = Field(
        "mean", description="what a round's releases become; none: devices learn alone and release nothing"
    )
    trimmed_share: float = Field(0.1, ge=0, lt=0.5, description="trimmed-mean: of the releases, at both ends")
    byzantine: int = Field(0, ge=0, description="krum: releases of a round that may be false")
    krum_keep: int = Field(1, ge=1, description="krum: releases that are averaged")
    optimizer: str = Field("fedavg", description="what that change does to the shared adapter")
    learning_rate: float = Field(1.0, gt=0, description="factor on the change, or of the optimizer")
    momentum: float = Field(0.9, ge=0, lt=1, description="of fedavgm; beta 1 of fedadam and fedyogi")
    beta_2: float = Field(0.99, ge=0, lt=1, description="fedadam, fedyogi")
    tau: float = Field(1e-3, gt=0, description="fedadam, fedyogi: what keeps a step finite")
    products: Literal["average", "residual", "stack"] = Field(
        "average", description="of A and B, averaged apart: FedEx's residual or FLoRA's stack make their product exact"
    )
    buffer: int = Field(0, ge=0, description="FedBuff: releases that make a version, whenever they come; 0: by rounds")
    concurrency: int = Field(0, ge=0, description="FedBuff: devices at work at one time")
    noise_bands: int = Field(
        1, ge=1, description="user-central: above 1, DP-FTRL's correlated noise; a device is asked every so many rounds"
    )
    reply_timeout_s: float = Field(3600, gt=0, description="with nodes of Flower's; cohorts are waited for")

    @property
    def absent(self) -> bool:
        """Whether devices learn without any server."""
        return self.rule == "none"

    @property
    def by_rounds(self) -> bool:
        """Whether devices are asked round by round."""
        return not (self.buffer or self.absent)

    @property
    def sums(self) -> bool:
        """Whether a round's releases become a sum by a number: then noise on the sum protects them."""
        return not self.absent and (looked_at(self.rule) or new_rule(self.rule, 1, self).is_sum)

    @property
    def least_releases(self) -> int:
        """Below which a round's rule is not what it is called: krum may keep a false release, nothing is trimmed."""
        return 1 if looked_at(self.rule) else new_rule(self.rule, 1, self).least_releases

    def wanted(self, devices: int) -> int:
        """How many releases a round is to have, of so many devices."""
        return max(1, round(self.sampled_share * devices))

    @field_validator("rule")
    @classmethod
    def _is_a_rule(cls, value: str) -> str:
        return check(value, RULES, Callable)

    @field_validator("optimizer")
    @classmethod
    def _is_an_optimizer(cls, value: str) -> str:
        return check(value, OPTIMIZERS, Callable)

    @model_validator(mode="after")
    def _are_made(self) -> Self:
        """An extension that gives something else is told of now."""
        try:
            if not looked_at(self.rule):
                new_rule(self.rule, 1, self)
            if not looked_at(self.optimizer):
                new_optimizer(self.optimizer, self)
        except ExtensionError as error:
            raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def _combine(self) -> Self:
        if self.buffer and not self.sums:
            raise ValueError(f"server.rule = {self.rule!r} judges a round's releases together; server.buffer has none")
        if self.buffer and not self.concurrency:
            raise ValueError("server.buffer needs server.concurrency: how many devices are at work at one time")
        if self.buffer and self.products != "average":
            raise ValueError(
                f"server.products = {self.products!r} needs releases of one version; server.buffer has many"
            )
        if self.products != "average" and (self.rule, self.optimizer) != ("mean", "fedavg"):
            raise ValueError(f"server.products = {self.products!r} needs rule = 'mean' and optimizer = 'fedavg'")
        return self


def devices_to_ask(wanted: int, over_sampling: float) -> int:
    """⌈over_sampling · wanted⌉; that 1.1 · 10 is above 11 in floating point asks nobody more."""
    return math.ceil(over_sampling * wanted - 1e-9)
