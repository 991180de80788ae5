"""What a federation asks of a device, in a file that its server gives out and a device's owner reads before joining."""

from __future__ import annotations

import json
import tomllib
from hashlib import sha256
from pathlib import Path
from typing import Self

import tomli_w
from pydantic import Field, model_validator

from florilegium.client.agent.distributed_terms import DistributedTerms
from florilegium.client.agent.errors import DeviceError
from florilegium.client.agent.registration import Registration
from florilegium.client.config import DeviceConfig, SharedConfig
from florilegium.client.lm.config import AdapterConfig
from florilegium.privacy.common.base_config import Config, PlainName

LARGEST_FILE = 2**16  # bytes


class Terms(Config):
    """All public. A device's budget, its noise and its clipping are its owner's, but in `distributed`."""

    name: PlainName
    model: str = Field("nano", max_length=256, description="whose layers the shared adapter is for")
    base: str = Field("", max_length=64, description="SHA-256 of the model's weights")
    operator: str = Field("", pattern=r"^([0-9a-f]{64})?$", description="public half of the key that signs questions")
    rounds: int = Field(3, ge=1, le=10_000)
    seed: int = Field(0, ge=0, description="of the shared adapter's start, and of who is asked in a round")
    shared: SharedConfig = SharedConfig(adapter=AdapterConfig(rank=4, alpha=64, factors="b", targets=("v_proj",)))
    fraction: float = Field(1.0, gt=0, le=1, description="of the devices, asked in each round; min_devices at least")
    min_devices: int = Field(1, ge=1, description="releases below which a round is not aggregated")
    largest_norm_l2: float = Field(0.0, ge=0, description="above which a release is refused; 0: none is")
    patience_s: float = Field(600.0, gt=0, description="for the answers of a round, or of a step of one")
    distributed: DistributedTerms | None = Field(None, description="where devices add the noise of a sum together")

    @model_validator(mode="after")
    def _sums_fit(self) -> Self:
        told = self.distributed
        if told and told.registrar == self.operator:
            raise ValueError(
                "distributed.registrar is the operator's own key: whoever asks devices must not invent them"
            )
        if told and self.largest_norm_l2:
            raise ValueError("largest_norm_l2 has no effect on sums: nobody sees what a device gives to one")
        if told and not told.survivors <= self.min_devices <= told.devices:
            raise ValueError(
                f"min_devices = {self.min_devices} must be from {told.survivors} survivors to {told.devices} devices "
                f"of a sum: with so many a round begins"
            )
        return self

    @property
    def fewest(self) -> int:
        """Releases that a round is aggregated of at least; in a sum fewer may come through than it begins with."""
        return self.distributed.survivors if self.distributed else self.min_devices

    @property
    def federation(self) -> str:
        """The name and a hash of all that is agreed: in whatever devices sign and derive for each other."""
        told = json.dumps(self.model_dump(mode="json", exclude_none=True), sort_keys=True)
        return f"{self.name}:{sha256(told.encode()).hexdigest()}"


class Membership(Config):
    """A federation that a device has joined, and what its owner has agreed to there."""

    name: PlainName
    server: str = Field("", description="host:port")
    rounds: int = Field(ge=1)
    public_seed: int = Field(ge=0, description="of the shared adapter's start, the same on all its devices")
    shared: SharedConfig = Field(description="in place of the device's own while it is in")
    operator: str = Field("", description="as in `Terms`; without one no question is answered")
    largest_norm_l2: float = Field(0.0, ge=0, description="as in `Terms`: what is longer is neither paid for nor sent")
    federation: str = Field("", description="as in `Terms`, whose hash it was when the device joined")
    distributed: DistributedTerms | None = Field(None, description="as in `Terms`")
    registration: Registration | None = Field(None, description="of this device, where there are sums")

    @classmethod
    def of(cls, terms: Terms, server: str = "", registration: Registration | None = None) -> Membership:
        return cls(
            name=terms.name, server=server, rounds=terms.rounds, public_seed=terms.seed, shared=terms.shared,
            operator=terms.operator, largest_norm_l2=terms.largest_norm_l2, federation=terms.federation,
            distributed=terms.distributed, registration=registration,
        )  # fmt: skip

    def settings(self, device: DeviceConfig) -> DeviceConfig:
        """The device's own, where the federation's terms do not say otherwise. Raises ValueError."""
        told: dict[str, object] = {"rounds": self.rounds, "shared": self.shared.model_dump(mode="json")}
        if self.distributed:
            told |= self.distributed.sections(device.privacy)
        return DeviceConfig.model_validate(device.model_dump(mode="json") | told)


def read_terms(path: Path) -> Terms:
    """Raises `DeviceError` for a file that is not one."""
    try:
        return Terms.model_validate(tomllib.loads(_beginning(path).decode("utf-8-sig")))
    except (OSError, ValueError, RecursionError) as error:
        raise DeviceError(f"{path} is not the terms of a federation: {error}") from None


def _beginning(path: Path) -> bytes:
    """All of a file; raises ValueError for one that is longer than terms are, without reading on."""
    with open(path, "rb") as file:
        written = file.read(LARGEST_FILE + 1)
    if len(written) > LARGEST_FILE:
        raise ValueError(f"it is longer than {LARGEST_FILE:,} bytes")
    return written


def write_terms(path: Path, terms: Terms) -> None:
    path.write_text(tomli_w.dumps(terms.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
