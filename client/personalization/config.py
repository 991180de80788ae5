"""The settings of a method of personalisation."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from florilegium.client.lm.config import AdapterConfig
from florilegium.privacy.common.base_config import Config
from florilegium.privacy.common.registry import check

NAMES = (
    "base", "oppu", "pooled", "pplug", "kgt", "per-pcs", "rpo", "hydra", "dpcml", "steerable", "core", "hypernet",
    "hypernet-start", "tap-per", "userip", "dpl", "aloe",
)  # fmt: skip
OWN_PROMPTS = ("kgt", "dpl")  # those that write other prompts than `base` does with the same settings
Retriever = Literal["bm25", "dense", "recent", "random"]
ArmName = Literal[
    "full", "with-words", "adaptation-only", "profiling-only", "summary", "no-retuning", "no-feedback",
    "random-sampling", "none",
]  # fmt: skip


class TrainingConfig(Config):
    """How an adapter is trained on one person's examples."""

    epochs: int = Field(2, ge=0, description="over a person's examples")
    batch_size: int = Field(16, ge=1, description="examples of a step")
    learning_rate: float = Field(1e-3, gt=0, description="of AdamW")


class PreferenceConfig(Config):
    """Of learning from what a person prefers (`rpo`)."""

    beta: float = Field(0.1, gt=0, description="how sharply a pair tells the chosen from the rejected reply")
    temperature: float = Field(0.5, gt=0, description="of the nearness of prompts that weighs a pair")
    nll_weight: float = Field(1.0, ge=0, description="of the chosen replies' loss beside that of the pairs")


class MethodConfig(Config):
    """What a prompt is given of the history, and what is trained on it."""

    extensible: ClassVar = {"name": NAMES}

    name: str = Field("base", description="what is made of a history; base: nothing")
    retrieve: int = Field(0, ge=0, description="items of the history in a prompt")
    retriever: Retriever = Field("bm25", description="what finds the items of the history for a prompt")
    profile: bool = Field(False, description="the local model's summary of the person in front of a prompt")
    adapter: AdapterConfig = AdapterConfig(rank=8, alpha=8, targets=("q_proj", "v_proj"))
    training: TrainingConfig = TrainingConfig()
    preference: PreferenceConfig = PreferenceConfig()

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        return check(value, NAMES, type)


class ProfileConfig(Config):
    """How interests are kept."""

    interests: int = Field(12, ge=1, description="at most")
    same: float = Field(
        0.8, gt=0, le=1, description="cosine from which a text belongs to an interest; with nano one in four does"
    )
    half_life: float = Field(30, gt=0, description="interactions after which an interest that does not return is half")
    feedback_rate: float = Field(0.3, gt=0, le=1, description="of the moving average of feedback")


class AslsConfig(Config):
    """The two layers. `arm` leaves parts out, as the paper's ablation does.

    A profile alone would change nothing: in `profiling-only` its words stand in front of prompts, in `summary` a
    sentence that the model makes of them, in `with-words` the words beside all that `full` does. `no-feedback` takes
    every reply that was said as it is, as if nobody had told what they thought of it.
    """

    arm: ArmName = Field("full", description="all of it, or what is left out")
    profile: ProfileConfig = ProfileConfig()
    drift: float = Field(
        0.015, ge=0, le=2, description="of the profile's vector since it last adapted; with nano one in ten is beyond"
    )
    fresh: int = Field(4, ge=1, description="interactions with feedback that have not been learned from")
    window: int = Field(16, ge=1, description="interactions that are kept")
    examples: int = Field(8, ge=1, description="of the window, that are adapted on")
    steps: int = Field(2, ge=1, description="of an adaptation")
    rate: float = Field(1e-3, gt=0, description="of a step, before boost and decay")
    boost: float = Field(1.0, ge=0, description="of the rate by how far the profile has drifted")
    decay: float = Field(0.05, ge=0, description="of the rate with each adaptation")
    beta: float = Field(0.1, gt=0, description="of the preference term")
    preference: float = Field(0.5, ge=0, description="weight of the preference term")

    @property
    def profiles(self) -> bool:
        return self.arm not in ("adaptation-only", "none")

    @property
    def adapts(self) -> bool:
        return self.arm not in ("profiling-only", "summary", "none")
