"""Proofs that a sceptic can run: what the accounting assumes holds for the real round, and a control breaks it.

Each check runs the devices of a population, not a model of them. A control is the same with one mistake in it; a check
whose control passes has shown nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from opacus.accountants import PRVAccountant
from scipy import stats
from scipy.optimize import brentq

from florilegium.client.calibration import moved_l2, release_noise, sum_code
from florilegium.client.config import DeviceConfig
from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.model import LanguageModel
from florilegium.privacy.accounting import Event, epsilon
from florilegium.privacy.noise import inverse_column
from florilegium.privacy.plan import RoundPlan
from florilegium.server.config import ServerConfig
from florilegium.simulation.audit.attack_metrics import planned_events
from florilegium.simulation.audit.canaries import Streams
from florilegium.simulation.audit.recorded_coins import Recorded
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.engines.in_memory import Federated, InMemory, federate_in_memory, passing_ledger

GRID = ((0.01, 1.0, 1000, 1e-5), (0.1, 1.0, 100, 1e-5), (0.5, 4.0, 100, 1e-6), (0.02, 0.6, 500, 1e-5))  # q, σ, T, δ
Kind = TypeVar("Kind", bound=DeviceConfig)
BOUND = 2.0 + 1e-4  # clipping norms, when one unit is replaced
COPIES = 4
DRAWS = 10_000  # of all samples' sizes, for how far they usually spread
NUMBERS = 2**22  # that are held at one time, of more


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


def accounting() -> list[Check]:
    """Two accountants agree: PLD ≤ PRV(1e-3) ≤ PLD + 2e-3 on a grid. Rényi accounting, as control, is further off.

    For "replace one" PLD is held to the integral that defines δ, of one step; control: "add or remove one".
    """
    apart, rdp, exact, other = [], [], [], []
    for rate, sigma, steps, delta in GRID:
        pld = epsilon([Event(sigma, rate, steps)], delta, "add-or-remove-one")
        prv = PRVAccountant()
        prv.history = [(sigma, rate, steps)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            apart.append(float(prv.get_epsilon(delta, eps_error=1e-3)) - pld)
        rdp.append(_renyi(rate, sigma, steps, delta) - pld)
        integrated = _replaced_epsilon(rate, sigma, delta)
        exact.append(epsilon([Event(sigma, rate, 1)], delta, "replace-one") - integrated)
        other.append(epsilon([Event(sigma, rate, 1)], delta, "add-or-remove-one") - integrated)
    far = partial(max, key=abs)
    return [
        Check("accountants apart, ε", far(apart), -1e-4, 2e-3, "Rényi accounting", far(rdp)),
        Check("PLD and the integral apart, replace one, ε", far(exact), -1e-4, 5e-3, "add or remove one", far(other)),
    ]


def _replaced_epsilon(rate: float, sigma: float, delta: float) -> float:
    """ε of one step on a Poisson sample if one example pulls one way and its replacement the other."""
    x = np.linspace(-1 - 12 * sigma, 1 + 12 * sigma, 400_001)
    nobody = (1 - rate) * stats.norm.pdf(x, 0, sigma)
    one, two = (nobody + rate * stats.norm.pdf(x, mean, sigma) for mean in (1, -1))

    def excess(eps: float) -> float:
        return float(np.trapezoid(np.maximum(one - math.exp(eps) * two, 0), x)) - delta

    return 0.0 if excess(0.0) <= 0 else float(brentq(excess, 0.0, 60.0))


def noise(config: ExperimentConfig, seen: Federated) -> list[Check]:
    """What was released, in every round, less the same without noise, by the announced deviation.

    Standard, normal, and not the same twice. Controls: σ / 3.3; the same noise in two releases. The same without noise
    is had by sending the devices the same adapters again, with the coins that were written down; where the server adds
    the noise, from the devices' own changes.
    """
    drawn = _drawn(config, seen)
    every = np.concatenate([d.ravel() for d in drawn])
    off = max(0.005 if config.shared.steps_per_round == 1 or not config.privacy.by_dialogue else 0.05,
              4 / math.sqrt(2 * len(every)))  # fmt: skip
    title = f"deviation of {len(every):,} numbers of noise by the announced one"
    normal, uniform = (float(stats.kstest(x, "norm").pvalue) for x in (every / every.std(), _uniform(len(every))))
    found = [
        Check(title, float(every.std()), 1 - off, 1 + off, "σ / 3.3", float(every.std()) / 3.3),
        Check("p of the noise being normal", normal, 1e-5, 1.0, "uniform noise", uniform),
    ]
    by_round = [float(d.std()) for d in drawn]
    found.append(
        Check("least deviation in any round", min(by_round), 1 - 3 * off, 1 + 3 * off, "one round without", 0.0)
    )
    if config.server.noise_bands == 1 and (len(drawn) > 1 or not config.privacy.seen_as_sums):
        rough = 0.05 if config.privacy.by_dialogue and config.shared.steps_per_round > 1 else 0.0
        found += _alike([row for of_round in drawn for row in np.atleast_2d(of_round)], rough)
    return found


def _alike(rows: Sequence[np.ndarray], rough: float) -> list[Check]:
    """The two releases, of any devices and rounds, whose noise is most alike, of those that have as many numbers."""
    by_width: dict[int, list[np.ndarray]] = {}
    for row in rows:
        by_width.setdefault(len(row), []).append(row)
    several = {width: alike for width, alike in by_width.items() if len(alike) > 1}
    if not several:
        return []
    most = float(np.max([_greatest_correlation(alike) for alike in several.values()]))
    pairs = sum(math.comb(len(alike), 2) for alike in several.values())
    bound = max(rough, float(stats.norm.isf(1e-4 / pairs)) / math.sqrt(min(several)))
    return [Check("greatest correlation of two releases' noise", most, 0.0, bound, "the same noise", 1.0)]


def _greatest_correlation(rows: Sequence[np.ndarray]) -> float:
    """Of any two rows, of which a bounded number is held twice; nan, which passes nowhere, if one does not vary."""
    at_once = max(1, NUMBERS // len(rows[0]))
    most, starts = list[float](), range(0, len(rows), at_once)
    for first in starts:
        one = _of_length_1(rows[first : first + at_once])
        most.append(float(np.abs(np.triu(one @ one.T, 1)).max()))
        for later in starts[first // at_once + 1 :]:
            most.append(float(np.abs(one @ _of_length_1(rows[later : later + at_once]).T).max()))
    return float(np.max(most))


def _of_length_1(rows: Sequence[np.ndarray]) -> np.ndarray:
    """(n, width) without their means."""
    stacked = np.stack(rows)
    stacked -= stacked.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        stacked /= np.linalg.norm(stacked, axis=1, keepdims=True)
    return stacked


def _uniform(count: int) -> np.ndarray:
    """Of deviation 1."""
    drawn: np.ndarray = math.sqrt(12) * (np.random.Generator(np.random.Philox(key=0)).random(count) - 0.5)
    return drawn


def _drawn(config: ExperimentConfig, seen: Federated) -> list[np.ndarray]:
    """By round: what was added to each release, or to the sum of all, in announced deviations."""
    if config.privacy.mode == "user-central":
        return _central(config, seen)
    return _together(config, seen) if config.privacy.distributed else _local(config, seen)


def _together(config: ExperimentConfig, seen: Federated) -> list[np.ndarray]:
    """(sum that the server learned − sum of the changes without noise) of each round, by what devices add to it."""
    drawn, context = [], seen.context
    for number, (aggregated, plain) in enumerate(
        zip(seen.aggregated, _without_noise(config, seen), strict=True), start=1
    ):
        count = seen.facts[number].releases
        code, places = sum_code(context.config, context.schema, number, context.seed), context.schema.places(number)
        if count:
            total = aggregated.double() * count / config.server.learning_rate - plain.double().sum(0)
            std = math.sqrt(count * (code.share_std**2 + code.unit**2 / 12))
            drawn.append((total[places] / std).numpy())
    return drawn


def _local(config: ExperimentConfig, seen: Federated) -> list[np.ndarray]:
    cohort, std = seen.cohort, release_noise(config, 1, 0).on_device
    drawn, again = [], _without_noise(config, seen)
    spent = config.privacy.releases or config.rounds  # then dialogues retire, which without noise they never do
    for number, (noisy, plain) in enumerate(zip(cohort.changes[:spent], again[:spent], strict=True), start=1):
        places = torch.from_numpy(cohort.schema.places(number))
        sent = noisy.any(1)
        drawn.append(((noisy - plain)[sent][:, places] / std).double().numpy())
    return [d for d in drawn if d.size]


def _without_noise(config: ExperimentConfig, seen: Federated) -> list[torch.Tensor]:
    """By round (K, P): the changes that the same devices make of the same adapters without noise."""
    cohort = seen.cohort
    with passing_ledger() as accounts:
        context = replace(cohort.context, config=without_noise(config), ledger=accounts)
        again = InMemory(context, cohort.streams, cohort.at_once)
        for number, received in enumerate(cohort.received, start=1):
            again.contribute(list(cohort.streams), received, RoundPlan(number, number - 1))
    return again.changes


def _central(config: ExperimentConfig, seen: Federated) -> list[np.ndarray]:
    """(sum that the server made of it − sum of the changes) of each round."""
    drawn, bands = [], config.server.noise_bands
    announced = release_noise(config, bands, 0).on_sum
    for number, (aggregated, changes) in enumerate(zip(seen.aggregated, seen.cohort.changes, strict=True), start=1):
        if changes.any():
            asked = len(seen.cohort.observations[number - 1])
            total = aggregated.double() * asked / config.server.learning_rate - changes.double().sum(0)
            std = announced * float(np.linalg.norm(inverse_column(bands, number)))
            drawn.append((total / std).numpy())
    return drawn


def sampling(coins: Recorded, rate: float) -> list[Check]:
    """The coins that devices tossed, as they were written down: their share, whether any repeat, and how many fall.

    Controls: all slots drawn; the same coins twice; batches of one size. Nothing is shown of a rate of 1.
    """
    drawn = [row for row in coins.drawn.values() if len(row)]
    if rate == 1 or not drawn:
        return []
    found = [_share("slots that coins drew", np.concatenate(drawn), rate, "all")]
    for axis, where in enumerate(("devices", "rounds", "steps")):
        if pairs := coins.pairs(axis):
            same = np.concatenate([a == b for a, b in pairs])
            found.append(_share(f"coins that fell alike in two {where}", same, rate**2 + (1 - rate) ** 2, "the same"))
    return [*found, *_sizes([len(row) for row in drawn], [int(row.sum()) for row in drawn], rate)]


def _share(what: str, hits: np.ndarray, rate: float, control: str) -> Check:
    off = 4 * math.sqrt(rate * (1 - rate) / len(hits))
    return Check(f"share of {len(hits):,} {what}", float(hits.mean()), rate - off, rate + off, control, 1.0)


def _sizes(counts: Sequence[int], sizes: Sequence[int], rate: float) -> list[Check]:
    """How far the sizes of samples spread, as binomial ones do 9,998 times of 10,000; control: all of one size."""
    slots = np.array(counts)

    def spread(drawn: np.ndarray) -> np.ndarray:
        of_each: np.ndarray = ((drawn - rate * slots) ** 2 / (rate * (1 - rate) * slots)).mean(axis=-1)
        return of_each

    generator, at_once = np.random.Generator(np.random.Philox(key=0)), max(1, NUMBERS // len(slots))
    shares = [min(at_once, DRAWS - done) for done in range(0, DRAWS, at_once)]
    usual = np.concatenate([spread(generator.binomial(slots, rate, size=(share, len(slots)))) for share in shares])
    fixed, title = float(spread(np.round(rate * slots))), f"spread of {len(slots):,} samples' sizes"
    low, high = (float(np.quantile(usual, q)) for q in (1e-4, 1 - 1e-4))
    return [Check(title, float(spread(np.array(sizes))), low, high, "one size", fixed)] if fixed < low else []


def coupling(
    lm: LanguageModel, config: DeviceConfig, stream: Sequence[Dialogue], others: Sequence[Dialogue], seed: int
) -> Check:
    """One dialogue, or all of a device, replaced, the whole round run again: ‖Δ of what gets the noise‖ / C ≤ 2.

    Every slot of the pool is drawn, so that no coin hides the replaced one. Controls: what a dialogue's descendants
    would do if each were clipped apart; a device's change that is not clipped.
    """
    if config.privacy.distributed:
        return _coupling_in_a_sum(lm, config, stream, others, seed)
    one = without_noise(one_round(config, sampling_rate=1.0))
    clip = one.privacy.clip_norm_l2
    if not one.privacy.by_dialogue:
        short, instead = stream[: len(others)], others[: len(stream)]
        moved, loose = (_moved(lm, settings, short, instead, seed) / clip for settings in (one, without_clipping(one)))
        return Check("one device replaced moves its change, C", moved, 0.0, BOUND, "no clipping", loose)
    fits = stream[: one.shared.pool_capacity - COPIES]
    tight = one_round(one, pool_capacity=max(2, len(fits) // 2))  # coins decide what is in the pool, and what leaves
    by_place = []
    for place in range(0, len(fits), max(1, len(fits) // 12)):
        pair = fits, _replaced(fits, place, others)
        copies = tuple([*s, *(replace(s[place], id=f"{s[place].id}+{n}") for n in range(COPIES))] for s in pair)
        plain, full, apart = (
            _moved(lm, settings, before, after, seed)
            * settings.shared.pool_capacity
            / (one.shared.learning_rate * clip)
            for settings, (before, after) in ((one, pair), (tight, pair), (one, copies))
        )
        by_place.append((max(plain, full), apart))
    moved, apart = map(max, zip(*by_place, strict=True))
    title, control = "one dialogue replaced moves the clipped sum, C", f"with {COPIES} descendants clipped apart"
    return Check(title, moved, 0.0, BOUND, control, apart)


def _coupling_in_a_sum(
    lm: LanguageModel, config: DeviceConfig, stream: Sequence[Dialogue], others: Sequence[Dialogue], seed: int
) -> Check:
    """As `coupling`, of the integers themselves: the noise is the same in both worlds. Control: no clipping."""
    one = summed_over(one_round(config, sampling_rate=1.0), 3)
    fine = one.model_copy(update={"secure_aggregation": one.secure_aggregation.model_copy(update={"bits": 32})})
    fits = stream[: fine.shared.pool_capacity]
    instead = _replaced(fits, 0, others) if fine.privacy.by_dialogue else others[: len(fits)]
    company = [others[: len(fits)], others[: len(fits)]]
    moved, loose = (
        _moved(lm, settings, fits, instead, seed, company) / moved_l2(fine)
        for settings in (fine, without_clipping(fine))
    )
    return Check("one unit replaced moves a device's part of a sum, C", moved, 0.0, BOUND, "no clipping", loose)


def _replaced(stream: Sequence[Dialogue], place: int, others: Sequence[Dialogue]) -> list[Dialogue]:
    other = others[place % len(others)]
    return [*stream[:place], Dialogue(stream[place].id, other.prompt, other.response), *stream[place + 1 :]]


def _moved(
    lm: LanguageModel,
    config: DeviceConfig,
    stream: Sequence[Dialogue],
    instead: Sequence[Dialogue],
    seed: int,
    company: Streams = (),
) -> float:
    """How far the first device's change of the first round, with the same coins in both worlds."""
    coins = Recorded()
    one, other = (
        federate_in_memory(
            lm, config, ServerConfig(), named([s, *company]), seed, at_once=True, coins=coins
        ).cohort.changes[0][0].double()
        for s in (stream, instead)
    )  # fmt: skip
    return float((one - other).norm())


