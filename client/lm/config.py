"""The settings of a language model and of its adapters."""

from __future__ import annotations

from datetime import date
from typing import Literal

from pydantic import Field, field_validator

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
    date: str = Field(
        "2026-01-01",
        pattern=r"^\d{4}-\d\d-\d\d$",
        description="what a chat template that asks for today is told, always: runs must not differ from day to day",
    )
    targets: tuple[str, ...] = Field((), description="endings of the linear layers to adapt; empty: all but the head")
    limits: TextLimits = TextLimits()
    max_batch_tokens: int = Field(0, ge=0, description="tokens in one pass; 0: what suits the device")
    checkpointing: bool = Field(False, description="compute activations twice instead of keeping them for learning")

    @field_validator("date")
    @classmethod
    def _a_day(cls, value: str) -> str:
        date.fromisoformat(value)
        return value


class AdapterConfig(Config):
    """The kind and the shape of an adapter."""

    kind: Literal["lora", "ia3", "prompt"] = "lora"
    rank: int = Field(8, ge=1, description="lora")
    alpha: float = Field(16.0, gt=0, description="lora")
    targets: tuple[str, ...] = Field((), description="lora: endings of the adapted linear layers' names; empty: all")
    factors: Trained = Field("both", description="lora")
    virtual_tokens: int = Field(8, ge=1, description="prompt: embeddings that stand before everything else")
    use_dora: bool = Field(False, description="refused: PEFT's name, so that whoever asks for it is told why")

    @field_validator("use_dora")
    @classmethod
    def _only_lora(cls, value: bool) -> bool:
        if value:
            raise ValueError("DoRA divides by norms over B A: no gradient of one example alone can be had; use LoRA")
        return value

    @field_validator("targets")
    @classmethod
    def _no_embedding(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        looked_up = [t for t in value if "embed" in t or t.endswith(("wte", "wpe"))]
        if looked_up:
            raise ValueError(
                f"{looked_up[0]} is an embedding: which of its rows change says which words were used, and the "
                f"tokens of one example are not separated there; name linear layers"
            )
        return value


class SamplingConfig(Config):
    """How replies are decoded."""

    max_new_tokens: int = Field(32, ge=1)
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
