"""A device's own settings. A server may ask; it cannot change them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from florilegium.client.lm.config import AdapterConfig, ModelConfig
from florilegium.client.selection.config import SelectionConfig
from florilegium.client.synthesize import SynthesisConfig
from florilegium.privacy.common.base_config import Config
from florilegium.privacy.modes import PrivacyConfig
from florilegium.privacy.secure_aggregation.config import SecureAggregationConfig, why_not_summed


class SharedConfig(Config):
    """How a device trains its copy of the shared adapter: DP-SGD on its uniform pool, or as `user-*` modes do."""

    adapter: AdapterConfig = AdapterConfig(rank=4, alpha=64, factors="b")
    source: Literal["pool", "buffer"] = Field("pool", description="buffer: what [selection] keeps; user-* modes only")
    pool_capacity: int = Field(64, ge=0, description="public; 0: nothing is kept for a shared adapter")
    sampling_rate: float = Field(0.5, gt=0, le=1, description="chance of each pool slot in each step; public")
    sampling: str = Field("poisson", description="what the accounting assumes and the device does")
    steps_per_round: int = Field(1, ge=1, description="public")
    synthetic: int = Field(0, ge=0, le=16, description="written of each dialogue of the pool; one example with it")
    learning_rate: float = Field(1.0, gt=0, description="of noisy SGD, where each dialogue is clipped")
    adamw_learning_rate: float = Field(3e-3, gt=0, description="of AdamW, where a device's whole change is clipped")
    batch_size: int = Field(8, ge=1, description="of AdamW")
    upload: Literal["fp32", "bf16", "int8"] = Field(
        "fp32", description="how a release travels; rounded after the noise"
    )
    proximal: float = Field(0.0, ge=0, description="FedProx's pull to the received adapter; of use with several steps")

    @field_validator("sampling")
    @classmethod
    def _as_accounted(cls, value: str) -> str:
        if value != "poisson":
            raise ValueError("must be 'poisson': shuffled or fixed batches accounted as Poisson overstate privacy")
        return value


class PersonalConfig(Config):
    """How a device trains the adapter that never leaves it."""

    adapter: AdapterConfig = AdapterConfig()
    learning_rate: float = Field(1e-3, gt=0, description="of AdamW")
    epochs: int = Field(1, ge=0, description="over originals and synthetic sets, each round")
    steps: int = Field(0, ge=0, description="of each round, on full batches, in place of epochs; 0: by epochs")
    batch_size: int = Field(8, ge=1, description="examples of a step")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    token_contrast: float = Field(
        0.0, ge=0, description="exponent of p_personal / p_base that a token weighs by (PerCE); 0: all weigh the same"
    )
    half_life: float = Field(
        0.0, ge=0, description="newer buffered dialogues after which one weighs half; 0: all weigh the same"
    )
    on_new_shared: Literal["keep", "retrain"] = Field("keep", description="what to do with it when the shared changes")


class DeviceConfig(Config):
    """Everything that one device is set to."""

    model: ModelConfig = ModelConfig()
    selection: SelectionConfig = SelectionConfig()
    synthesis: SynthesisConfig = SynthesisConfig()
    shared: SharedConfig = SharedConfig()
    personal: PersonalConfig = PersonalConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    secure_aggregation: SecureAggregationConfig = SecureAggregationConfig()
    rounds: int = Field(3, ge=1, description="releases that the budget is planned for")

    @property
    def summed(self) -> SecureAggregationConfig:
        """With numbers for what is left to the round. A device alone knows no others: it has to be told."""
        told = self.secure_aggregation
        return told.model_copy(update={"survivors": told.survivors or told.devices})

    @model_validator(mode="after")
    def _sums_fit(self) -> Self:
        secure, shared = self.secure_aggregation, self.shared
        if not self.privacy.distributed:
            if secure != SecureAggregationConfig():
                raise ValueError(f"[secure_aggregation] is for the *-distributed modes, not {self.privacy.mode!r}")
            return self
        if self.privacy.by_dialogue and shared.steps_per_round != 1:
            raise ValueError(
                f"shared.steps_per_round = {shared.steps_per_round} must be 1 in 'example-distributed': noise is added "
                f"to a sum over devices, and there is one in a round"
            )
        if shared.upload != "fp32":
            raise ValueError(
                f"shared.upload = {shared.upload!r} is of releases that are sent as they are; secure_aggregation.bits "
                f"says how numbers of a sum travel"
            )
        summed = self.summed
        if summed.devices and (why := why_not_summed(summed.devices, summed.survivors, summed.colluding)):
            raise ValueError(why)
        return self

    @model_validator(mode="after")
    def _uncoupled(self) -> Self:
        if self.shared.source == "buffer" and self.privacy.by_dialogue:
            raise ValueError(
                f"shared.source = 'buffer': what {self.selection.policy!r} keeps depends on the data, so that one "
                f"dialogue changes which others are trained on; use 'pool', or a user-* [privacy] mode"
            )
        pull = self.shared.learning_rate * self.shared.proximal
        if self.privacy.by_dialogue and pull > 1:
            raise ValueError(
                f"shared.proximal = {self.shared.proximal:g} times shared.learning_rate = "
                f"{self.shared.learning_rate:g} must be <= 1: a step of plain SGD would go beyond what was received"
            )
        if self.shared.adapter.kind != "lora":
            raise ValueError(f"shared.adapter.kind = {self.shared.adapter.kind!r}: what is shared is LoRA's factors")
        if self.personal.adapter.factors == "alternate":
            raise ValueError("personal.adapter.factors = 'alternate' is for a shared adapter; use 'both'")
        if self.shared.adapter.factors == "alternate" and not self.privacy.by_dialogue:
            raise ValueError("shared.adapter.factors = 'alternate' needs an example-* privacy.mode")
        return self
