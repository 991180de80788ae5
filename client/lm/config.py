"""The settings of a language model and of its adapters."""

from __future__ import annotations

from pydantic import Field

from client.lm.adapter import Trained
from privacy.config import Config


class TextLimits(Config):
    """How much of a text a model gets to see. One place, so that training and evaluation agree."""

    prompt_tokens: int = Field(64, ge=1, description="longer prompts lose their beginning")
    reply_tokens: int = Field(64, ge=1, description="longer replies lose their end")


class ModelConfig(Config):
    """Which language model, and how it reads."""

    name: str = Field("nano", description="nano, smollm2-135m, a hub id or a folder")
    dtype: str = Field("auto", pattern="^(auto|float32|bfloat16)$", description="auto: bfloat16 where it is fast")
    device: str = Field("auto", pattern="^(auto|cpu|cuda(:[0-9]+)?)$")
    chat_template: str = Field("", description="for a tokenizer that has none: plain, or a Jinja template")
    targets: tuple[str, ...] = Field((), description="endings of the linear layers to adapt; empty: all but the head")
    limits: TextLimits = TextLimits()
    max_batch_tokens: int = Field(0, ge=0, description="tokens in one pass; 0: what suits the device")


class AdapterConfig(Config):
    """The shape of a LoRA adapter."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    targets: tuple[str, ...] = Field((), description="endings of the adapted linear layers' names; empty: all")
    factors: Trained = "both"


class SamplingConfig(Config):
    """How replies are decoded."""

    max_new_tokens: int = Field(32, ge=1)
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
