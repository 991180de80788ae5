"""The audit of a run: what it claims, what can be proved, what attacks achieve, and whether controls are caught.

Streams are those of the run's own people, all of them there in the first round, so that every release could tell of
them. Lower bounds are of one run (Steinke et al. 2023, arXiv 2305.08846), with the canaries spread over the devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import stats

from client.lm.model import LanguageModel
from client.shared import planned_event, release_noise
from privacy.seeds import derive_seed
from simulation.audit import checks
from simulation.audit.attacks import Matches, gradient_scores, membership, reidentified, trusted
from simulation.audit.bounds import best_epsilon, one_run_epsilon
from simulation.audit.canaries import Canary, Streams, hide, plant
from simulation.audit.checks import Check, named, without_noise
from simulation.audit.inventory import Sent, inventory
from simulation.audit.inversion import LONG, reconstructed
from simulation.audit.judge import Attack, Ceiling, judge
from simulation.config import ExperimentConfig
from simulation.federation import Federated, play

SHARES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the canaries, those that are guessed; fixed before looking
HIDDEN = 0.5  # of each stream, what membership is asked of
WEAK_CLAIM = 2.0  # of the control that adds too little noise
REPLIES = 6  # that inversion tries to read
UNSEEN_BITS = 1 / math.log(2)  # mean exposure of what nobody met


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
    sent: list[Sent]

    @property
    def passed(self) -> bool:
        """Every proof holds, every control is caught, no attack and no bound exceeds the claim."""
        proofs = all(c.passed and c.control_caught for c in self.checks) and all(c.caught for c in self.controls)
        return proofs and self.epsilon_lower <= self.epsilon_claimed and all(a.within for a in self.attacks)


@dataclass
class Auditor:
    """The settings of a run on some of its people."""

    lm: LanguageModel
    config: ExperimentConfig
    streams: Streams
    listener: Callable[[str], None]

    @property
    def seed(self) -> int:
        return self.config.seed

    def play(self, what: str, config: ExperimentConfig, streams: Streams) -> Federated:
        """A federation with these streams, all of each there in the first round."""
        self.listener(what)
        return play(self.lm, config, config.server, named(streams), self.seed, at_once=True)

    def audit(self, canaries: int) -> Audit:
        """Raises `ValueError` where the streams have too few places for so many canaries."""
        planted, known = plant(self.streams, -(-canaries // len(self.streams)), self.seed)
        self.listener("proofs")
        proofs = [checks.accounting(), *checks.noise(self.lm, self.config, self.streams, self.seed)]
        proofs.append(checks.coupling(self.lm, self.config, self.streams[0], self.streams[-1], self.seed))
        claimed = checks.claimed_epsilon(self.config)
        found = self._matches(planted, known)
        bound = partial(_lower_bound, known, self.config.privacy.delta)
        controls = [
            Control("noise / 3.3", WEAK_CLAIM, bound(found["too little noise"])),
            Control("no noise", claimed, bound(found["no noise"])),
            Control("no clipping", claimed, bound(found["no clipping"])),
        ]
        proofs += [self._exposure(found, known), self._inversion()]
        return Audit(
            claimed, self.config.privacy.delta, bound(found["the run itself"]), len(self.streams), len(known),
            proofs, self._attacks(), controls, inventory(found["the run itself"].seen),
        )  # fmt: skip

    def _matches(self, planted: Streams, known: Sequence[Canary]) -> dict[str, Matches]:
        """How well each canary's gradient matches what was released, in the run itself and with a mistake in it."""
        plain = without_noise(self.config)
        settings = {
            "the run itself": self.config, "no noise": plain, "no clipping": _loose(plain),
            "too little noise": _weak(self.config),
        }  # fmt: skip
        found = {}
        for what, config in settings.items():
            seen = self.play(what, config, planted)
            found[what] = gradient_scores(self._noised(seen) if what == "no clipping" else seen, known)
        return found

    def _exposure(self, found: Mapping[str, Matches], known: Sequence[Canary]) -> Check:
        """Mean bits of the canaries that were met, and the most that the budget allows."""
        members = np.array([c.member for c in known])
        bits = [float(found[what].exposure(members)[members].mean()) for what in ("the run itself", "no noise")]
        title = f"mean exposure of what was met, bits ({UNSEEN_BITS:.2f} of what was not)"
        return Check(title, bits[0], 0.0, Ceiling.of(self.config).exposure_bits, "no noise", bits[1])

    def _noised(self, seen: Federated) -> Federated:
        """The announced noise on releases that were not clipped."""
        noise, rows = release_noise(self.config, 1, 0), [*seen.cohort.received[1:], seen.shared]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "no clipping") >> 1)
        for number, changes in enumerate(seen.cohort.changes):
            changes += noise.on_device * torch.randn(changes.shape, generator=generator)
            added = noise.on_sum / len(self.streams) * torch.randn(seen.shared.shape, generator=generator)
            for row in rows[number:]:  # what a round changed stays changed
                row += added
        return seen

    def _inversion(self) -> Check:
        self.listener("inversion")
        read = partial(reconstructed, self.lm, streams=self.streams, targets=REPLIES, seed=self.seed)
        (private, chance), (plain, _) = read(config=self.config), read(config=without_noise(self.config))
        # what guessing exceeds once in a thousand
        most = float(stats.binom.isf(1e-3, REPLIES * LONG, chance)) / (REPLIES * LONG)
        return Check("words of a reply read out of a release", private, 0.0, most, "no noise", plain)

    def _attacks(self) -> list[Attack]:
        met, dialogues = hide(self.streams, HIDDEN, self.seed)
        member, found = np.array([c.member for c in dialogues]), []
        for title, settings in (("", self.config), (", without noise", without_noise(self.config))):
            seen, ceiling = self.play(f"attacks{title}", settings, met), Ceiling.of(settings)
            found += [
                judge(f"membership by {n}{title}", s, member, ceiling) for n, s in membership(seen, dialogues).items()
            ]
            if len(seen.cohort.changes) > 1 and not trusted(seen):
                similar, same = reidentified(seen), np.eye(len(met), dtype=bool)
                found.append(judge(f"a device by its releases{title}", similar.ravel(), same.ravel(), Ceiling()))
        return found


