"""What chance decides of a release: a device's secret, whom each step draws, and the key of the noise.

A seam of its own, so that an audit can write down what a real round drew and toss the same again in another world.
"""

from __future__ import annotations

from typing import Protocol

from florilegium.client.config import DeviceConfig
from florilegium.client.pool import poisson_sample
from florilegium.client.state import DeviceState
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.seeds import derive_key, fresh_secret


class Seeded(Protocol):
    """What coins follow from beside a device's secret: a `CohortContext` has it."""

    @property
    def config(self) -> DeviceConfig: ...

    @property
    def seed(self) -> int: ...

    @property
    def experiment(self) -> str: ...


class Coins:
    """As every device tosses them."""

    def secret(self, device: str, context: Seeded) -> int:
        """Of a new device, from which the pool's coins follow, and in a simulation all others."""
        return fresh_secret() if context.config.privacy.secret == "os" else derive_key(context.seed, device, "secret")

    def sample(self, state: DeviceState, count: int, plan: RoundPlan, step: int, context: Seeded) -> list[int]:
        """One Poisson sample of so many: each has a coin of its own."""
        return poisson_sample(count, context.config.shared.sampling_rate, _key(state, plan, context, "coins", step))

    def noise_key(self, state: DeviceState, plan: RoundPlan, context: Seeded) -> int:
        """For the noise of all steps of a release."""
        return _key(state, plan, context, "noise")


def _key(state: DeviceState, plan: RoundPlan, context: Seeded, *purpose: str | int) -> int:
    """For what may be drawn once: for an experiment and a round the ledger pays once, for one adapter received.

    With secrets from the operating system it is drawn anew each time: should a device be set back to an old state,
    with its ledger, then another release is another release, and not the same noise on something else.
    """
    if context.config.privacy.secret == "os":
        return fresh_secret()
    return derive_key(state.secret, context.experiment, plan.round, *purpose)
