"""The server's own settings."""

from __future__ import annotations

from pydantic import Field

from privacy.config import Config


class ServerConfig(Config):
    """How the server samples devices and applies the mean of their releases."""

    sampled_share: float = Field(1.0, gt=0, le=1, description="share of the devices asked in each round")
    learning_rate: float = Field(1.0, gt=0, description="factor on the mean of the releases")
    noise_bands: int = Field(
        1, ge=1, description="user-central: above 1, DP-FTRL's correlated noise; a device is asked every so many rounds"
    )
    reply_timeout_s: float = Field(3600, gt=0)