def _lower_bound(known: Sequence[Canary], delta: float, found: Matches) -> float:
    """ε at 95 %, the best of the fixed shares, each at 1 − 5 % / their number."""
    confidence = 1 - 0.05 / len(SHARES)
    scores, members = found.diagonal.tolist(), [c.member for c in known]
    return best_epsilon(
        scores, members, lambda guesses, right: one_run_epsilon(len(known), guesses, right, delta, confidence), SHARES
    )


def _loose(config: ExperimentConfig) -> ExperimentConfig:
    return config.model_copy(update={"privacy": config.privacy.model_copy(update={"clip_norm_l2": 1e6})})


def _weak(config: ExperimentConfig) -> ExperimentConfig:
    """Devices that claim `WEAK_CLAIM` and add 3.3 times less noise than that needs."""
    target = planned_event(_with_epsilon(config, WEAK_CLAIM)).noise_multiplier / 3.3

    def sigma(epsilon: float) -> float:
        return planned_event(_with_epsilon(config, epsilon)).noise_multiplier

    low, high = WEAK_CLAIM, 2 * WEAK_CLAIM
    while sigma(high) > target:
        low, high = high, 2 * high
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if sigma(middle) > target else (low, middle)
    return _with_epsilon(config, high)


def _with_epsilon(config: ExperimentConfig, epsilon: float) -> ExperimentConfig:
    return config.model_copy(update={"privacy": config.privacy.model_copy(update={"epsilon": epsilon})})


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
        "sent": [asdict(s) for s in found.sent],
        "controls": [
            {"name": c.name, "epsilon_claimed": c.epsilon_claimed, "epsilon_lower": c.epsilon_lower, "caught": c.caught}
            for c in found.controls
        ],
    }  # fmt: skip
