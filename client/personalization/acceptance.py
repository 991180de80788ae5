"""Whether an update of a personal adapter is kept: a test on replies of its owner's that it never learned from.

A coin that looks at no text holds a share of the replies back. After a learning the adapter before it and the one after
it are compared on these, reply by reply: the update is taken back where the mean rise of their negative log-likelihood
is beyond what chance alone brings with probability `risk` (one-sided paired t-test, Student 1908). What is held back
rotates: after so many learnings a reply is learned from, and new ones are in its place. Not covered: that replies which
are used in several tests tell a little less with each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field
from scipy import stats

from florilegium.privacy.common.base_config import Config
from florilegium.privacy.seeds import derive_seed

SEEDS = 2.0**63  # that a derived seed may be
LEAST = 2  # replies below which there is nothing to compare


class AcceptanceConfig(Config):
    """How an update of the personal adapter is tested."""

    share: float = Field(0.2, ge=0, le=0.5, description="of the replies that are held back; 0: nothing is tested")
    learnings: int = Field(4, ge=1, description="for which a reply is held back, before it is learned from")
    risk: float = Field(
        0.2, gt=0, le=0.5, description="chance that an update which changes nothing is taken back; 0.5: whenever worse"
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a test; likelihoods are negative logarithms, nats a token, lower is better."""

    replies: int
    before: float  # mean over replies
    after: float
    error: float  # standard error of the mean difference; infinite of fewer than two replies
    accepted: bool

    @property
    def difference(self) -> float:
        """After less before: below 0 where the owner's replies became likelier."""
        return self.after - self.before


def is_held_back(seed: int, identity: str, share: float) -> bool:
    """The coin of a dialogue, the same whenever it is tossed; no other dialogue and no text moves it."""
    return derive_seed(seed, identity, "held back") < share * SEEDS


def judged(before: Sequence[float], after: Sequence[float], risk: float) -> Verdict:
    """The verdict on an update, of NLL in nats a token of each held-back reply before and after it.

    Taken back where mean d > t(1 - risk; n - 1) · s / √n for d = after - before: if it changed nothing and d were
    normal, with probability `risk`. Fewer than two replies take nothing back; what is not a number does.
    """
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    n = len(first)
    if len(second) != n:
        raise ValueError(f"{n} replies before and {len(second)} after must be the same ones")
    if n < LEAST:
        means = (float(first.mean()), float(second.mean())) if n else (math.nan, math.nan)
        return Verdict(n, *means, math.inf, accepted=True)
    d = second - first
    error = float(d.std(ddof=1) / math.sqrt(n))
    accepted = bool(d.mean() <= float(stats.t.ppf(1 - risk, n - 1)) * error)  # False where d is not a number
    return Verdict(n, float(first.mean()), float(second.mean()), error, accepted)
