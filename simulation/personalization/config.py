"""The settings of one method on one task."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from florilegium.client.lm.config import AdapterConfig, ModelConfig, SamplingConfig
from florilegium.client.personalization.config import AslsConfig, MethodConfig, TrainingConfig
from florilegium.privacy.common.base_config import Config
from florilegium.simulation.data.population import DataConfig
from florilegium.simulation.tasks.benchmarks import BENCHMARKS
from florilegium.simulation.tasks.config import TaskConfig
from florilegium.simulation.tasks.stand_ins import stand_in

Part = Literal["all", "near", "far"]
ON_LORA = ("pplug", "tap-per", "per-pcs", "core", "hypernet", "hypernet-start", "userip")


class TaskStageConfig(Config):
    """Stage 1: the base is adapted to the task by the pool, in the method's prompts."""

    enabled: bool = Field(True, description="false: the base answers as it is")
    adapter: AdapterConfig = AdapterConfig(rank=8, alpha=8, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
    training: TrainingConfig = TrainingConfig(epochs=3)


class HistoryConfig(Config):
    """What of a history a method gets: OPPU's studies of behaviour shift, activity and format."""

    part: Part = Field("all", description="near, far: the half that BM25 finds nearest to the questions, or the other")
    most: int = Field(0, ge=0, description="items, the newest; 0: all")
    labels: bool = Field(True, description="false: an item's text alone, neither its label nor the task's wording")


class UserConfig(Config):
    """The simulated user."""

    accepts: float = Field(0.2, ge=0, le=1, description="ROUGE-1 from which a reply will do")
    slips: float = Field(0.1, ge=0, lt=0.5, description="chance of the other answer")
    corrects: float = Field(0.5, ge=0, le=1, description="chance that a rejected reply is corrected")


class ReptileConfig(Config):
    """A start from which few steps lead far (Reptile, Nichol et al. 2018, arXiv 1803.02999)."""

    rounds: int = Field(10, ge=1, description="of people who train from where the start is")
    people: int = Field(8, ge=1, description="in a round")
    steps: int = Field(4, ge=1, description="of each, from where the start is")
    batch_size: int = Field(4, ge=1, description="examples of a step")
    rate: float = Field(2e-3, gt=0, description="of AdamW")
    outer: float = Field(0.5, gt=0, description="ε: how far the start follows the mean of where they got to")


class InteractiveConfig(Config):
    """People who talk with their devices, one interaction after the other."""

    name: str = Field("lives", description="of the study's folder")
    seed: int = Field(0, ge=0, description="of all that is drawn")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    adapter: AdapterConfig = AdapterConfig(rank=4, alpha=8)
    asls: AslsConfig = AslsConfig()
    user: UserConfig = UserConfig()
    interactions: int = Field(48, ge=2, description="of a person with the device")
    start: Literal["new", "shared", "reptile"] = Field(
        "new",
        description="beneath a new adapter nothing, or one that others have trained; or it begins where they lead",
    )
    others: int = Field(16, ge=1, description="people whom the shared adapter, or the start, is made by")
    reptile: ReptileConfig = ReptileConfig()
    shift: Literal["none", "person", "domain"] = Field(
        "none", description="half way another person goes on, or the person's second domain comes"
    )
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=16)

    @property
    def reading(self) -> str:
        """What is read off the base's hidden states."""
        return "mean"

    @model_validator(mode="after")
    def _two_halves(self) -> Self:
        if self.shift != "none" and self.interactions % 2:
            raise ValueError(f"interactions = {self.interactions} must be even where the stream shifts half way")
        if self.shift == "person" and self.data.users < 2:
            raise ValueError("data.users = 1 must be >= 2 where another person goes on")
        return self


class MethodsConfig(Config):
    """A model, a task and a method."""

    name: str = Field("methods", description="of the study's folder")
    seed: int = Field(0, ge=0, description="of all that is drawn")
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    task_stage: TaskStageConfig = TaskStageConfig()
    history: HistoryConfig = HistoryConfig()
    method: MethodConfig = MethodConfig()
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=16)

    @property
    def reading(self) -> str:
        """What is read off the base's hidden states."""
        return "mean"

    @model_validator(mode="after")
    def _known_to_the_model(self) -> Self:
        made = None if self.task.name in BENCHMARKS else stand_in(self.task.name)
        if self.model.name == "nano" and made and made.seen_by_nano:
            raise ValueError(f"task.name = {made.task.name!r}: nano was trained on such texts; use smollm2-135m")
        retrieving = self.method.retrieve or self.method.profile
        if self.method.name in ("pplug", "tap-per", "kgt") and retrieving:
            raise ValueError(f"method.name = {self.method.name!r} has its own prompts: retrieve = 0, profile = false")
        kinds = {"method.adapter": self.method.adapter.kind, "task_stage.adapter": self.task_stage.adapter.kind}
        for place, kind in kinds.items():
            if self.method.name in ON_LORA and kind != "lora":
                raise ValueError(f"method.name = {self.method.name!r} needs {place}.kind = 'lora', not {kind!r}")
        if self.method.name == "dpl" and self.method.profile:
            raise ValueError("method.name = 'dpl' makes a profile of its own: profile = false")
        if self.method.name == "aloe" and not (self.method.retrieve and self.method.retriever == "recent"):
            raise ValueError("method.name = 'aloe' goes by the turns before: retrieve >= 1, retriever = 'recent'")
        return self
