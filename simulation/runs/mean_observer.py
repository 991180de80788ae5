"""What a run's releases tell somebody who sees none of them, but only the mean that a server makes of a round's.

Each device adds its own noise, and the mean of n releases has that of all n: a device's σ counts √n times as much.
That is worth nothing against the server, against who reads its messages, or where the other devices leave their noise
out. Not covered: several noisy steps in a round, whose later gradients follow from noise that the mean does not show;
releases that are rounded one by one on their way; what rules other than the plain mean make of releases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from florilegium.simulation.runs.events import RoundEnd, RunStart


@dataclass(frozen=True)
class Bystander:
    """ε of the unit that a run protects, towards who sees each round's mean of at least so many releases."""

    epsilon: float
    releases: int

    @property
    def told(self) -> str:
        return (
            f"ε = {self.epsilon:.2f} towards who sees only the mean of each round's releases, {self.releases:,} or "
            f"more, if the server shows none of them and the other devices do add their noise"
        )


def bystander(run: RunStart, rounds: Sequence[RoundEnd]) -> Bystander | None:
    """Of the event that a run begins with and those of its rounds; None where nothing is claimed.

    A unit is taken to be in the rounds with the fewest releases, in as many as its budget is for.
    """
    privacy, config = run.privacy, run.config
    planned = min(run.rounds, config.get("privacy", {}).get("releases", 0) or run.rounds)
    counts = sorted(e.releases for e in rounds if e.releases)[:planned]
    if not counts or not _plain_means(config) or privacy.steps_per_round != 1:
        return None
    if privacy.mode not in ("example-local", "user-local"):
        return None  # of a trusted server the mean is all that is promised anything about

    from florilegium.privacy import accounting  # not before there is something to account for

    sigma, rate = privacy.noise_multiplier, privacy.sampling_rate
    spent = [accounting.Event(sigma * math.sqrt(n), rate, 1) for n in counts]
    return Bystander(accounting.epsilon(spent, privacy.delta, privacy.adjacency), counts[0])


def _plain_means(config: Mapping[str, Any]) -> bool:
    """Whether what a server makes of a round follows from the sum of what devices have noised, and nothing else."""
    server, shared = config.get("server", {}), config.get("shared", {})
    plain = (server.get("rule"), server.get("products"), server.get("buffer")) == ("mean", "average", 0)
    return plain and shared.get("upload") == "fp32" and not config.get("world", {}).get("classes")
