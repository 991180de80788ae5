"""The audit of a run: what it claims, what can be proved, what attacks achieve, and whether controls are caught.

Streams are those of the run's own people, all of them there in the first round, so that every release could tell of
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from scipy import stats

from florilegium.client.calibration import planned_event
from florilegium.client.lm.model import LanguageModel
from florilegium.simulation.audit import checks, hostile_adapters
from florilegium.simulation.audit.attack_metrics import Attack, Ceiling, judge
from florilegium.simulation.audit.attacks import membership, reidentified, trusted
from florilegium.simulation.audit.bounds import (
    best_epsilon,
    gaussian_epsilon_of_trials,
    gaussian_one_run_epsilon,
    one_run_epsilon,
)
from florilegium.simulation.audit.canaries import Streams, hide
from florilegium.simulation.audit.checks import Check, named, without_noise
from florilegium.simulation.audit.inventory import Sent, inventory
from florilegium.simulation.audit.inversion import LONG, reconstructed
from florilegium.simulation.audit.one_run_audit import DeviceCoins, DialogueCoins, Guesses, Mistake, worst_case
from florilegium.simulation.audit.recorded_coins import Recorded
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.engines.in_memory import Federated, federate_in_memory
from florilegium.simulation.engines.placement import Means, computed
from florilegium.simulation.engines.processes import BYTES_OF_ONE, Count
from florilegium.simulation.engines.workers import Cohort

SHARES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the canaries, those that are guessed; fixed before looking
HIDDEN = 0.5  # of each stream, what membership is asked of
CLAIM = 2.0  # of the controls: so many canaries could not refute a much larger one
Bound = Callable[[int, int, int, float, float], float]  # canaries, guesses, right ones, δ, confidence → ε
REPLIES = 6  # that inversion tries to read
UNSEEN_BITS = 1 / math.log(2)  # mean exposure of what nobody met

# The parts of an audit, each computed by one process.
ATTACKED, ATTACKED_PLAIN = "attacks", "attacks without noise"
ITSELF, HOSTILE, COUPLING = "the run itself", "hostile adapters", "one dialogue replaced"
GUESSED, HONEST = "one-run audit", f"one-run audit at ε {CLAIM:g}"
MISTAKES = LITTLE_NOISE, NO_NOISE, NO_CLIPPING = "noise / 3.3", "no noise", "no clipping"
INVERTED, INVERTED_PLAIN = "inversion", "inversion without noise"


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
    epsilon_lower: float  # of Gaussian mechanisms
    epsilon_lower_one_run: float  # of any (Steinke et al. 2023, Theorem 5.2)
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


@dataclass(frozen=True)
class AuditWork:
    """The parts of an audit by name, each of which can be computed alone."""

    parts: Mapping[str, Callable[[], Any]]
    listener: Callable[[str], None]

    def telling(self, listener: Callable[[str], None]) -> AuditWork:
        """The same, with another listener."""
        return replace(self, listener=listener)


def run_part(work: AuditWork, names: Sequence[str], shared: None = None) -> Any:
    """What one part finds (a `Job`)."""
    work.listener(names[0])
    return work.parts[names[0]]()


@dataclass
class Auditor:
    """The settings of a run on some of its people; its parts are computed by as many processes as `workers` says."""

    lm: LanguageModel
    config: ExperimentConfig
    streams: Streams
    listener: Callable[[str], None]
    workers: Count = "auto"

    @property
    def seed(self) -> int:
        return self.config.seed

    def play(self, config: ExperimentConfig, streams: Streams, coins: Recorded | None = None) -> Federated:
        """A federation with these streams, all of each there in the first round; what it tosses is written down.

        With all that devices say, where that is; a sum is of those who are played.
        """
        config = checks.summed_over(config, len(streams))
        return federate_in_memory(
            self.lm, config, config.server, named(streams), self.seed, at_once=True, coins=coins,
            masked=coins is not None,
        )  # fmt: skip

    def audit(self, canaries: int) -> Audit:
        """Raises `ConfigError` where the streams have too few places for so many canaries."""
        coins = DialogueCoins if self.config.privacy.by_dialogue else DeviceCoins
        one_run = coins(self.lm, self.config, self.streams, canaries, self.seed)
        found = self._computed(AuditWork(self._parts(one_run), self.listener), one_run.held_bytes)
        proofs, sent = found[ITSELF]
        proofs = [*checks.accounting(), *proofs, found[COUPLING], *found[HOSTILE]]
        guessed, plain = found[GUESSED], found[NO_NOISE]
        lower, tried = self._lower_bound(guessed, one_run.independent), len(guessed.scores)
        controls = [Control(name, CLAIM, self._lower_bound(found[name], one_run.independent)) for name in MISTAKES]
        proofs += [self._exposure(found[HONEST], plain), self._inversion(found[INVERTED], found[INVERTED_PLAIN])]
        return Audit(
            checks.claimed_epsilon(self.config), self.config.privacy.delta, lower, self._of_one_run(guessed),
            len(self.streams), tried, proofs, [*found[ATTACKED], *found[ATTACKED_PLAIN]], controls, sent,
        )  # fmt: skip

    def _computed(self, work: AuditWork, held_bytes: int) -> dict[str, Any]:
        cohorts = [Cohort((name,), place) for place, name in enumerate(work.parts)]
        means = Means(self.workers, self.lm.engine.device, BYTES_OF_ONE + held_bytes)
        return {part.names[0]: found for part, found in computed(work, run_part, cohorts, means)}

    def _parts(self, one_run: DialogueCoins | DeviceCoins) -> dict[str, Callable[[], Any]]:
        """What the audit is made of; the controls are three mistakes under the claim of `CLAIM`."""
        config, honest = self.config, worst_case(self.config, CLAIM)
        noise, plain = planned_event(honest).noise_multiplier * honest.privacy.clip_norm_l2, without_noise(honest)
        read = partial(reconstructed, self.lm, streams=self.streams, targets=REPLIES, seed=self.seed)
        return {
            ATTACKED: partial(self._attacks, "", config),
            ATTACKED_PLAIN: partial(self._attacks, ", without noise", without_noise(config)),
            ITSELF: self._itself,
            HOSTILE: partial(hostile_adapters.reach, self.lm, config, self.seed),
            COUPLING: partial(checks.coupling, self.lm, config, self.streams[0], self.streams[-1], self.seed),
            GUESSED: partial(one_run.guessed, worst_case(config, config.privacy.epsilon)),
            HONEST: partial(one_run.guessed, honest),
            LITTLE_NOISE: partial(one_run.guessed, plain, Mistake(added_noise=noise / 3.3)),
            NO_NOISE: partial(one_run.guessed, plain),
            NO_CLIPPING: partial(one_run.guessed, plain, Mistake(unclipped=True, added_noise=noise)),
            INVERTED: partial(read, config=config),
            INVERTED_PLAIN: partial(read, config=without_noise(config)),
        }

    def _itself(self) -> tuple[list[Check], list[Sent]]:
        """The run: what its noise and its coins were, and every byte that left."""
        recorded = Recorded()
        seen = self.play(self.config, self.streams, recorded)
        proofs = [*checks.noise(self.config, seen), *checks.sampling(recorded, self.config.shared.sampling_rate)]
        return proofs, inventory(seen)

    def _exposure(self, honest: Guesses, plain: Guesses) -> Check:
        title = f"mean exposure at ε {CLAIM:g} of what was met, bits ({UNSEEN_BITS:.2f} of what was not)"
        most = Ceiling.of(worst_case(self.config, CLAIM)).exposure_bits
        return Check(title, honest.exposure(), 0.0, most, "no noise", plain.exposure())

    def _lower_bound(self, found: Guesses, independent: bool) -> float:
        """ε at 95 % for Gaussian mechanisms: of independent coins; of one sum the best of shares fixed before."""
        m, delta = len(found.scores), self.config.privacy.delta
        if independent:
            right = int(((found.scores > 0) == found.members).sum())
            return gaussian_epsilon_of_trials(m, right, delta)
        return self._of_one_run(found, gaussian_one_run_epsilon)

    def _of_one_run(self, found: Guesses, bound: Bound = one_run_epsilon) -> float:
        """The best of shares that are fixed before, each at 1 − 5 % / their number."""
        m, delta, confidence = len(found.scores), self.config.privacy.delta, 1 - 0.05 / len(SHARES)

        def refuted(guesses: int, right: int) -> float:
            return bound(m, guesses, right, delta, confidence)

        return best_epsilon(found.scores.tolist(), found.members.tolist(), refuted, SHARES)

    def _inversion(self, private: tuple[float, float], plain: tuple[float, float]) -> Check:
        """Of the shares of words that were found, and that guessing finds."""
        # what guessing exceeds once in a thousand
        most = float(stats.binom.isf(1e-3, REPLIES * LONG, private[1])) / (REPLIES * LONG)
        return Check("words of a reply read out of a release", private[0], 0.0, most, "no noise", plain[0])

    def _attacks(self, title: str, settings: ExperimentConfig) -> list[Attack]:
        met, dialogues = hide(self.streams, HIDDEN, self.seed)
        member = np.array([c.member for c in dialogues])
        seen, ceiling = self.play(settings, met), Ceiling.of(settings)
        found = [judge(f"membership by {n}{title}", s, member, ceiling) for n, s in membership(seen, dialogues).items()]
        if len(seen.cohort.changes) > 1 and not trusted(seen):
            similar, same = reidentified(seen), np.eye(len(met), dtype=bool)
            found.append(judge(f"a device by its releases{title}", similar.ravel(), same.ravel(), Ceiling()))
        return found


def as_json(found: Audit) -> dict[str, Any]:
    """For programs."""
    return {
        "epsilon_claimed": found.epsilon_claimed,
        "epsilon_lower": found.epsilon_lower,
        "epsilon_lower_one_run": found.epsilon_lower_one_run,
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
