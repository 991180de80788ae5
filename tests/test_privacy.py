"""Accounting, DP-SGD on a row, releases and their mean: figures that can be checked by hand."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from florilegium.client.calibration import planned_event
from florilegium.client.config import DeviceConfig
from florilegium.client.flower_replies import _release_reply, greeting, refusal
from florilegium.privacy.accounting import Event, calibrate, covered, epsilon
from florilegium.privacy.dpsgd import PrivateRow, clipped_sum
from florilegium.privacy.noise import ReleaseNoise, column, inverse_column
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.release import Release, ReleaseRefusedError, Schema
from florilegium.privacy.reply_gate import check_reply
from florilegium.privacy.seeds import derive_key, derive_seed, fresh_secret
from florilegium.server.aggregation import Mean
from florilegium.server.release_collector import signal_to_noise, signal_to_noise_floor


def test_epsilon_of_known_settings() -> None:
    assert epsilon([Event(1.0, 0.01, 1000)], 1e-5, "add-or-remove-one") == pytest.approx(1.828, abs=0.01)
    assert epsilon([Event(1.0, 0.1, 100)], 1e-5) == pytest.approx(10.52, abs=0.02)
    assert epsilon([], 1e-5) == 0
    assert epsilon([Event(0.0, 0.5, 1)], 1e-5) == float("inf")


def test_calibrated_noise_costs_the_budget_and_no_more() -> None:
    sigma = calibrate(8.0, 1e-5, 0.5, 12)
    assert 7.9 < epsilon([Event(sigma, 0.5, 12)], 1e-5) <= 8.0
    assert epsilon([Event(sigma, 0.5, 4)] * 3, 1e-5) <= 8.0
    assert epsilon([Event(sigma, 0.5, 4)] * 4, 1e-5) > 8.0


def test_what_was_chosen_after_releases_is_only_spent_where_that_is_covered() -> None:
    """Steps that are all alike, or Gaussians without sampling; no mixture with sampling."""
    assert covered([]) and covered([Event(1.0, 0.5, 1), Event(1.0, 0.5, 7)])
    assert covered([Event(1.0, 1.0, 1), Event(3.0, 1.0, 2)])
    assert not covered([Event(1.0, 0.5, 1), Event(2.0, 0.5, 1)])
    assert not covered([Event(1.0, 0.5, 1), Event(1.0, 0.25, 1)])
    assert not covered([Event(1.0, 1.0, 1), Event(1.0, 0.5, 1)])


SCHEMA, PLAN = Schema((("a", (2, 3)), ("b", (4,)))), RoundPlan(1, 0)


def private_row(width: int, noise: float, seed: int = 0) -> PrivateRow:
    return PrivateRow(
        torch.zeros(width), learning_rate=1.0, clip_norm_l2=1.0, noise_multiplier=noise, expected_batch=4.0,
        key=seed,
    )  # fmt: skip


def test_without_noise_a_step_is_the_clipped_sum_over_the_expected_batch() -> None:
    gradients = torch.tensor([[3.0, 4.0], [0.3, 0.4], [float("nan"), 1.0]])
    row = private_row(2, 0.0)
    row.step(gradients)
    torch.testing.assert_close(row.row, -torch.tensor([0.9, 1.2]) / 4, atol=1e-5, rtol=0)


def test_noise_has_the_announced_deviation_also_on_an_empty_sample() -> None:
    row = private_row(250_000, 2.0)
    row.step(torch.zeros(0, 250_000))
    assert float(row.row.std()) == pytest.approx(2.0 / 4, rel=0.005)


def test_noise_is_normal_and_every_bit_of_its_key_counts() -> None:
    noise = {key: private_row(200_000, 4.0, key) for key in (7, 7 + 2**32, 7 + 2**64, 7 + 2**127)}
    for row in noise.values():
        row.step(torch.zeros(0, 200_000))
        assert stats.kstest(row.row.numpy(), "norm").pvalue > 1e-3
    drawn = np.stack([row.row.numpy() for row in noise.values()])
    assert np.abs(np.corrcoef(drawn) - np.eye(4)).max() < 0.02


def test_each_step_has_noise_of_its_own() -> None:
    row = private_row(2000, 1.0)
    drawn = [torch.zeros(2000)]
    for _ in range(3):
        row.step(torch.zeros(0, 2000))
        drawn.append(row.row.clone())
    noise = np.diff(torch.stack(drawn).numpy(), axis=0)  # (3, P)
    assert np.abs(np.corrcoef(noise) - np.eye(3)).max() < 0.1  # σ = 0.022


def test_a_secret_is_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every clock stopped 200 secrets differ, and each of 128 bits is set in about half of them."""
    for clock in ("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time_ns"):
        monkeypatch.setattr(time, clock, lambda: 1)
    secrets = [fresh_secret() for _ in range(200)]
    assert len(set(secrets)) == 200
    assert all(55 < sum(s >> bit & 1 for s in secrets) < 145 for bit in range(128))  # σ = 7.1


