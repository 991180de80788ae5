"""From the results of federated cells to what privacy costs: utility by ε, signal by number of devices, attacks by ε.

A unit is a device: first the mean over the seeds' dice, then intervals and paired tests over devices. Tests of one
table and metric are one family, corrected by Holm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy import stats

from florilegium.client.calibration import planned_event, release_noise
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.evaluation.metrics import Comparison, Measured, compare
from florilegium.simulation.studies.cell import Result, read_result
from florilegium.simulation.studies.config import Cell, Label, Study, TableConfig
from florilegium.simulation.studies.statistics import METRICS, Contrast, corrected, named

COMPARED = (("shared", "base"), ("personal", "base"), ("personal", "local"), ("personal", "shuffled"))
COHORTS = (10, 30, 100, 1_000, 10_000, 100_000, 1_000_000)  # devices in a round


@dataclass(frozen=True)
class Outcome:
    """A federated cell where it stands in a table."""

    label: Label
    cell: Cell
    result: Result

    @property
    def config(self) -> ExperimentConfig:
        assert isinstance(self.cell.config, ExperimentConfig)
        return self.cell.config

    @property
    def name(self) -> str:
        return named(self.label)

    @property
    def seeds(self) -> list[Result]:
        found: list[Result] = self.result["seeds"]
        return found

    @property
    def devices(self) -> int:
        return len(self.result["devices"])

    @property
    def epsilon(self) -> float:
        """Of the device or dialogue that has spent most; infinite without noise."""
        return math.inf if self.config.privacy.mode == "none" else max(s["epsilon"] for s in self.seeds)

    @property
    def noise_multiplier(self) -> float:
        return planned_event(self.config).noise_multiplier

    @cached_property
    def signal_to_noise(self) -> float:
        """Of the last round, mean over seeds; NaN without noise."""
        last = [s["signal_to_noise"][-1] for s in self.seeds]
        return math.nan if None in last else float(np.mean(last))

    @property
    def arms(self) -> list[str]:
        return list(self.seeds[0]["arms"])

    def measured(self, arm: str, metric: str = "nll") -> Measured | None:
        """Of each device the mean over seeds; None where it was not measured."""
        found = [s["arms"].get(arm, {}).get(metric) for s in self.seeds]
        if not all(found):
            return None
        by_user = np.mean([f["by_user"] for f in found], axis=0)
        return Measured(tuple(by_user.tolist()), tuple(f["mean_per_query"] for f in found))

    def gain(self, arm: str, seed: int | None = None) -> np.ndarray:
        """(K,): by how much the arm's NLL is below the base model's, nats per token; of one seed, or the mean."""
        chosen = self.seeds if seed is None else [self.seeds[seed]]
        per_seed = [
            np.array(s["arms"]["base"]["nll"]["by_user"]) - np.array(s["arms"][arm]["nll"]["by_user"]) for s in chosen
        ]
        mean: np.ndarray = np.mean(per_seed, axis=0)
        return mean

    def length_tokens(self, arm: str) -> float:
        found = [s["arms"][arm].get("mean_length_tokens", math.nan) for s in self.seeds]
        return float(np.mean(found))

    def attack(self, name: str) -> tuple[float, float]:
        """Mean and half the range of its AUC over seeds; NaN where it was not made."""
        aucs = [a["auc"] for s in self.seeds for a in s["attacks"] if a["name"] == name]
        return (float(np.mean(aucs)), (max(aucs) - min(aucs)) / 2) if aucs else (math.nan, math.nan)

    def ceiling(self) -> float:
        """The largest AUC that the budget allows; 1 without noise."""
        return max((a["auc_ceiling"] for s in self.seeds for a in s["attacks"]), default=1.0)

    @property
    def attacks(self) -> list[str]:
        return [a["name"] for a in self.seeds[0]["attacks"]]


def outcomes(study: Study, folder: Path, table: TableConfig) -> list[Outcome]:
    """The cells of a table in its order; raises `RunError` where one has not been run."""
    found = []
    for label in (label for row in table.labels() for label in row):
        cell = study.cell(table, label)
        found.append(Outcome(label, cell, read_result(folder / "cells" / cell.key)))
    return found


def comparisons(found: Sequence[Outcome]) -> list[Contrast]:
    """Of every cell, arms against each other; corrected within a metric."""
    made = [c for o in found for pair in COMPARED for metric in METRICS if (c := _contrast(o, *pair, metric))]
    return [c for metric in METRICS for c in corrected([c for c in made if c.metric == metric])]


def _contrast(o: Outcome, better: str, than: str, metric: str) -> Contrast | None:
    one, two = o.measured(better, metric), o.measured(than, metric)
    if one is None or two is None or len(one.by_user) < 2:
        return None
    sign = 1 if metric == "nll" else -1
    differences = np.array(one.by_user) - np.array(two.by_user)
    found: Comparison = compare(one, two, lower_is_better=metric == "nll")
    by_seed = [sign * _mean_difference(s, better, than, metric) < 0 for s in o.seeds]
    p = float(stats.ttest_1samp(differences, 0).pvalue) if differences.any() else 1.0
    return Contrast(f"{o.name}: {better}", than, metric, found, sum(by_seed), len(by_seed), p, True)


def _mean_difference(seed: Result, better: str, than: str, metric: str) -> float:
    one, two = (np.array(seed["arms"][arm][metric]["by_user"]) for arm in (better, than))
    return float((one - two).mean())


# -- signal to noise by the number of devices ---------------------------------------------------------------------


@dataclass(frozen=True)
class Reach:
    """Signal to noise of the mean release of a first round of so many devices, under one cell's noise."""

    name: str
    simulated: int
    by_devices: dict[int, float]


def reaches(found: Sequence[Outcome]) -> list[Reach]:
    """For each cell with noise that has a twin without.

    The signal is the twin's: ‖mean change‖² of n devices is µ² + v / n in expectation, with the squared norm µ² of the
    mean over all people and the variance v between them, both estimated without bias from the devices simulated. The
    noise is rescaled to n devices. Beyond the number that was simulated this supposes more people of the same kind.
    """
    twins = {but_noise(o): o for o in found if o.config.privacy.mode == "none"}
    return [
        Reach(
            f"{o.config.privacy.mode}, ε {o.config.privacy.epsilon:g}",
            o.devices,
            {n: _ratio(o, twins[key], n) for n in sorted({*COHORTS, o.devices})},
        )
        for o in found
        if o.config.privacy.mode != "none" and (key := but_noise(o)) in twins
    ]


def but_noise(o: Outcome) -> str:
    """All that decides how much of a release is signal: what a cell has in common with its twin without noise.

    The rate of noisy steps does not: signal and noise of a first round are both in proportion to it.
    """
    privacy = o.config.privacy
    rate = {"learning_rate"} if privacy.by_dialogue else set[str]()
    return f"{privacy.by_dialogue} {privacy.clip_norm_l2} {o.config.shared.model_dump_json(exclude=rate)}"


def _ratio(o: Outcome, twin: Outcome, devices: int) -> float:
    squares = [
        max(0.0, s["mean_square"] - s["variance"] / max(1, s["releases"][0])) + s["variance"] / devices
        for s in twin.seeds
    ]
    by_rate = o.config.privacy.by_dialogue and o.config.shared.learning_rate / twin.config.shared.learning_rate
    noise = release_noise(o.config, 1, 0).of_mean(devices) / (by_rate or 1.0)
    return float(np.sqrt(np.mean(squares)) / (noise * math.sqrt(o.seeds[0]["width"])))
