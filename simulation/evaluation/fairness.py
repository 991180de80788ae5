"""What a world of unequal devices cost, by class, and to whom it was fair. Not covered: why a device fared worse."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from florilegium.simulation.evaluation.metrics import interval
from florilegium.simulation.heterogeneity.availability import Round
from florilegium.simulation.heterogeneity.classes import DevicePopulation, class_of
from florilegium.simulation.runs.events import (
    ClassCosts,
    DataQuartile,
    FairnessFigures,
    MeanGain,
    Outcome,
    WorldFairness,
)


def summarize(
    rounds: Sequence[Round],
    world: DevicePopulation,
    devices: Sequence[str],
    utility_by_device: Mapping[str, float],
    data_by_device: Mapping[str, float],
) -> WorldFairness:
    """Costs by class, fairness, simulated time.

    Participation and costs are of all `devices`; utility is of those in `utility_by_device`, which may be fewer.
    Utility is what is better when higher, of any unit; data is an amount, such as replies. What cannot be computed is
    None. `wall_s` = end of the last round − start of the first, with the pauses between them.
    """
    measured: dict[str, list[str]] = {c.name: [] for c in world.classes}
    for device in sorted(utility_by_device):
        measured[class_of(device, world.classes, world.seed).name].append(device)
    fates = [f for r in rounds for f in r.fates]
    return WorldFairness(
        wall_s=rounds[-1].starts_s + rounds[-1].duration_s - rounds[0].starts_s if rounds else 0.0,
        rounds=len(rounds),
        classes={
            name: _of_class([f for f in fates if f.device_class == name], fates, [utility_by_device[d] for d in own])
            for name, own in measured.items()
        },
        fairness=FairnessFigures(
            utility_by_data_quartile=tuple(_by_quartile(utility_by_device, data_by_device)),
            jain_participation=jain(_answers(fates, devices)),
            worst_decile_utility=worst_decile(list(utility_by_device.values())),
        ),
    )


def jain(amounts: Sequence[float]) -> float | None:
    """Jain's index (Σ x)² / (n Σ x²): 1 if all have the same, 1 / n if one has everything; None if nobody has any.

    Jain, Chiu and Hawe, "A quantitative measure of fairness and discrimination", DEC-TR-301, 1984.
    """
    x = np.asarray(amounts, dtype=float)
    return float(x.sum() ** 2 / (len(x) * (x**2).sum())) if x.any() else None


def worst_decile(utilities: Sequence[float]) -> float | None:
    """The mean of the lowest ⌈n / 10⌉."""
    return float(np.mean(sorted(utilities)[: math.ceil(len(utilities) / 10)])) if utilities else None


def _of_class(own: Sequence[Outcome], everyone: Sequence[Outcome], utilities: Sequence[float]) -> ClassCosts:
    """One class. `share_of_answers` = its answers / all answers; `seconds` are those at work; sums over all rounds."""
    outcomes = Counter(f.outcome for f in own)
    answers = sum(f.outcome == "answers" for f in everyone)
    return ClassCosts(
        devices=len(utilities),
        asked=len(own),
        answered=outcomes["answers"],
        outcomes=dict(sorted(outcomes.items())),
        share_of_answers=outcomes["answers"] / answers if answers else None,
        seconds=math.fsum(f.busy_s for f in own),
        bytes=sum(f.down_bytes + f.up_bytes for f in own),
        joules=math.fsum(f.energy_joules for f in own),
        utility=_mean(utilities),
    )


def _by_quartile(utility: Mapping[str, float], data: Mapping[str, float]) -> list[DataQuartile]:
    """Quarters of the devices, from the least data to the most; ties by name. Fewer than four devices: so many."""
    order = sorted(utility, key=lambda d: (data[d], d))
    quarters = [order[len(order) * k // 4 : len(order) * (k + 1) // 4] for k in range(4)]
    return [
        DataQuartile(
            least_data=data[q[0]], most_data=data[q[-1]], devices=len(q), utility=_mean([utility[d] for d in q])
        )
        for q in quarters
        if q
    ]


def _answers(fates: Sequence[Outcome], devices: Sequence[str]) -> list[int]:
    """Of each device over all rounds; who was never asked has none."""
    answered = Counter(f.device for f in fates if f.outcome == "answers")
    return [answered[d] for d in devices]


def _mean(values: Sequence[float]) -> MeanGain:
    """With its 95 % interval by Student's t."""
    if not values:
        return MeanGain(mean=None, ci95=None)
    return MeanGain(mean=float(np.mean(values)), ci95=interval(values))
