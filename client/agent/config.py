"""The settings of a real device, by its owner."""

from __future__ import annotations

from pathlib import Path
from secrets import token_hex
from typing import Literal, Self

from pydantic import ByteSize, Field, model_validator

from florilegium.client.config import DeviceConfig, PersonalConfig, SharedConfig
from florilegium.client.lm.config import AdapterConfig, ModelConfig, ReplyConfig, TextLimits
from florilegium.client.lm.places import GGUF
from florilegium.client.personalization.acceptance import AcceptanceConfig
from florilegium.privacy.common.base_config import Config, PlainName
from florilegium.privacy.modes import PrivacyConfig

Consent = Literal["learn", "federate"]
CONSENTS: dict[Consent, str] = {
    "learn": "Learn from your conversations, on this device alone. They are kept here, encrypted; you can erase them.",
    "federate": "Join a federation: send noised changes of a shared adapter to its server, which also sees when this "
    "device answers. What was sent cannot be taken back.",
}
When = Literal["asked", "night", "charging"]


class GenerationConfig(Config):
    """What writes a device's replies."""

    backend: Literal["torch", "llamacpp"] = Field(
        "torch", description="PyTorch, which learns as well; or llama.cpp, for a .gguf model, with the extra `llamacpp`"
    )


class AgentConfig(Config):
    """What the device's owner has set. Of what a person says nothing is in it."""

    name: PlainName = Field(description="a random one; the only name that a server sees")
    key: Literal["file", "keyring"] = Field(
        "file", description="where the key of the store is: a file beside it, or the system's keyring"
    )
    device: DeviceConfig = DeviceConfig()
    chat: ReplyConfig = ReplyConfig(max_new_tokens=64)
    generation: GenerationConfig = GenerationConfig()
    context_turns: int = Field(2, ge=0, description="earlier turns of a conversation that a reply looks at")
    longest: int = Field(4000, ge=1, description="characters of a prompt or a correction")
    memory_limit: ByteSize = Field(ByteSize(0), ge=0, description="of the agent's process, as in '1GiB'; 0: none")
    recall: int = Field(
        0, ge=0, le=4, description="of its owner's earlier dialogues elsewhere, that a reply is shown; 0: none"
    )
    acceptance: AcceptanceConfig = AcceptanceConfig()
    keep: int = Field(5000, ge=1, description="dialogues; older ones that are not in the buffer or the pool go")
    learn: When = Field("asked", description="when the device learns by itself: never, at night, or when it charges")
    night: tuple[int, int] = Field((1, 5), description="hours of local time")
    port: int = Field(7070, ge=0, lt=65536, description="of the page on 127.0.0.1; 0: any that is free")

    @model_validator(mode="after")
    def _has_what_llamacpp_takes(self) -> Self:
        if self.generation.backend == "llamacpp":
            chosen = "generation.backend = 'llamacpp'"
            if Path(name := self.device.model.name).suffix.lower() != GGUF:
                raise ValueError(
                    f"{chosen} needs a .gguf file as device.model.name, not {name!r}; or set it to 'torch'"
                )
            if self.chat.contrast:
                raise ValueError(f"{chosen} has no contrast: set chat.contrast to 0, or take 'torch'")
            if (kind := self.device.personal.adapter.kind) != "lora":
                raise ValueError(
                    f"{chosen} knows LoRA alone, not device.personal.adapter.kind = {kind!r}; take 'torch'"
                )
        return self


def new_config(model: ModelConfig, key: Literal["file", "keyring"] = "file", memory_limit: int = 0) -> AgentConfig:
    """Settings of a new device: a shared adapter as in the quickstart, secrets from the operating system."""
    device = DeviceConfig(
        model=model.model_copy(update={"limits": TextLimits(prompt_tokens=192, reply_tokens=96)}),
        shared=SharedConfig(adapter=AdapterConfig(rank=4, alpha=64, factors="b", targets=("v_proj",))),
        personal=PersonalConfig(epochs=3),
        privacy=PrivacyConfig(secret="os"),
    )
    name = f"device-{token_hex(8)}"
    return AgentConfig(name=name, key=key, device=device, memory_limit=ByteSize(memory_limit))
