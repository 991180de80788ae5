"""The settings of a method of personalisation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from client.lm.config import AdapterConfig
from client.personal.retrieve import Retriever
from privacy.config import Config

Name = Literal["base", "oppu", "pooled", "pplug", "kgt", "per-pcs", "rpo"]


class TrainingConfig(Config):
    """How an adapter is trained on one person's examples."""

    epochs: int = Field(2, ge=0)
    batch_size: int = Field(16, ge=1)
    learning_rate: float = Field(1e-3, gt=0)


class PreferenceConfig(Config):
    """Of learning from what a person prefers (`rpo`)."""

    beta: float = Field(0.1, gt=0)
    temperature: float = Field(0.5, gt=0, description="of the nearness of prompts that weighs a pair")
    nll_weight: float = Field(1.0, ge=0, description="of the chosen replies' loss beside that of the pairs")


class MethodConfig(Config):
    """What a prompt is given of the history, and what is trained on it."""

    name: Name = Field("base", description="a method of `client.personal.table`")
    retrieve: int = Field(0, ge=0, description="items of the history in a prompt")
    retriever: Retriever = "bm25"
    profile: bool = Field(False, description="the local model's summary of the person in front of a prompt")
    adapter: AdapterConfig = AdapterConfig(rank=8, alpha=8, targets=("q_proj", "v_proj"))
    training: TrainingConfig = TrainingConfig()
    preference: PreferenceConfig = PreferenceConfig()