def named(streams: Streams) -> dict[str, Sequence[Dialogue]]:
    """As a federation wants them."""
    return {f"audited-{k:05d}": stream for k, stream in enumerate(streams)}


def summed_over(config: Kind, count: int) -> Kind:
    """The same settings for so many devices, all of whom survive and none colludes; as they are without a sum."""
    if not config.privacy.distributed:
        return config
    told = config.secure_aggregation.model_copy(update={"devices": count, "survivors": count, "colluding": 0})
    return config.model_copy(update={"secure_aggregation": told})


def one_round(config: Kind, **shared: object) -> Kind:
    """The same settings for one round of one step."""
    changed = config.shared.model_copy(update={"steps_per_round": 1, **shared})
    return config.model_copy(update={"shared": changed, "rounds": 1})


def without_noise(config: Kind) -> Kind:
    """The same clipping and no noise."""
    clips = "dialogue" if config.privacy.by_dialogue else "change"
    return with_privacy(config, mode="none", clips=clips)


def without_clipping(config: Kind) -> Kind:
    """A clipping norm that no gradient reaches."""
    return with_privacy(config, clip_norm_l2=1e6)


def with_privacy(config: Kind, **changes: object) -> Kind:
    """The same settings but for some of [privacy]."""
    return config.model_copy(update={"privacy": config.privacy.model_copy(update=changes)})


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
