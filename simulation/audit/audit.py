"""The audit of a run: what it claims, what can be proved, what attacks achieve, and whether controls are caught.

Streams are those of the run's own people. For membership a fair coin decides of each dialogue whether its device ever
meets it, so that members and strangers differ in nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import stats

from client.config import DeviceConfig
from client.dialogue import Dialogue
from client.lm.model import LanguageModel
from client.shared import planned_event, release_noise
from privacy.accounting import tradeoff
from privacy.seeds import derive_seed
from simulation.audit import checks
from simulation.audit.attacks import membership, reidentified
from simulation.audit.bounds import best_epsilon, one_run_epsilon
from simulation.audit.canaries import Canary, Federated, federate, plant, scores
from simulation.audit.checks import Check
from simulation.data.population import User

SHARES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the canaries, those that are guessed; fixed before looking
RATES = (0.01, 0.001)  # false positive rates at which attacks are told
Listener = Callable[[str], None]


@dataclass(frozen=True)
class Attack:
    """How well something is told from what left the devices, and the most that the claimed budget allows."""

    name: str
    members: int
    strangers: int
    auc: float
    ci95: tuple[float, float]
    auc_ceiling: float
    tpr_at_fpr: dict[float, float]
    tpr_ceiling: dict[float, float]

    @property
    def within(self) -> bool:
        """Whether nothing shows that more is told than is allowed."""
        return self.ci95[0] <= self.auc_ceiling


@dataclass(frozen=True)
class Control:
    """A mistake that the one-run audit must catch: its lower bound is above what it claims."""

    name: str
    epsilon_claimed: float
    epsilon_lower: float

    @property
    def caught(self) -> bool:
        return self.epsilon_lower > self.epsilon_claimed


@dataclass(frozen=True)
class Audit:
    """Everything that an audit found."""

    epsilon_claimed: float
    delta: float
    epsilon_lower: float
    devices: int
    canaries: int
    checks: list[Check]
    attacks: list[Attack]
    controls: list[Control]

    @property
    def passed(self) -> bool:
        """Every proof holds, every control is caught, no attack and no bound exceeds the claim."""
        proofs = all(c.passed and c.control_caught for c in self.checks) and all(c.caught for c in self.controls)
        return proofs and self.epsilon_lower <= self.epsilon_claimed and all(a.within for a in self.attacks)


def audit(
    lm: LanguageModel, config: DeviceConfig, users: Sequence[User], canaries: int, seed: int, listener: Listener
) -> Audit:
    """Audits the `example-local` settings `config` on the devices of `users`; at least `canaries` are planted."""
    streams = [user.stream for user in users]
    each = -(-canaries // len(users))
    listener("proofs")
    found = [checks.accounting(), *checks.noise(lm, config, streams, seed)]
    found.append(checks.coupling(lm, config, streams[0], streams[-1], seed))
    listener("canaries")
    planted, known = plant(streams, each, lm, seed)
    bound = partial(_lower_bound, known, config.privacy.delta)
    claimed = checks.claimed_epsilon(config)
    seen = federate(lm, config, planted, seed)
    lower = bound(seen)
    listener("controls")
    weak_claim = 2.0
    controls = [
        Control("noise / 3.3", weak_claim, bound(federate(lm, _with_noise(config, weak_claim, 3.3), planted, seed))),
        Control("no noise", claimed, bound(federate(lm, _plain(config), planted, seed))),
        Control("no clipping", claimed, bound(_unclipped(lm, config, planted, seed))),
    ]
    listener("attacks")
    return Audit(
        claimed, config.privacy.delta, lower, len(users), len(known), found,
        _attacks(lm, config, streams, seed), controls,
    )  # fmt: skip


def _lower_bound(known: Sequence[Canary], delta: float, seen: Federated) -> float:
    """ε at 95 %, the best of the fixed shares, each at 1 − 5 % / their number."""
    confidence = 1 - 0.05 / len(SHARES)
    refuted = partial(_refuted, len(known), delta, confidence)
    return best_epsilon(scores(seen, known).tolist(), [c.member for c in known], refuted, SHARES)


def _refuted(m: int, delta: float, confidence: float, guesses: int, correct: int) -> float:
    return one_run_epsilon(m, guesses, correct, delta, confidence)


def _plain(config: DeviceConfig) -> DeviceConfig:
    return config.model_copy(update={"privacy": config.privacy.model_copy(update={"mode": "none"})})


def _with_noise(config: DeviceConfig, claimed: float, less: float) -> DeviceConfig:
    """A device that claims `claimed` and adds `less` times less noise than that needs."""
    honest = config.model_copy(update={"privacy": config.privacy.model_copy(update={"epsilon": claimed})})
    target = planned_event(honest).noise_multiplier / less
    low, high = claimed, 1000.0
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        spending = honest.privacy.model_copy(update={"epsilon": middle})
        sigma = planned_event(honest.model_copy(update={"privacy": spending})).noise_multiplier
        low, high = (middle, high) if sigma > target else (low, middle)
    return honest.model_copy(update={"privacy": honest.privacy.model_copy(update={"epsilon": high})})


def _unclipped(lm: LanguageModel, config: DeviceConfig, streams: Sequence[Sequence[Dialogue]], seed: int) -> Federated:
    """The announced noise on gradients of any length."""
    huge = _plain(config).privacy.model_copy(update={"clip_norm_l2": 1e6})
    seen = federate(lm, config.model_copy(update={"privacy": huge}), streams, seed)
    std = release_noise(config, 1, 0).on_device
    generator = torch.Generator().manual_seed(derive_seed(seed, "no clipping") >> 1)
    noisy = [c + std * torch.randn(c.shape, generator=generator) for c in seen.changes]
    return Federated(seen.site, seen.received, noisy)


# -- attacks ------------------------------------------------------------------------------------------------------


def _attacks(lm: LanguageModel, config: DeviceConfig, streams: Sequence[Sequence[Dialogue]], seed: int) -> list[Attack]:
    rng = np.random.Generator(np.random.Philox(key=derive_seed(seed, "members")))
    dialogues = [Canary(k, d, bool(rng.random() < 0.5)) for k, stream in enumerate(streams) for d in stream]
    met = [[c.dialogue for c in dialogues if c.device == k and c.member] for k in range(len(streams))]
    member = np.array([c.member for c in dialogues])
    found = []
    for title, settings in (("", config), (", without noise", _plain(config))):
        seen = federate(lm, settings, met, seed)
        ceiling = settings.privacy.mode != "none"
        for name, score in membership(seen, dialogues).items():
            found.append(attack(f"membership, {name}{title}", score, member, config if ceiling else None))
        if config.rounds > 1:
            similar = reidentified(seen)
            same = np.eye(len(streams), dtype=bool).ravel()
            found.append(attack(f"same device{title}", similar.ravel(), same, None))
    return found


def attack(name: str, score: np.ndarray, member: np.ndarray, config: DeviceConfig | None) -> Attack:
    """The figures of scores (n,); `config` gives the ceiling of what one dialogue's budget allows, None none."""
    inside, outside = score[member], score[~member]
    ranks = stats.rankdata(score)
    n, m = len(inside), len(outside)
    auc = float((ranks[member].sum() - n * (n + 1) / 2) / (n * m))
    half = 1.96 * _hanley(auc, n, m)
    rates = {rate: float((inside > np.quantile(outside, 1 - rate)).mean()) for rate in RATES}
    ceiling, allowed = 1.0, dict.fromkeys(RATES, 1.0)
    if config:
        releases = min(config.rounds, config.privacy.releases or config.rounds)
        curve = tradeoff([planned_event(config)] * releases, config.privacy.promise.adjacency)
        grid = np.concatenate([[0.0], np.geomspace(1e-9, 1.0, 5000)])
        ceiling = float(np.trapezoid(curve(grid), grid))
        allowed = {rate: float(curve(np.array([rate]))[0]) for rate in RATES}
    return Attack(name, n, m, auc, (auc - half, auc + half), ceiling, rates, allowed)