@pytest.mark.parametrize("mode", ["example-local", "user-local", "user-central"])
def test_a_plan_pays_for_each_of_its_steps_and_for_replaced_ones(mode: str) -> None:
    """What a release is charged times the releases is the budget: of one replaced, where the server is not trusted."""
    privacy = {"mode": mode, "epsilon": 4.0}
    config = DeviceConfig.model_validate({"rounds": 3, "shared": {"steps_per_round": 4}, "privacy": privacy})
    event = planned_event(config)
    adjacency = "add-or-remove-one" if mode == "user-central" else "replace-one"
    assert event.steps == (4 if mode == "example-local" else 1)
    assert 3.95 < epsilon([event] * 3, 1e-5, adjacency) <= 4.0
    assert config.privacy.budget.adjacency == adjacency


def test_no_reply_is_made_past_the_gate() -> None:
    row = np.full(10, np.nan, dtype=np.float32)
    release = Release(3, "0f" * 32, SCHEMA.split(row))
    for made in (
        lambda: refusal("what I said"),
        lambda: greeting("x" * 65),
        lambda: _release_reply(release, PLAN, SCHEMA),
    ):
        with pytest.raises(ReleaseRefusedError):
            made()


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3), min_size=1, max_size=5))
def test_one_example_moves_the_clipped_sum_by_at_most_the_clipping_norm(rows: list[list[float]]) -> None:
    gradients = torch.tensor(rows)
    moved = clipped_sum(gradients, 1.0) - clipped_sum(gradients[1:], 1.0)
    assert float(moved.norm()) <= 1.0 + 1e-12  # sums are in float64


def test_a_release_is_of_the_agreed_form_or_is_refused() -> None:
    row = np.arange(10, dtype=np.float32)
    release = Release.of(row, 0, "head", SCHEMA)
    assert np.array_equal(SCHEMA.join(release.arrays), row)
    assert SCHEMA.size_bytes == 40
    for wrong in (
        {"a": release.arrays["a"]},
        {**release.arrays, "text": np.zeros(1, np.float32)},
        {"a": release.arrays["a"], "b": np.zeros(5, np.float32)},
        {"a": release.arrays["a"], "b": np.zeros(4, np.float64)},
        {"a": release.arrays["a"], "b": np.full(4, np.inf, np.float32)},
    ):
        with pytest.raises(ReleaseRefusedError):
            SCHEMA.check(wrong)


@given(st.permutations(range(6)))
def test_the_order_of_arrival_never_changes_the_mean(order: list[int]) -> None:
    rows = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    mean, shuffled = Mean(5), Mean(5)
    for i in range(6):
        mean.add(f"d{i}", rows[i])
        shuffled.add(f"d{order[i]}", rows[order[i]])
    assert np.array_equal(mean.change(), shuffled.change())
    np.testing.assert_allclose(mean.change(), rows.mean(0), atol=1e-6)


def test_signal_to_noise_by_hand() -> None:
    assert signal_to_noise(5.0, ReleaseNoise(on_device=4.0 * 0.75).of_mean(4), 4) == pytest.approx(4 / 3)
    assert signal_to_noise(1.0, ReleaseNoise(on_device=3.0).of_mean(4), 4) == 0


def test_noise_alone_seems_to_have_a_signal_one_time_in_twenty() -> None:
    rng, width = np.random.default_rng(0), 3072
    floor = signal_to_noise_floor(width)
    assert floor == pytest.approx(0.2049, abs=1e-4)  # √(1.645 √(2 / 3072))
    found = [signal_to_noise(float(np.linalg.norm(rng.normal(0, 2, width))), 2.0, width) for _ in range(2000)]
    assert 0.03 < np.mean([ratio > floor for ratio in found]) < 0.07
    assert ReleaseNoise(on_sum=6.0).of_mean(4) == 1.5


def test_seeds_differ_by_purpose_and_fit_a_generator() -> None:
    assert derive_seed(0, "a", 1) == derive_seed(0, "a", 1)
    assert len({derive_seed(0, "a", i) for i in range(100)} | {derive_seed(1, "a", 0)}) == 101
    assert 0 <= derive_seed(0, "x") < 2**63
    assert len({derive_key(0, "a", i) >> 64 for i in range(100)}) == 100  # the upper half differs too


