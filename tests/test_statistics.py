"""What carries every verdict: intervals, paired tests, units and corrections, each against a sum done by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from florilegium.simulation.baselines.config import BaselinesConfig
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.evaluation.metrics import (
    Measured,
    Scored,
    compare,
    derangement,
    interval,
    measure_nll,
    other_people,
)
from florilegium.simulation.personalization.config import MethodsConfig
from florilegium.simulation.personalization.interactive import Lived, better_from
from florilegium.simulation.studies import baselines_report, personalization_report, privacy_utility
from florilegium.simulation.studies.config import Cell, StudyConfig
from florilegium.simulation.studies.interactive_cell import _measured as of_lives
from florilegium.simulation.studies.interactive_cell import alarms
from florilegium.simulation.studies.statistics import contrast, corrected

SEVERAL = [[0.3, -1.2], [1.0, 10.0, 100.0], [4.1, 4.3, 3.9, 4.0, 4.4, 5.2], list(np.linspace(-1, 2, 40))]


def measured(*by_user: float) -> Measured:
    return Measured(by_user, by_user)


def p_of_two_degrees(t: float) -> float:
    """Two-sided, by Student's t with two degrees of freedom: 1 − |t| / √(t² + 2)."""
    return 1 - abs(t) / math.sqrt(t * t + 2)


# -- intervals ----------------------------------------------------------------------------------------------------


def test_an_interval_by_hand() -> None:
    """1, 2, 3: mean 2, deviation 1 with n − 1, and 4.3027 is the 97.5th percentile of t with 2 degrees of freedom."""
    half = 4.3027 / math.sqrt(3)
    assert interval([1, 2, 3]) == pytest.approx((2 - half, 2 + half), abs=1e-4)
    assert interval([1, 2, 3]) == pytest.approx((-0.484, 4.484), abs=1e-3)
    assert interval([5]) == (5, 5) and interval([5, 5, 5]) == (5, 5)
    assert interval([0, 1]) == pytest.approx((0.5 - 12.7062 / 2, 0.5 + 12.7062 / 2), abs=1e-3)  # deviation / √2 is ½


@pytest.mark.parametrize("values", SEVERAL)
def test_an_interval_is_that_of_scipy(values: list[float]) -> None:
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval(values) == pytest.approx((low, high)) == Measured(tuple(values), ()).ci95


def test_a_users_nll_is_per_token_and_each_user_counts_once() -> None:
    """6 nats of 3 tokens and 3 of 1: 9 / 4 for the user, 2 and 3 for the queries; the other user has 4 nats of 4."""
    found = measure_nll([Scored((6.0, 3.0), (3, 1)), Scored((4.0,), (4,))])
    assert found.by_user == (9 / 4, 1.0) and found.by_query == (2.0, 3.0, 1.0)
    assert found.mean_per_user == 13 / 8 and found.mean_per_query == 2.0


# -- pairs --------------------------------------------------------------------------------------------------------


def test_a_comparison_is_paired_by_user() -> None:
    """People differ a hundredfold, the arms by exactly one for each of them: nothing is uncertain."""
    found = compare(measured(1, 10, 100), measured(2, 11, 101), lower_is_better=True)
    assert (found.mean_difference, found.ci95, found.users, found.users_better) == (-1, (-1, -1), 3, 3)


@pytest.mark.parametrize(
    ("mine", "lower_is_better", "better"),
    [
        ((0.5, 0.2), False, 1),
        ((0.5, 0.4), False, 2),
        ((0.5, 0.2), True, 1),
        ((0.3, 0.2), True, 2),
        ((0.4, 0.3), True, 0),
    ],
)
def test_users_are_better_in_the_metrics_own_direction(
    mine: tuple[float, float], lower_is_better: bool, better: int
) -> None:
    """Against 0.4 and 0.3; who is as good as before is not better."""
    assert compare(measured(*mine), measured(0.4, 0.3), lower_is_better=lower_is_better).users_better == better


@pytest.mark.parametrize("metric", ["nll", "mae", "rmse", "rouge1", "accuracy"])
def test_a_contrast_is_a_paired_two_sided_t_test_by_hand(metric: str) -> None:
    """Differences −1, −0.9, −0.8: t = −0.9 / (0.1 / √3); unpaired p would be about 0.98."""
    one, two = measured(1.0, 10.1, 100.2), measured(2, 11, 101)
    found, back = (contrast("a", "b", metric, pair, [0, 0, 1]) for pair in ((one, two), (two, one)))
    assert found and back
    assert found.p == back.p == pytest.approx(p_of_two_degrees(0.9 / (0.1 / math.sqrt(3))), rel=1e-6)
    assert found.p == pytest.approx(0.0041, abs=1e-4)
    assert found.p == pytest.approx(stats.ttest_rel(one.by_user, two.by_user).pvalue)
    lower_is_better = metric in ("nll", "mae", "rmse")
    assert (found.found.users_better, found.seeds_better, found.seeds) == ((3, 2, 2) if lower_is_better else (0, 0, 2))
    verdicts = [corrected([c])[0].verdict for c in (found, back)]
    assert verdicts == (["better", "worse"] if lower_is_better else ["worse", "better"])


