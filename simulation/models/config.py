"""The settings of `florilegium models pretrain`, and those of a model alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from florilegium.client.lm.config import ModelConfig
from florilegium.privacy.common.base_config import Config, Names
from florilegium.simulation.settings import section_tree, validate


class ModelShape(Config):
    """The architecture; the defaults are `nano`'s."""

    vocab_size: int = Field(4096, ge=300, le=65_535, description="of the tokenizer that is trained first")
    hidden_size: int = Field(192, ge=16, description="width of the hidden states")
    layers: int = Field(4, ge=1, description="of the transformer")
    heads: int = Field(3, ge=1, description="of attention")
    intermediate_size: int = Field(512, ge=16, description="width within the feed-forward layers")
    context: int = Field(512, ge=64, description="positions that the model is made for")


class PretrainConfig(Config):
    """How a small model is trained. Lengths and batches are in tokens."""

    out: Path = Field(description="folder that the model is written to")
    corpora: Names = Field(
        ("self_dialogue", "ubuntu_irc", "sgd", "topicalchat"), description="data sets that it is trained on"
    )
    model: ModelShape = ModelShape()
    tokens: int = Field(44_000_000, ge=10_000, description="tokens seen in all")
    window: int = Field(256, ge=32, description="of a training example")
    batch_tokens: int = Field(8192, ge=256, description="of a step")
    learning_rate: float = Field(2.5e-3, gt=0, description="the highest")
    warmup_share: float = Field(0.02, ge=0, lt=1, description="first part of the run in which the rate rises")
    decay_share: float = Field(0.35, ge=0, le=1, description="last part of the run in which the rate falls to 0")
    weight_decay: float = Field(0.1, ge=0, description="of matrices")
    rewrite_share: float = Field(0.06, ge=0, lt=1, description="share of turns that also become a rewriting exercise")
    rewrite_instruction: str = Field("Rewrite: ", description="in front of a turn that is to be rewritten")
    held_out: int = Field(400, ge=1, description="conversations kept for the final loss")
    checkpoint_every_s: float = Field(120, gt=0, description="seconds after which the run is stored")
    compile: bool = Field(False, description="by torch.compile")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    seed: int = Field(0, description="of weights and of what is drawn")


def model_config(name: str, overrides: Sequence[str] = ()) -> ModelConfig:
    """The settings of a model alone; in `overrides` they may stand as in a run's config, with `model.` before."""
    return validate(ModelConfig, section_tree("model", name, overrides), f"model {name}")
