"""Proofs that a sceptic can run: what the accounting assumes holds for the real round, and a control breaks it.

Each check runs the devices of a population, not a model of them. A control is the same with one mistake in it; a check
whose control passes has shown nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from opacus.accountants import PRVAccountant
from scipy import stats

from client.config import DeviceConfig
from client.dialogue import Dialogue
from client.lm.model import LanguageModel
from client.shared import planned_event, release_noise
from privacy.accounting import Event, epsilon
from simulation.audit.canaries import federate

GRID = ((0.01, 1.0, 1000, 1e-5), (0.1, 1.0, 100, 1e-5), (0.5, 4.0, 100, 1e-6), (0.02, 0.6, 500, 1e-5))  # q, σ, T, δ
Streams = Sequence[Sequence[Dialogue]]


@dataclass(frozen=True)
class Check:
    """A figure, the range in which it must be, and whether the control was out of it."""

    name: str
    figure: float
    low: float
    high: float
    control: str
    control_figure: float

    @property
    def passed(self) -> bool:
        return self.low <= self.figure <= self.high

    @property
    def control_caught(self) -> bool:
        return not self.low <= self.control_figure <= self.high


def accounting() -> Check:
    """Two accountants agree: PLD ≤ PRV(1e-3) ≤ PLD + 2e-3 on a grid. RDP, as control, is further off."""
    apart, rdp = [], []
    for rate, sigma, steps, delta in GRID:
        pld = epsilon([Event(sigma, rate, steps)], delta, "add-or-remove-one")
        prv = PRVAccountant()
        prv.history = [(sigma, rate, steps)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            apart.append(prv.get_epsilon(delta, eps_error=1e-3) - pld)
        rdp.append(_renyi(rate, sigma, steps, delta) - pld)
    return Check("accountants apart, ε", max(apart, key=abs), -1e-4, 2e-3, "Rényi accounting", max(rdp, key=abs))


def noise(lm: LanguageModel, config: DeviceConfig, streams: Streams, seed: int) -> list[Check]:
    """(release − the same without noise) / announced deviation: standard, and normal. Control: σ / 3.3."""
    private, plain = (federate(lm, c, streams, seed) for c in (config, _without_noise(config)))
    announced = release_noise(config, 1, 0).on_device
    drawn = ((private.changes[0] - plain.changes[0]) / announced).double().numpy().ravel()
    weak = drawn / 3.3
    return [
        Check("deviation of the noise by the announced one", drawn.std(), 0.99, 1.01, "σ / 3.3", weak.std()),
        Check(
            "p of the noise being normal", stats.kstest(drawn, "norm").pvalue, 1e-3, 1.0,
            "σ / 3.3", stats.kstest(weak, "norm").pvalue,
        ),
    ]  # fmt: skip


def coupling(
    lm: LanguageModel, config: DeviceConfig, stream: Sequence[Dialogue], others: Sequence[Dialogue], seed: int
) -> Check:
    """One dialogue of the stream replaced, the whole round run again: ‖Δ clipped sum‖ / C ≤ 2.

    Every slot is drawn, so that no coin hides the replaced one. Control: `quality` decides what is trained on.
    """
    full = _without_noise(config, sampling_rate=1.0, steps_per_round=1)
    by_quality = _without_noise(config, sampling_rate=1.0, steps_per_round=1, source="buffer")
    found = []
    for settings in (full, by_quality):
        places = range(0, len(stream), max(1, len(stream) // 12))
        found.append(max(_moved(lm, settings, stream, i, others[i % len(others)], seed) for i in places))
    return Check(
        "one dialogue replaced moves the clipped sum, C", found[0], 0.0, 2.0 + 1e-4, "quality chooses", found[1]
    )


def _moved(
    lm: LanguageModel, config: DeviceConfig, stream: Sequence[Dialogue], place: int, other: Dialogue, seed: int
) -> float:
    replaced = [*stream]
    replaced[place] = Dialogue(stream[place].id, other.prompt, other.response)
    one, two = (federate(lm, config, [s], seed).changes[0] for s in (stream, replaced))
    shared = config.shared
    scale = shared.sampling_rate * shared.pool_capacity / (shared.learning_rate * config.privacy.clip_norm_l2)
    return float((one - two).norm()) * scale


def _without_noise(config: DeviceConfig, **shared: object) -> DeviceConfig:
    return config.model_copy(
        update={
            "privacy": config.privacy.model_copy(update={"mode": "none"}),
            "shared": config.shared.model_copy(update=shared),
            "rounds": 1,
        }
    )


def _renyi(rate: float, sigma: float, steps: int, delta: float) -> float:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(sigma, rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta))


def claimed_epsilon(config: DeviceConfig) -> float:
    """Of a dialogue that was part of as many releases as the budget allows."""
    event = planned_event(config)
    releases = min(config.rounds, config.privacy.releases or config.rounds)
    return epsilon([event] * releases, config.privacy.delta, config.privacy.promise.adjacency)
