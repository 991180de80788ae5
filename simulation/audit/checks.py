"""Proofs that a sceptic can run: what the accounting assumes holds for the real round, and a control breaks it.

Each check runs the devices of a population, not a model of them. A control is the same with one mistake in it; a check
whose control passes has shown nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from opacus.accountants import PRVAccountant
from scipy import stats

from client.config import DeviceConfig
from client.dialogue import Dialogue
from client.lm.model import LanguageModel
from client.shared import release_noise
from privacy.accounting import Event, epsilon
from server.config import ServerConfig
from simulation.audit.judge import planned_events
from simulation.federation import play

GRID = ((0.01, 1.0, 1000, 1e-5), (0.1, 1.0, 100, 1e-5), (0.5, 4.0, 100, 1e-6), (0.02, 0.6, 500, 1e-5))  # q, σ, T, δ
Streams = Sequence[Sequence[Dialogue]]
Kind = TypeVar("Kind", bound=DeviceConfig)
BOUND = 2.0 + 1e-4  # clipping norms, when one unit is replaced
COPIES = 4


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
            apart.append(float(prv.get_epsilon(delta, eps_error=1e-3)) - pld)
        rdp.append(_renyi(rate, sigma, steps, delta) - pld)
    return Check("accountants apart, ε", max(apart, key=abs), -1e-4, 2e-3, "Rényi accounting", max(rdp, key=abs))


def noise(lm: LanguageModel, config: DeviceConfig, streams: Streams, seed: int) -> list[Check]:
    """(what was released − the same without noise) / announced deviation: standard, and normal. Control: σ / 3.3.

    Of one step of one round, so that what follows from noise is not in it. Where the server adds the noise, of as many
    rounds of its noise as give 200,000 numbers.
    """
    drawn = _central(config, seed) if config.privacy.mode == "user-central" else _local(lm, config, streams, seed)
    weak, off = drawn / 3.3, max(0.005, 4 / math.sqrt(2 * len(drawn)))
    title = f"deviation of {len(drawn):,} numbers of noise by the announced one"
    return [
        Check(title, float(drawn.std()), 1 - off, 1 + off, "σ / 3.3", float(weak.std())),
        Check(
            "p of the noise being normal", float(stats.kstest(drawn, "norm").pvalue), 1e-3, 1.0,
            "σ / 3.3", float(stats.kstest(weak, "norm").pvalue),
        ),
    ]  # fmt: skip


def _local(lm: LanguageModel, config: DeviceConfig, streams: Streams, seed: int) -> np.ndarray:
    one = one_round(config)
    private, plain = (_changes(lm, c, streams, seed) for c in (one, without_noise(one)))
    noise: np.ndarray = ((private - plain) / release_noise(one, 1, 0).on_device).double().numpy().ravel()
    return noise


def _central(config: DeviceConfig, seed: int) -> np.ndarray:
    announced = release_noise(config, 1, seed)
    return np.concatenate([announced.drawn(number, 2000) for number in range(1, 101)]) / announced.on_sum


def coupling(
    lm: LanguageModel, config: DeviceConfig, stream: Sequence[Dialogue], others: Sequence[Dialogue], seed: int
) -> Check:
    """One dialogue, or all of a device, replaced, the whole round run again: ‖Δ of what gets the noise‖ / C ≤ 2.

    Every slot of the pool is drawn, so that no coin hides the replaced one. Controls: what a dialogue's descendants
    would do if each were clipped apart; a device's change that is not clipped.
    """
    one = without_noise(one_round(config, sampling_rate=1.0))
    clip = one.privacy.clip_norm_l2
    if not one.privacy.by_dialogue:
        short, instead = stream[: len(others)], others[: len(stream)]
        unclipped = one.model_copy(update={"privacy": one.privacy.model_copy(update={"clip_norm_l2": 1e6})})
        moved, loose = (_moved(lm, settings, short, instead, seed) / clip for settings in (one, unclipped))
        return Check("one device replaced moves its change, C", moved, 0.0, BOUND, "no clipping", loose)
    fits = stream[: one.shared.pool_capacity - COPIES]
    scale = one.shared.pool_capacity / (one.shared.learning_rate * clip)
    by_place = []
    for place in range(0, len(fits), max(1, len(fits) // 12)):
        pair = fits, _replaced(fits, place, others)
        copies = tuple([*s, *(replace(s[place], id=f"{s[place].id}+{n}") for n in range(COPIES))] for s in pair)
        by_place.append([_moved(lm, one, before, after, seed) * scale for before, after in (pair, copies)])
    moved, apart = map(max, zip(*by_place, strict=True))
    title, control = "one dialogue replaced moves the clipped sum, C", f"with {COPIES} descendants clipped apart"
    return Check(title, moved, 0.0, BOUND, control, apart)


def _replaced(stream: Sequence[Dialogue], place: int, others: Sequence[Dialogue]) -> list[Dialogue]:
    other = others[place % len(others)]
    return [*stream[:place], Dialogue(stream[place].id, other.prompt, other.response), *stream[place + 1 :]]


def _moved(
    lm: LanguageModel, config: DeviceConfig, stream: Sequence[Dialogue], instead: Sequence[Dialogue], seed: int
) -> float:
    return float((_changes(lm, config, [stream], seed) - _changes(lm, config, [instead], seed)).norm())


def _changes(lm: LanguageModel, config: DeviceConfig, streams: Streams, seed: int) -> torch.Tensor:
    """(K, P) of the first round."""
    return play(lm, config, ServerConfig(), named(streams), seed, at_once=True).cohort.changes[0]


def named(streams: Streams) -> dict[str, Sequence[Dialogue]]:
    """As a federation wants them."""
    return {f"audited-{k:05d}": stream for k, stream in enumerate(streams)}


def one_round(config: Kind, **shared: object) -> Kind:
    """The same settings for one round of one step."""
    changed = config.shared.model_copy(update={"steps_per_round": 1, **shared})
    return config.model_copy(update={"shared": changed, "rounds": 1})


def without_noise(config: Kind) -> Kind:
    """The same clipping and no noise."""
    clips = "dialogue" if config.privacy.by_dialogue else "change"
    return config.model_copy(update={"privacy": config.privacy.model_copy(update={"mode": "none", "clips": clips})})


def _renyi(rate: float, sigma: float, steps: int, delta: float) -> float:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(sigma, rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta))


def claimed_epsilon(config: DeviceConfig) -> float:
    """Of a dialogue, or a device, that was part of as many releases as the budget allows."""
    return epsilon(planned_events(config), config.privacy.delta, config.privacy.promise.adjacency)