# -- noise on the server -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bands", [1, 2, 5])
def test_correlated_noise_is_that_of_the_inverse_matrix(bands: int) -> None:
    """C has columns of length 1, orthogonal for rounds `bands` apart: what one participation costs."""
    rounds = 12
    c = sum(np.diag(np.full(rounds - k, w), -k) for k, w in enumerate(column(bands)))
    inverse = sum(np.diag(np.full(rounds - k, w), -k) for k, w in enumerate(inverse_column(bands, rounds)))
    np.testing.assert_allclose(c @ inverse, np.eye(rounds), atol=1e-12)
    gram = c.T @ c
    assert np.allclose(np.diag(gram)[: rounds - bands], 1)
    assert np.abs(gram[np.abs(np.subtract.outer(range(rounds), range(rounds))) >= bands]).max(initial=0) < 1e-12


def test_the_matrix_is_the_published_one() -> None:
    """Fichtenberger et al. 2023: 1, 1/2, 3/8, 5/16; its inverse within the bands are their differences."""
    published = np.array([1, 1 / 2, 3 / 8, 5 / 16])
    norm = np.linalg.norm(published)
    assert column(4) == pytest.approx(published / norm)
    assert inverse_column(4, 4) == pytest.approx(norm * np.diff(published, prepend=0))


def test_correlated_noise_has_the_announced_covariance_and_adds_less_to_the_sum_of_all_rounds() -> None:
    noise = ReleaseNoise(on_sum=2.0, bands=4, secret=5)
    drawn = np.stack([noise.drawn(n, 100_000) for n in range(1, 9)])  # (8, P)
    inverse = sum(np.diag(np.full(8 - k, w), -k) for k, w in enumerate(inverse_column(4, 8)))
    np.testing.assert_allclose(drawn @ drawn.T / 1e5, 4 * inverse @ inverse.T, atol=0.1)
    assert np.array_equal(drawn[6], noise.drawn(7, 100_000))  # a repeated round has the same
    assert drawn.sum(0).std() < 0.7 * 2.0 * np.sqrt(8)


# -- the gate -----------------------------------------------------------------------------------------------------

anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.just([1.0])
names = st.sampled_from(["device", "error", "adopted", "protocol", "version", "head", "loss", "text", "seconds"])
arrays = st.none() | st.dictionaries(
    st.sampled_from(["a", "b", "personal", "text"]),
    st.sampled_from([
        np.zeros((2, 3), np.float32), np.zeros(4, np.float32), np.full(4, np.nan, np.float32), np.zeros(4), "text",
    ]),
    max_size=3,
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # a busy machine is no failure
@given(st.dictionaries(names, anything, max_size=4), arrays)
def test_whatever_is_not_a_reply_of_the_agreed_form_does_not_leave(
    header: dict[str, object], arrays: dict[str, object] | None
) -> None:
    """What passes is made of public values of fixed form: no text, no number that says something of the data."""
    try:
        check_reply(header, arrays, SCHEMA)
    except ReleaseRefusedError:
        return
    assert set(header) in ({"device"}, {"error"}, {"adopted"}, {"protocol", "version", "head"})
    for value in header.values():
        assert type(value) is int or (type(value) is str and re.fullmatch(r"[\w.-]{1,64}", value))
    if arrays is not None:
        assert {k: v.shape for k, v in arrays.items()} == dict(SCHEMA.shapes)  # type: ignore[attr-defined]


def test_a_release_and_the_three_other_replies_pass() -> None:
    row = np.arange(10, dtype=np.float32)
    check_reply({"protocol": 1, "version": 3, "head": "0f" * 32}, SCHEMA.split(row), SCHEMA)
    for header in ({"device": "device-00001"}, {"error": "no-release"}, {"adopted": 4}):
        check_reply(header, None, SCHEMA)
        with pytest.raises(ReleaseRefusedError, match="arrays"):
            check_reply(header, SCHEMA.split(row), SCHEMA)
    for wrong in (
        {"protocol": 1, "version": 3, "head": "0f" * 32, "loss": 1.0},
        {"protocol": 1, "version": 3, "head": "what I said to my doctor"},
        {"protocol": 1, "version": True, "head": "0f" * 32},
        {"error": "KeyError: 'what I said to my doctor'"},
        {"adopted": -1},
    ):
        with pytest.raises(ReleaseRefusedError):
            check_reply(wrong, SCHEMA.split(row) if "head" in wrong else None, SCHEMA)
