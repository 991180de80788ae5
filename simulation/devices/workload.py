"""What a device will compute in a round, before it does: for packing, and for a simulated world's clock."""

from __future__ import annotations

from dataclasses import dataclass

from florilegium.client.config import DeviceConfig
from florilegium.simulation.data.population import User
from florilegium.simulation.heterogeneity.availability import trained_tokens

CHARACTERS_OF_A_TOKEN = 4


@dataclass(frozen=True)
class TokenWorkload:
    """Of one device in one round: those that are read or written, and those that each adapter is trained on."""

    read: float
    shared: float
    personal: float
    written: float

    @property
    def before(self) -> float:
        """Until the release, in trained tokens."""
        return trained_tokens(self.shared, self.read)

    @property
    def after(self) -> float:
        return trained_tokens(self.personal, self.written)


def planned_tokens(user: User, config: DeviceConfig) -> TokenWorkload:
    """The mean over the rounds; what is kept is taken to be full from the start."""
    limits, synthesis = config.model.limits, config.synthesis
    arriving = len(user.stream) / config.rounds
    characters = sum(len(d.prompt) + len(d.response) for d in user.stream) / max(1, len(user.stream))
    length = min(limits.prompt_tokens + limits.reply_tokens, characters / CHARACTERS_OF_A_TOKEN)
    kept = min(config.selection.bins, len(user.stream))
    shared = config.shared.steps_per_round * _examples_of_a_step(len(user.stream), config)
    sets = config.personal.epochs * kept * (1 + synthesis.per_dialogue)
    personal = config.personal.steps * config.personal.batch_size or sets
    written = min(kept, arriving) * synthesis.per_dialogue * synthesis.sampling.max_new_tokens
    return TokenWorkload(length * arriving, length * shared, length * personal, written)


def _examples_of_a_step(stream: int, config: DeviceConfig) -> float:
    """Of the shared adapter: a Poisson sample of the pool, or a batch of what the device trains on."""
    shared = config.shared
    if config.privacy.by_dialogue:
        return shared.sampling_rate * min(shared.pool_capacity, stream)
    return shared.batch_size if stream else 0
