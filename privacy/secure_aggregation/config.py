"""How many devices a sum is of, and what of them is counted on."""

from __future__ import annotations

from pydantic import Field

from florilegium.privacy.common.base_config import Config
from florilegium.privacy.secure_aggregation.neighbours import LEAST, SumLimits, reach
from florilegium.privacy.secure_aggregation.rounded_noise import LEAST_BITS, MOST_BITS


class SecureAggregationConfig(Config):
    """Of the `*-distributed` modes of [privacy]; a device's own limits, whatever a server says."""

    devices: int = Field(0, ge=0, le=100_000, description="in one sum at most; 0: all that a round asks")
    survivors: int = Field(
        0, ge=0, le=100_000, description="below which no sum is unmasked; their noise alone is enough; 0: all"
    )
    colluding: int = Field(
        0, ge=0, description="devices whose secrets the server may know; their noise counts for nothing"
    )
    bits: int = Field(
        0,
        ge=0,
        le=MOST_BITS,
        description=f"of a number on its way, {LEAST_BITS} to {MOST_BITS}; 0: the fewest that hold a sum",
    )

    @property
    def limits(self) -> SumLimits:
        """As numbers alone."""
        return SumLimits(self.devices, self.survivors, self.colluding)


def why_not_summed(devices: int, survivors: int, colluding: int) -> str:
    """What is wrong with these numbers, in a sentence; empty where nothing is."""
    told = f"secure_aggregation: {survivors:,} survivors of {devices:,} devices, {colluding:,} of them colluding"
    if not LEAST <= survivors <= devices:
        return f"{told}: survivors must be {LEAST} at least, and not more than the devices of a round"
    if colluding + LEAST > survivors:
        return f"{told}: of those who survive {LEAST} must be honest at least"
    complete = SumLimits(devices, survivors, colluding).complete
    degree, against = (devices - 1, colluding) if complete else reach(devices, survivors, colluding)
    needed = (degree + 1 + against) // 2 + 1
    if needed > (survivors if degree + 1 == devices else degree + 1):
        return f"{told}: more than half of those who do not collude must survive, {needed:,}, or two sums could be had"
    return ""