def test_where_nothing_differs_or_one_person_is_there_nothing_is_shown() -> None:
    same = contrast("a", "b", "nll", (measured(1, 2), measured(1, 2)), [0, 1])
    assert same and (same.p, same.seeds_better, corrected([same])[0].verdict) == (1, 0, "no difference shown")
    assert contrast("a", "b", "nll", (measured(1), measured(2)), [0]) is None


def test_five_percent_is_where_a_difference_is_shown() -> None:
    one, two = measured(1.0, 10.1, 100.2), measured(2, 11, 101)
    found = contrast("a", "b", "nll", (one, two), [0, 0, 1])
    assert found
    below, above = (corrected([replace(found, p=p)])[0] for p in (0.0499, 0.0501))
    assert below.shown and not above.shown


# -- units --------------------------------------------------------------------------------------------------------


def arm(*by_user: float) -> dict[str, Any]:
    return {"nll": {"by_user": list(by_user), "by_query": list(by_user), "mean_per_query": float(np.mean(by_user))}}


def federated(*seeds: dict[str, Any], **more: Any) -> privacy_utility.Outcome:
    """A cell of a federated study: the same devices in each seed."""
    cell = Cell(ExperimentConfig(), StudyConfig.model_validate({"kind": "federated", "tables": {"t": {}}}))
    return privacy_utility.Outcome(
        (), cell, {"devices": ["a", "b", "c"], "seeds": [{"arms": arms, **more} for arms in seeds]}
    )


def test_a_unit_of_a_federated_study_is_a_device_whatever_the_dice() -> None:
    """Two seeds of three devices are three units: of each device the mean of the two."""
    one = {"base": arm(4, 5, 6), "shared": arm(3, 4, 9)}
    two = {"base": arm(4, 5, 6), "shared": arm(1, 8, 9)}
    o = federated(one, two)
    found = o.measured("shared")
    assert found and found.by_user == (2, 6, 9) and o.measured("personal") is None
    assert o.gain("shared").tolist() == [2, -1, -3] and o.gain("shared", 1).tolist() == [3, -3, -3]
    (c,) = privacy_utility.comparisons([o])
    assert c.found.users == 3 and c.found.mean_difference == pytest.approx(2 / 3) and c.found.users_better == 1
    t = (2 / 3) / (stats.tstd([-2, 1, 3]) / math.sqrt(3))
    assert c.p == pytest.approx(p_of_two_degrees(t)) and (c.seeds_better, c.seeds) == (0, 2)


def test_a_table_and_a_metric_are_one_family() -> None:
    """Four comparisons of one cell: the smallest p is taken four times."""
    arms = {"base": arm(4, 5, 6), "local": arm(3.9, 4.8, 5.9), "shared": arm(3.9, 4.9, 5.8), "personal": arm(3, 4.1, 5),
            "shuffled": arm(4.3, 5.1, 6.2)}  # fmt: skip
    family = privacy_utility.comparisons([federated(arms)])
    assert len(family) == 4
    ranked = sorted(family, key=lambda c: c.p)
    by_hand = [min(1.0, c.p * m) for c, m in zip(ranked, (4, 3, 2, 1), strict=True)]
    highest = [max(by_hand[: k + 1]) for k in range(4)]
    assert [c.p_holm for c in ranked] == pytest.approx(highest)
    assert all(a.p_holm <= b.p_holm for a, b in pairwise(ranked) if a.p_holm and b.p_holm)


def test_an_attack_is_the_mean_over_seeds_and_the_ceiling_the_largest() -> None:
    found = [{"name": "loss", "auc": auc, "auc_ceiling": 0.7 + auc / 10} for auc in (0.5, 0.6)]
    o = federated({"base": arm(1)})
    o = replace(o, result={**o.result, "seeds": [{"attacks": [a]} for a in found]})
    assert o.attack("loss") == pytest.approx((0.55, 0.05)) and o.ceiling() == pytest.approx(0.76)
    assert math.isnan(o.attack("gradient")[0])


