"""The settings of a language model and of its adapters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from florilegium.privacy.common.base_config import Config, Names

SPELLINGS = {"fp32": "float32", "float": "float32", "bf16": "bfloat16"}
NO_FLOAT16 = (
    "what float16 cannot hold would have to be scaled before gradients are clipped one by one; "
    "use 'bfloat16', 'float32' or 'auto'"
)
NO_REMOTE_CODE = "no code that comes with a model is ever run; leave it out"
NO_DORA = "DoRA divides by norms over B A: no gradient of one example alone can be had; use LoRA"
NO_RSLORA = "LoRA's scale is alpha / rank here: for rsLoRA's alpha / √rank set alpha to alpha · √rank"
NO_DROPOUT = "adapters have no dropout here; leave it out"


def _all_linear(names: tuple[str, ...]) -> tuple[str, ...]:
    return () if names == ("all-linear",) else names  # PEFT's word for what is meant by none


Targets = Annotated[Names, AfterValidator(_all_linear)]

Trained = Literal["both", "b", "a", "alternate"]  # factors of a LoRA adapter


class TextLimits(Config):
    """How much of a text a model gets to see. One place, so that training and evaluation agree."""

    prompt_tokens: int = Field(64, ge=1, description="longer prompts lose their beginning")
    reply_tokens: int = Field(64, ge=1, description="longer replies lose their end")


class ModelConfig(Config):
    """Which language model, and how it reads."""

    name: str = Field("nano", description="nano, smollm2-135m, a hub id, a folder or a .gguf file")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 where it is fast")
    weights: Literal["float", "int8", "int4"] = Field(
        "float", description="of the frozen base's linear layers: as dtype says, or in 8 or 4 bits"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    chat_template: str = Field("", description="for a tokenizer that has none: plain, or a Jinja template")
    date: str = Field("2026-01-01", description="of the day that a chat template is told it is: the same in every run")
    targets: Targets = Field((), description="endings of the linear layers to adapt; empty: all but the head")
    limits: TextLimits = TextLimits()
    max_batch_tokens: int = Field(0, ge=0, description="tokens in one pass; 0: what suits the device")
    checkpointing: bool = Field(False, description="compute activations twice instead of keeping them for learning")
    elsewhere: ClassVar[Mapping[str, str]] = {
        "load_in_8bit": "weights",
        "load_in_4bit": "weights",
        "quantization": "weights",
        "quantization_config": "weights",
        "torch_dtype": "dtype",
        "trust_remote_code": NO_REMOTE_CODE,
    }

    @field_validator("dtype", mode="before")
    @classmethod
    def _is_a_type(cls, value: object) -> object:
        name = value.removeprefix("torch.") if isinstance(value, str) else value
        if name in ("float16", "fp16", "half"):
            raise ValueError(NO_FLOAT16)
        return SPELLINGS.get(name, name) if isinstance(name, str) else name

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, value: str) -> str:
        if value == "mps":
            raise ValueError("nothing here was tried on Apple's GPUs; use 'cpu'")
        if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", value):
            raise ValueError("must be 'auto', 'cpu', 'cuda' or, as an example, 'cuda:1'")
        return value

    @field_validator("date")
    @classmethod
    def _is_a_day(cls, value: str) -> str:
        try:
            date.fromisoformat(value)
        except ValueError:
            raise ValueError("must be a day, as '2026-01-31'") from None
        return value


class AdapterConfig(Config):
    """The kind and the shape of an adapter."""

    kind: Literal["lora", "ia3", "prompt"] = Field(
        "lora", description="LoRA's factors, factors on activations of (IA)³, or a soft prompt"
    )
    rank: int = Field(8, ge=1, description="lora")
    alpha: float = Field(16.0, gt=0, description="lora")
    targets: Targets = Field((), description="lora: endings of the adapted linear layers' names; empty: all")
    factors: Trained = Field("both", description="lora")
    virtual_tokens: int = Field(8, ge=1, description="prompt: embeddings that stand before everything else")
    elsewhere: ClassVar[Mapping[str, str]] = {
        "r": "rank",
        "lora_alpha": "alpha",
        "target_modules": "targets",
        "num_virtual_tokens": "virtual_tokens",
        "peft_type": "kind",
        "dropout": NO_DROPOUT,
        "lora_dropout": NO_DROPOUT,
        "rslora": NO_RSLORA,
        "use_rslora": NO_RSLORA,
        "dora": NO_DORA,
        "use_dora": NO_DORA,
        "bias": "no bias is trained here; leave it out",
        "task_type": "the task is always causal language modelling; leave it out",
        "modules_to_save": "no layer is trained as a whole here; leave it out",
    }

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

    max_new_tokens: int = Field(32, ge=1, description="after which a reply ends")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")


class ReplyConfig(SamplingConfig):
    """How replies are decoded where a person's adapters may be on (`client.lm.contrast`)."""

    contrast: float = Field(
        0.0, ge=0, description="strength of the contrast with the model without adapters (CoPe); 0: none"
    )
    plausible: float = Field(
        0.1, gt=0, le=1, description="contrast: of the likeliest token's chance, that another one must have"
    )

    @model_validator(mode="after")
    def _is_of_use(self) -> Self:
        if self.plausible != type(self).model_fields["plausible"].default and not self.contrast:
            raise ValueError(f"plausible = {self.plausible:g} without a contrast; set contrast above 0")
        return self
