"""What a federation fixes for all of its devices where they add the noise together: whatever ε depends on.

A device's noise is a share of what a sum needs; the other shares are added by others. So mode, noise, clipping and the
numbers of devices are the same on all of them, and stand in the terms, whose hash is in all that devices sign and
derive: who was told of others is not understood. Not covered: whether an owner agrees (`client.agent.acceptance`).
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from florilegium.privacy.common.base_config import Config
from florilegium.privacy.modes import PrivacyConfig
from florilegium.privacy.secure_aggregation.config import why_not_summed
from florilegium.privacy.secure_aggregation.neighbours import COMPLETE, LEAST, SumLimits
from florilegium.privacy.secure_aggregation.rounded_noise import LEAST_BITS, MOST_BITS

HEX_KEY = r"^[0-9a-f]{64}$"


class DistributedTerms(Config):
    """All public. With them a device's own [privacy] and [secure_aggregation] are limits: no terms go beyond."""

    mode: Literal["user-distributed", "example-distributed"]
    registrar: str = Field(pattern=HEX_KEY, description="public half of the key that says which devices there are")
    epsilon: float = Field(gt=0, le=100, description="over all rounds, of what `mode` protects; at `delta`")
    delta: float = Field(gt=0, lt=1)
    noise_multiplier: float = Field(gt=0, le=1000, description="σ of a round's sum, which `epsilon` needs")
    clip_norm_l2: float = Field(ge=1e-6, le=1e3)
    releases: int = Field(0, ge=0, description="as privacy.releases")
    devices: int = Field(ge=LEAST, le=COMPLETE, description="in one sum at most: up to so many all know all")
    survivors: int = Field(ge=LEAST, le=COMPLETE, description="below which nothing is unmasked")
    colluding: int = Field(0, ge=0, description="devices whose noise counts for nothing")
    bits: int = Field(ge=LEAST_BITS, le=MOST_BITS, description="of a number on its way; sums are modulo 2^bits")

    @model_validator(mode="after")
    def _can_be_summed(self) -> Self:
        if why := why_not_summed(self.devices, self.survivors, self.colluding):
            raise ValueError(why)
        return self

    @property
    def limits(self) -> SumLimits:
        """As numbers alone."""
        return SumLimits(self.devices, self.survivors, self.colluding)

    def sections(self, privacy: PrivacyConfig) -> dict[str, object]:
        """The sections of a device's settings that these terms fix."""
        fixed = {"mode", "epsilon", "delta", "clip_norm_l2", "releases"}
        summed = {"devices", "survivors", "colluding", "bits"}
        return {
            "privacy": privacy.model_dump(mode="json") | self.model_dump(mode="json", include=fixed),
            "secure_aggregation": self.model_dump(mode="json", include=summed),
        }
