"""A world of unequal devices: sums that can be done by hand, and fates that depend on no order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, takewhile
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from florilegium.server.config import devices_to_ask
from florilegium.simulation.config import WorldConfig
from florilegium.simulation.evaluation.fairness import jain, summarize, worst_decile
from florilegium.simulation.heterogeneity.availability import (
    Arrival,
    Outcome,
    Round,
    Work,
    arrivals,
    simulate_round,
    trained_tokens,
)
from florilegium.simulation.heterogeneity.classes import (
    DeviceClass,
    DevicePopulation,
    class_of,
    load_classes,
    local_hour,
    uniform,
    zone_h,
)
from florilegium.simulation.heterogeneity.clock import BufferedClock
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.events import MeanGain
from florilegium.simulation.settings import ConfigError

SLOW = DeviceClass(
    name="slow",
    share=1,
    train_tokens_per_s=100,
    memory_bytes=1000,
    up_bits_per_s=8000,
    down_bits_per_s=8000,
    joules_per_token=0.5,
    joules_per_byte=0.25,
    available=(1.0,) * 24,
    source="made up for a test",
)
FAST = SLOW.model_copy(update={"name": "fast", "train_tokens_per_s": 1000})
WORK = Work(tokens_before=1000, tokens_after=200, down_bytes=1000, up_bytes=1000)  # slow: 1 + 10 + 1 s, then 2 s
NAMES = [f"d{i}" for i in range(40)]


def world(*classes: DeviceClass, seed: int = 0, **settings: float) -> DevicePopulation:
    kinds = tuple(c.model_copy(update={"share": 1 / len(classes)}) for c in classes)
    return DevicePopulation(WorldConfig(classes="made-up", **settings), kinds, seed)  # type: ignore[arg-type]


def absent(kind: DeviceClass) -> DeviceClass:
    return kind.model_copy(update={"available": (0.0,) * 24})


def outcomes(played: Round) -> Counter[str]:
    return Counter(f.outcome for f in played.fates)


def test_a_device_takes_the_seconds_and_joules_of_its_class() -> None:
    played = simulate_round(world(SLOW), 1, 0, {"d": WORK}, wanted=1)
    # 1000 bytes at 8 kbit/s: 1 s; 1000 tokens at 100 a second: 10 s; 200 more after the answer: 2 s
    # 1200 tokens at 0.5 J and 2000 bytes at 0.25 J
    assert played.fates == (Outcome("d", "slow", "answers", 12.0, 14.0, 1100.0, 1000, 1000),)
    assert played.duration_s == 12.0 and played.answers == ("d",)


def test_a_token_that_is_read_is_a_third_of_one_that_is_trained() -> None:
    assert trained_tokens(trained=100, read=60) == 120


def test_over_sampling_rounds_up_but_not_by_a_rounding_error() -> None:
    assert [devices_to_ask(10, f) for f in (1.0, 1.1, 1.3, 1.25)] == [10, 11, 13, 13]


def test_the_kth_answer_ends_the_round_and_the_others_are_late() -> None:
    asked = {f"d{i}": replace(WORK, tokens_before=100 * i) for i in range(1, 6)}  # arrive after 3, 4, 5, 6, 7 s
    played = simulate_round(world(SLOW), 1, 0, asked, wanted=3)
    assert played.duration_s == 5 and played.answers == ("d1", "d2", "d3")
    late = [f for f in played.fates if f.outcome == "late"]
    assert [f.arrives_s for f in late] == [6, 7]
    assert late[0].energy_joules == 0.5 * (400 + 200) + 0.25 * 2000  # all of its work


def test_what_arrives_after_the_deadline_is_late() -> None:
    asked = {f"d{i}": replace(WORK, tokens_before=100 * i) for i in range(1, 6)}
    played = simulate_round(world(SLOW, deadline_s=5), 1, 0, asked, wanted=5)
    assert played.duration_s == 5 and played.answers == ("d1", "d2", "d3")
    assert outcomes(played) == {"answers": 3, "late": 2}


def test_a_round_ends_with_the_last_answer_when_nobody_else_is_awaited() -> None:
    assert simulate_round(world(SLOW, deadline_s=100), 1, 0, {"d": WORK}, wanted=2).duration_s == 12


def test_a_round_without_devices_takes_the_deadline_or_the_pause() -> None:
    gone = {d: WORK for d in NAMES}
    for settings, expected in (({"deadline_s": 7.0}, 7), ({"idle_s": 30.0}, 30)):
        played = simulate_round(world(absent(SLOW), **settings), 1, 0, gone, wanted=5)
        assert outcomes(played) == {"unavailable": 40} and played.duration_s == expected and not played.answers
        assert sum(f.energy_joules + f.busy_s + f.down_bytes for f in played.fates) == 0


def test_a_device_without_the_memory_never_takes_part() -> None:
    assert outcomes(simulate_round(world(SLOW), 1, 0, {"d": WORK}, 1, needed_bytes=1000)) == {"answers": 1}
    assert outcomes(simulate_round(world(SLOW), 1, 0, {"d": WORK}, 1, needed_bytes=1001)) == {"too-small": 1}


def test_who_drops_out_has_done_a_part_in_order() -> None:
    asked = {f"d{i}": WORK for i in range(2000)}
    played = simulate_round(world(SLOW, drop_out=0.25, deadline_s=60), 1, 0, asked, wanted=2000)
    dropped = [f for f in played.fates if f.outcome == "dropped-out"]
    assert 0.22 < len(dropped) / 2000 < 0.28 and played.duration_s == 60
    assert sum(f.busy_s for f in dropped) / len(dropped) == pytest.approx(6, abs=0.6)  # uniform over 12 s
    for fate in dropped:
        assert fate.arrives_s is None and 0 <= fate.busy_s < 12 and fate.energy_joules < 1000
        assert fate.down_bytes == (1000 if fate.busy_s >= 1 else int(1000 * fate.busy_s))
        assert fate.up_bytes == pytest.approx(max(0, 1000 * (fate.busy_s - 11)), abs=1)


@given(st.permutations(NAMES), st.integers(0, 100), st.integers(0, 10**6), st.integers(1, 40))
def test_a_round_depends_on_no_order(order: list[str], number: int, t_s: int, wanted: int) -> None:
    there = world(SLOW, FAST, absent(FAST), drop_out=0.2, deadline_s=11.5, seed=3)
    played = simulate_round(there, number, t_s, {d: WORK for d in order}, wanted)
    assert played == simulate_round(there, number, t_s, {d: WORK for d in NAMES}, wanted)
    assert len(played.answers) <= wanted and 0 < played.duration_s <= 11.5
    assert all(f.arrives_s <= played.duration_s for f in played.fates if f.outcome == "answers" and f.arrives_s)


@given(st.sets(st.sampled_from(NAMES), min_size=1))
def test_a_device_fares_alone_as_in_company_while_nobody_is_too_many(asked: set[str]) -> None:
    there = world(SLOW, FAST, absent(SLOW), drop_out=0.3)
    together = {f.device: f for f in simulate_round(there, 7, 0, {d: WORK for d in asked}, len(asked)).fates}
    assert all(simulate_round(there, 7, 0, {d: WORK}, 1).fates[0] == fate for d, fate in together.items())


def test_classes_have_their_shares_and_zones_fill_the_day() -> None:
    classes = tuple(SLOW.model_copy(update={"name": n, "share": s}) for n, s in (("a", 0.1), ("b", 0.6), ("c", 0.3)))
    found = Counter(class_of(f"d{i}", classes, seed=5).name for i in range(20_000))
    assert {n: found[n] / 20_000 for n in "abc"} == pytest.approx({"a": 0.1, "b": 0.6, "c": 0.3}, abs=0.015)
    zones = [zone_h(f"d{i}", 5) for i in range(20_000)]
    assert Counter(int(z // 6) for z in zones) == {k: pytest.approx(5000, abs=300) for k in range(4)}
    assert [class_of(d, classes, 5) for d in reversed(NAMES)] == [class_of(d, classes, 5) for d in NAMES][::-1]
    assert [class_of(d, classes, 6) for d in NAMES] != [class_of(d, classes, 5) for d in NAMES]


@given(st.integers(0, 2**62), st.text())
def test_draws_are_below_one(seed: int, purpose: str) -> None:
    assert 0 <= uniform(seed, purpose) < 1


def test_a_device_is_there_at_its_own_hours() -> None:
    night = SLOW.model_copy(update={"available": (1.0,) * 6 + (0.0,) * 18})
    there = world(night, start_hour=20)
    for t_s in (0, 3600 * 30):
        played = simulate_round(there, 1, t_s, {d: WORK for d in NAMES}, 40)
        assert set(played.answers) == {d for d in NAMES if local_hour(there, d, t_s) < 6} != set()
    assert local_hour(there, "d", 3600 * 5) == pytest.approx((25 + zone_h("d", 0)) % 24)


def until(ends_s: float, coming: Iterator[Arrival]) -> list[Arrival]:
    return list(takewhile(lambda a: a.at_s <= ends_s, coming))


def test_asynchronous_answers_come_in_order_with_their_versions() -> None:
    alone = until(300, arrivals(world(SLOW), ["d"], lambda d: WORK, concurrency=1, buffer_size=2))
    # 12 s to the answer, 2 s more of the device's own; tried anew after the pause of 60 s: 12, 84, 156, 228, 300
    assert [a.at_s for a in alone] == [12, 84, 156, 228, 300]
    assert [(a.version, a.staleness) for a in alone] == [(0, 0), (0, 0), (1, 0), (1, 0), (2, 0)]


def test_concurrency_makes_answers_stale_and_no_device_works_twice() -> None:
    there, at_work = world(SLOW, FAST, absent(SLOW), drop_out=0.1), 8

    def answered(names: list[str]) -> list[Arrival]:
        return until(500, arrivals(there, names, lambda d: WORK, concurrency=at_work, buffer_size=2))

    ended = answered(NAMES)
    found = [a for a in ended if a.fate.outcome == "answers"]
    assert ended == answered(NAMES[::-1]) and len(found) > 50
    assert {a.fate.outcome for a in ended} == {"answers", "dropped-out"}
    assert all(a.at_s <= b.at_s for a, b in pairwise(ended)) and max(a.staleness for a in found) > 1
    assert all(a.version + a.staleness == n // 2 for n, a in enumerate(found))
    assert {class_of(a.fate.device, there.classes, 0).name for a in found} == {"slow", "fast"}
    for device in {a.fate.device for a in found}:
        own = [a.at_s for a in found if a.fate.device == device]
        fast = class_of(device, there.classes, 0).name == "fast"
        assert all(b - a >= (3.2 if fast else 14) - 1e-9 for a, b in pairwise(own))


def test_drop_outs_are_told_and_paid_for_between_answers() -> None:
    clock = BufferedClock(world(SLOW, FAST, drop_out=0.5), lambda d: WORK, 4, 0, devices=NAMES, concurrency=8)
    rounds = [clock.round(n, ()) for n in range(1, 6)]
    fates = [f for r in rounds for f in r.fates]
    lost = [f for f in fates if f.outcome == "dropped-out"]
    assert [sum(f.outcome == "answers" for f in r.fates) for r in rounds] == [4] * 5
    assert len(lost) > 5 and all(f.energy_joules > 0 for f in lost)
    for r in rounds:
        assert set(clock.makers(r.number)) == {f.device for f in r.fates} == set(r.outcomes)
        assert {d for d, outcome in r.outcomes.items() if outcome == "answers"} == set(r.answers)


def test_a_world_in_which_nobody_can_ever_answer_is_refused() -> None:
    clock = BufferedClock(world(absent(SLOW)), lambda d: WORK, 1, 0, devices=NAMES, concurrency=2)
    with pytest.raises(RunError, match="no device can ever answer"):
        clock.round(1, ())


def test_the_summary_is_of_classes_and_of_fairness() -> None:
    there = world(SLOW, FAST, drop_out=0.2)
    rounds = [simulate_round(there, n, 100 * n, {d: WORK for d in NAMES}, wanted=20) for n in range(3)]
    utility = {d: float(i) for i, d in enumerate(NAMES)}
    told = summarize(rounds, there, NAMES, utility, {d: 10 * u for d, u in utility.items()})
    slow, fast = told.classes["slow"], told.classes["fast"]
    assert slow.devices + fast.devices == 40 and slow.asked + fast.asked == 120
    assert slow.share_of_answers + fast.share_of_answers == pytest.approx(1)
    assert slow.answered + fast.answered == sum(len(r.answers) for r in rounds) == 60
    assert fast.share_of_answers > fast.devices / 40  # over-sampling prefers who is fast
    assert sum(fast.outcomes.values()) == fast.asked
    assert told.wall_s == 200 + rounds[2].duration_s
    quarters = told.fairness.utility_by_data_quartile
    assert [q.utility.mean for q in quarters] == [4.5, 14.5, 24.5, 34.5] and quarters[0].most_data == 90
    assert told.fairness.worst_decile_utility == 1.5  # 0, 1, 2, 3


def test_who_is_not_evaluated_takes_part_all_the_same() -> None:
    """Of four devices one is asked, and it alone is evaluated: 1² / (4 · 1²), and not 1."""
    told = summarize(
        [simulate_round(world(SLOW), 1, 0, {"d0": WORK}, 1)], world(SLOW), NAMES[:4], {"d0": 0.5}, {"d0": 9}
    )
    assert told.fairness.jain_participation == 0.25
    assert (told.classes["slow"].asked, told.classes["slow"].devices) == (1, 1)


def test_a_summary_of_nothing() -> None:
    told = summarize([], world(SLOW), [], {}, {})
    assert told.wall_s == 0 and told.fairness.jain_participation is None
    assert told.classes["slow"].utility == MeanGain(mean=None, ci95=None)
    few = summarize([], world(SLOW), ["a", "b"], {"a": 1.0, "b": 3.0}, {"a": 5, "b": 4})
    assert [q.utility.mean for q in few.fairness.utility_by_data_quartile] == [3, 1]


def test_fairness_by_hand() -> None:
    assert jain([2, 2, 2]) == 1 and jain([5, 0, 0, 0]) == 0.25 and jain([1, 3]) == 0.8 and jain([0, 0]) is None
    assert worst_decile(range(11)) == 0.5 and worst_decile([]) is None


@given(st.lists(st.integers(0, 1000), min_size=1).filter(any))
def test_jains_index_is_between_one_nth_and_one(amounts: list[int]) -> None:
    assert 1 / len(amounts) - 1e-9 <= (jain(amounts) or 0) <= 1 + 1e-9


def test_the_bundled_devices_load() -> None:
    classes = load_classes("world/devices")
    assert len(classes) == 6 and sum(c.share for c in classes) == pytest.approx(1)
    phones = [c for c in classes if c.name.endswith("phone")]
    assert len(phones) == 3 and all(max(c.available) == 4 * min(c.available) for c in phones)
    assert all(2 < c.train_tokens_per_s * c.joules_per_token < 40 for c in classes)  # watts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 0.9}, "must sum to 1"),
        ({"train_tokens_per_s": 0}, "classes.0.train_tokens_per_s = 0: Input should be greater than 0"),
        ({"available": [1.0] * 23}, "at least 24 items"),
        ({"available": [1.0] * 25}, "at most 24 items"),
        ({"available": [1.5] * 24}, "classes.0.available.0 = 1.5: Input should be less than or equal to 1"),
        ({"source": "  "}, "classes.0.source"),
        ({"tokens_per_s": 3}, "did you mean 'train_tokens_per_s'?"),
    ],
)
def test_a_wrong_file_is_refused_with_what_is_wrong(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(tomli_w.dumps({"classes": [SLOW.model_dump() | change]}), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_classes(path)
    assert message in str(error.value) and "mine.toml" in str(error.value)


def test_a_file_needs_sources_and_unique_names(tmp_path: Path) -> None:
    path, half = tmp_path / "mine.toml", SLOW.model_dump() | {"share": 0.5}
    path.write_text(tomli_w.dumps({"classes": [half, half]}), encoding="utf-8")
    with pytest.raises(ConfigError, match="unique, given twice: slow"):
        load_classes(path)
    path.write_text(tomli_w.dumps({"classes": [{k: v for k, v in half.items() if k != "source"}]}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"classes\.0\.source: Field required"):
        load_classes(path)
    with pytest.raises(ConfigError, match="is no file nor one of"):
        load_classes("world/nothing")


def test_settings_of_a_world_need_its_devices() -> None:
    assert WorldConfig().classes == ""
    with pytest.raises(ValidationError, match=r"drop_out without devices; set world\.classes=world/devices"):
        WorldConfig(drop_out=0.1)