def _hanley(auc: float, n: int, m: int) -> float:
    """Standard error of an AUC (Hanley and McNeil 1982)."""
    one, two = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (n - 1) * (one - auc**2) + (m - 1) * (two - auc**2)
    return math.sqrt(max(0.0, variance) / (n * m))


def as_json(found: Audit) -> dict[str, Any]:
    """For programs."""
    return {
        "epsilon_claimed": found.epsilon_claimed,
        "epsilon_lower": found.epsilon_lower,
        "delta": found.delta,
        "devices": found.devices,
        "canaries": found.canaries,
        "passed": found.passed,
        "checks": [
            {"name": c.name, "figure": c.figure, "range": [c.low, c.high], "passed": c.passed,
             "control": c.control, "control_figure": c.control_figure, "control_caught": c.control_caught}
            for c in found.checks
        ],
        "attacks": [
            {"name": a.name, "auc": a.auc, "auc_ceiling": a.auc_ceiling, "ci95": list(a.ci95),
             "tpr_at_fpr": {str(k): v for k, v in a.tpr_at_fpr.items()},
             "tpr_ceiling": {str(k): v for k, v in a.tpr_ceiling.items()}}
            for a in found.attacks
        ],
        "controls": [
            {"name": c.name, "epsilon_claimed": c.epsilon_claimed, "epsilon_lower": c.epsilon_lower, "caught": c.caught}
            for c in found.controls
        ],
    }  # fmt: skip