def test_a_unit_of_other_studies_is_a_person_of_a_seed() -> None:
    """Nobody is in two seeds: two seeds of three and two people are five units, each with its own seed."""
    seeds = [
        {"arms": {"own": arm(1, 2, 3)}, "history": [9, 2, 5], "epsilon": None, "tokens": 4},
        {"arms": {"own": arm(4, 6)}, "history": [1, 7], "epsilon": None, "tokens": 6},
    ]
    shape = {"adapter": {"rank": 4, "alpha": 4, "factors": "both"}}
    config = BaselinesConfig.model_validate({"personal": shape, "shared": shape, "privacy": {"mode": "none"}})
    rival = baselines_report.Outcome((), config, {"seeds": seeds})
    method = personalization_report.Outcome(
        (), MethodsConfig.model_validate({"model": {"name": "x"}}), {"seeds": seeds}
    )
    for o in (rival, method):
        found = o.measured()
        assert found and found.by_user == (1, 2, 3, 4, 6) and o.seeds == [0, 0, 0, 1, 1]
    assert rival.by_seed() == [2, 5] and rival.mean("tokens") == 5


def test_thirds_of_the_people_by_what_they_have() -> None:
    seeds = [
        {"arms": {"own": arm(1, 2, 3)}, "history": [9, 2, 5]},
        {"arms": {"own": arm(4, 5, 6)}, "history": [1, 7, 8]},
    ]
    o = personalization_report.Outcome((), MethodsConfig.model_validate({"model": {"name": "x"}}), {"seeds": seeds})
    assert [(name, m.by_user) for name, m in o.by_activity()] == [("1–2", (4, 2)), ("5–7", (3, 5)), ("8–9", (6, 1))]


# -- lives --------------------------------------------------------------------------------------------------------


def lived(nll: list[list[float]]) -> Lived:
    figures = np.array(nll)
    rows = torch.zeros(len(nll), 1)
    return Lived(
        figures, figures / 10, figures > 2, figures, figures, figures * 10, [], rows, rows, seconds=0.0, spent={}
    )


def test_the_figures_of_a_life_are_of_its_second_half() -> None:
    """(1, 2 | 3, 4): 3.5, and not the 1.5 of what came before anything was learned."""
    found = of_lives(lived([[1, 2, 3, 4], [4, 4, 0, 2]]))
    assert found["nll"] == {"by_user": [3.5, 1.0], "by_query": [3, 4, 0, 2], "pooled": 2.25}
    assert found["rouge1"]["by_user"] == pytest.approx([0.35, 0.1]) and found["accepted"]["by_user"] == [1.0, 0.0]
    assert found["mean_length_tokens"] == 22.5


def test_an_alarm_is_a_movement_beyond_nine_tenths_of_other_peoples() -> None:
    """Others move by 0, 0.1 … 0.9, so that the limit is 0.81: 1.0 is beyond it always, one of their own in ten is."""
    usual = np.tile(np.arange(10) / 10, (3, 1))
    found = alarms(usual, np.full((3, 4), 1.0), [0, 1, 2])
    assert found == {"alarms after the shift": 1.0, "alarms without one": pytest.approx(0.1)}
    assert alarms(usual, np.full((1, 4), 0.5), [2])["alarms after the shift"] == 0.0
    own = np.vstack([np.full(10, 5.0), usual])  # who is alike to nobody is no measure for itself
    assert alarms(own, usual[:1], [0])["alarms without one"] == 1.0


def test_better_from_is_where_the_difference_stays_below_zero() -> None:
    """A window of 2 over differences 1, 1, −3, −1, −1: means 1, −1, −2, −1, so from the third interaction on."""
    one, other = np.array([[1.0, 1.0, -3.0, -1.0, -1.0]]), np.zeros((1, 5))
    assert better_from(one, other, window=2) == 3
    assert better_from(-one, other, window=2) is None and better_from(other - 1, other, window=2) == 2


@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_strangers_adapter_is_somebody_elses_and_everybodys_once(count: int) -> None:
    swapped = derangement(count, seed=3)
    assert sorted(swapped) == list(range(count)) and all(k != g for k, g in enumerate(swapped))


@given(st.lists(st.sampled_from("abcde"), min_size=2, max_size=12), st.integers(0, 9))
def test_nobody_gets_what_is_their_own_at_another_moment(owners: list[str], seed: int) -> None:
    if max(map(owners.count, owners)) > len(owners) / 2:
        with pytest.raises(DataError, match="more than half"):
            other_people(owners, seed)
        return
    swapped = other_people(owners, seed)
    assert sorted(swapped) == list(range(len(owners))) and all(owners[k] != owners[g] for k, g in enumerate(swapped))
    assert len(set(owners)) < len(owners) or swapped == derangement(len(owners), seed)
