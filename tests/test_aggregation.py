"""Rules, server optimizers, products of factors, encodings: figures that can be checked by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from florilegium.privacy.encoding import ENCODINGS
from florilegium.privacy.release import Array, ReleaseRefusedError, Schema
from florilegium.server.aggregation import RULES, Krum, Mean, Rule, TooFewReleasesError, TrimmedMean
from florilegium.server.config import ServerConfig
from florilegium.server.fedbuff import weight
from florilegium.server.fixed_point import BadReleaseError
from florilegium.server.lora_products import AveragingError, MeanOfProducts, split_factors
from florilegium.server.optimizers import (
    OPTIMIZERS,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    Moments,
    ServerOptimizer,
    StepTooLargeError,
    step_at,
)

SCHEMA = Schema((("q.lora_A", (2, 5)), ("q.lora_B", (4, 2)), ("v.lora_A", (2, 3)), ("v.lora_B", (6, 2))))
WIDTH = SCHEMA.size_bytes // 4
SETTINGS = ServerConfig(trimmed_share=0.2, byzantine=2, krum_keep=3)


def row(*numbers: float) -> Array:
    return np.array(numbers, dtype=np.float32)


def drawn(seed: int, count: int, width: int = WIDTH) -> Array:
    """(count, width) rows."""
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def given_to(rule: Rule, rows: Sequence[Array] | Array) -> Rule:
    for k, each in enumerate(rows):
        rule.add(f"d{k:03}", each)
    return rule


# -- rules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), order=st.permutations(range(9)))
def test_no_order_of_arrival_changes_a_bit(name: str, seed: int, order: list[int]) -> None:
    rows = drawn(seed, 9)
    rows[3], rows[4] = rows[7], rows[8]  # ties
    straight, shuffled = RULES[name](WIDTH, SETTINGS), RULES[name](WIDTH, SETTINGS)
    for k in range(9):
        straight.add(f"d{k}", rows[k])
        shuffled.add(f"d{order[k]}", rows[order[k]])
    assert straight.change().tobytes() == shuffled.change().tobytes()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e7])
def test_what_is_no_release_is_refused_and_leaves_no_trace(name: str, bad: float) -> None:
    rows = drawn(0, 8, 3)
    rule = given_to(RULES[name](3, SETTINGS), rows)
    before = rule.change()
    for wrong in (row(0, bad, 0), row(1), row(1, 2, 3, 4)):
        with pytest.raises(BadReleaseError):
            rule.add("other", wrong)
    assert rule.count == 8 and (rule.change() == before).all()


def test_a_sum_holds_as_much_of_a_hundred_rows_as_of_none() -> None:
    rule = RULES["mean"](WIDTH, SETTINGS)
    assert rule.held_bytes == 16 * WIDTH
    assert given_to(rule, drawn(0, 100)).held_bytes == 16 * WIDTH


@pytest.mark.parametrize("name", ["trimmed-mean", "krum"])
def test_a_robust_rule_says_that_it_holds_every_row(name: str) -> None:
    rule = given_to(RULES[name](WIDTH, SETTINGS), drawn(0, 10))
    assert rule.held_bytes == 10 * 4 * WIDTH
    with pytest.raises(BadReleaseError, match="d004 has sent"):
        rule.add("d004", drawn(1, 1)[0])


def test_a_stale_release_counts_less() -> None:
    assert [weight(tau) for tau in (0, 3, 8)] == [1, 1 / 2, 1 / 3]
    mean = Mean(2)
    mean.add("fresh", row(3, 0))
    mean.add("stale", row(6, 2), weight=weight(3))
    assert mean.change(over=3).tolist() == pytest.approx([2, 1 / 3])
    with pytest.raises(ValueError, match="to come"):
        weight(-1)


def test_means_of_nothing_are_zero() -> None:
    for name in ("mean", "trimmed-mean"):
        assert RULES[name](3, SETTINGS).change().tolist() == [0, 0, 0]


def test_the_mean_carries_noise_over_those_who_were_asked() -> None:
    mean = given_to(RULES["mean"](2, SETTINGS), [row(1, 2), row(3, 4)])
    assert mean.change().tolist() == [2, 3]
    assert mean.change(np.array([1.0, -1.0]), over=5).tolist() == [1, 1]


def test_a_number_is_averaged_over_those_who_train_it() -> None:
    mean = Mean(4)
    mean.add("small", row(2, 0, 4, 0), np.array([True, False, True, False]))
    mean.add("large", row(4, 6, 0, 0), np.array([True, True, True, False]))
    assert mean.senders.tolist() == [2, 1, 2, 0]
    assert mean.change().tolist() == [3, 6, 2, 0]
    asked = np.array([4, 2, 2, 0])
    assert mean.change(np.array([2.0, 0, 0, 9.0]), over=asked).tolist() == [2, 3, 2, 0]  # (2 + 4 + 2) / 4 = 2
    with pytest.raises(BadReleaseError, match="trains none"):
        mean.add("odd", row(1, 1, 0, 0), np.array([True, False, True, False]))


def test_the_trimmed_mean_leaves_out_both_ends_of_each_number() -> None:
    rule = given_to(TrimmedMean(2, 0.2), [row(1, -1000), row(2, 1), row(3, 2), row(4, 3), row(1000, 4)])
    assert rule.change().tolist() == [3, 2]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 12), share=st.floats(0, 0.499))
def test_the_trimmed_mean_lies_between_what_was_sent(seed: int, count: int, share: float) -> None:
    rows = drawn(seed, count, 5)
    change = given_to(TrimmedMean(5, share), rows).change()
    assert (rows.min(axis=0) - 1e-6 <= change).all() and (change <= rows.max(axis=0) + 1e-6).all()


def test_trimming_nothing_is_the_mean_to_the_bit_over_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("florilegium.server.aggregation.BLOCK", 7)
    rows, mean = drawn(0, 11), Mean(WIDTH)
    assert given_to(TrimmedMean(WIDTH, 0.0), rows).change().tobytes() == given_to(mean, rows).change().tobytes()


def test_liars_cannot_move_the_trimmed_mean_out_of_the_honest_range() -> None:
    honest, lies = drawn(0, 8, 6), np.full((2, 6), 4000, dtype=np.float32)
    change = given_to(TrimmedMean(6, 0.2), [*lies, *honest]).change()
    assert (honest.min(axis=0) <= change).all() and (change <= honest.max(axis=0)).all()
    assert np.abs(given_to(RULES["mean"](6, SETTINGS), [*lies, *honest]).change()).min() > 700


@pytest.mark.parametrize(("share", "count", "cut"), [(0.29, 100, 29), (0.1, 30, 3), (0.1, 9, 0), (0.499, 3, 1)])
def test_a_share_of_the_releases_is_a_whole_number_of_them(share: float, count: int, cut: int) -> None:
    rule = given_to(TrimmedMean(1, share), [row(2.0**k if k < 12 else -k) for k in range(count)])
    ordered = np.sort([each[0] for each in rule.by_name()])  # type: ignore[attr-defined]
    assert rule.change()[0] == pytest.approx(ordered[cut : count - cut].mean(), rel=1e-6)


def test_krum_scores_are_sums_over_the_nearest_others() -> None:
    rule = Krum(1, byzantine=1)  # n − f − 2 = 2 nearest of 5
    given_to(rule, [row(0), row(1), row(2), row(4), row(100)])
    assert rule.scores() == {"d000": 1 + 4, "d001": 1 + 1, "d002": 1 + 4, "d003": 4 + 9, "d004": 96**2 + 98**2}
    assert rule.kept() == ["d001"] and rule.change().tolist() == [1]
    several = Krum(1, byzantine=1, keep=2)
    given_to(several, [row(0), row(1), row(2), row(4), row(100)])
    assert several.kept() == ["d001", "d000"]  # d000 and d002 are as near: the first by name
    assert several.change().tolist() == [0.5]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), liars=st.integers(0, 3), keep=st.integers(1, 5), together=st.booleans())
def test_krum_keeps_no_far_row(seed: int, liars: int, keep: int, together: bool) -> None:
    honest, rule = drawn(seed, liars + 5, 8), Krum(8, liars, keep)
    far = drawn(seed + 1, 1 if together else liars, 8) * 100 + 1000
    for k in range(liars):
        rule.add(f"a{k}", far[0 if together else k])
    assert set(given_to(rule, honest).kept()) <= {f"d{k:03}" for k in range(len(honest))}  # type: ignore[attr-defined]
    chosen = [honest[int(device[1:])] for device in rule.kept()]
    np.testing.assert_allclose(rule.change(), np.mean(chosen, axis=0), atol=1e-6)


def test_near_rows_stay_apart_beside_a_far_one() -> None:
    """‖x‖² + ‖y‖² − 2 x·y in float32 is 0 or worse for rows that are 0.01 apart around 1000."""
    rule = Krum(2, byzantine=1)
    given_to(rule, [row(1000, 0), row(1000.25, 0), row(1000.5, 0), row(1001.5, 0), row(-4000, 0)])
    assert rule.scores()["d001"] == 0.125 and rule.kept() == ["d001"]


def test_krum_needs_enough_releases() -> None:
    with pytest.raises(TooFewReleasesError, match=r"byzantine = 2 .* needs 7 releases, this round has 6"):
        given_to(Krum(3, byzantine=2), drawn(0, 6, 3)).change()
    with pytest.raises(TooFewReleasesError, match="needs 9 releases"):
        given_to(Krum(3, byzantine=1, keep=8), drawn(0, 8, 3)).change()
    given_to(Krum(3, byzantine=2), drawn(0, 7, 3)).change()


def test_settings_out_of_range_are_refused() -> None:
    for share in (-0.1, 0.5, float("nan")):
        with pytest.raises(ValueError, match="trimmed_share"):
            TrimmedMean(3, share)
    for byzantine, keep in ((-1, 1), (0, 0)):
        with pytest.raises(ValueError, match="byzantine"):
            Krum(3, byzantine, keep)


# -- Flower's own strategies on the same replies ------------------------------------------------------------------


class TwoNodes:
    """A grid that knows its nodes' ids and nothing else."""

    def get_node_ids(self) -> list[int]:
        return [1, 2]


def record(shared: Array) -> ArrayRecord:
    return ArrayRecord({"x": FlowerArray(shared)})


def round_of_flower(strategy: flower.FedAvg, number: int, shared: Array, changes: Sequence[Array] | Array) -> Array:
    """The shared adapter that a Flower strategy makes of devices' shared + change, all of the same weight."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    list(strategy.configure_train(number, record(shared), ConfigRecord(), TwoNodes()))  # type: ignore[arg-type]
    replies = []
    for change in changes:
        asked = Message(RecordDict(), dst_node_id=1, message_type="train")
        content = RecordDict({"arrays": record(shared + change), "metrics": MetricRecord({"num-examples": 1})})
        replies.append(Message(content, reply_to=asked))
    arrays, _ = strategy.aggregate_train(number, replies)
    assert arrays is not None
    return arrays["x"].numpy()


def compared(
    strategy: flower.FedAvg, optimizer_of: Callable[[int], ServerOptimizer], state: Moments, rounds: int = 3
) -> list[float]:
    """The largest difference between Flower's shared adapter and ours after each round."""
    theirs = ours = drawn(0, 1, 50)[0] * np.float32(0.1)
    found = []
    for number in range(1, rounds + 1):
        changes = drawn(number, 4, 50) * np.float32(0.1)
        mean = given_to(RULES["mean"](50, SETTINGS), changes).change()
        theirs = round_of_flower(strategy, number, theirs, changes)
        ours, state = optimizer_of(number).step(ours, mean, state)
        found.append(float(np.abs(theirs - ours).max()))
    return found


def test_fedavg_and_its_momentum_are_flowers() -> None:
    assert max(compared(flower.FedAvg(), lambda _: FedAvg(), FedAvg().start(50))) < 1e-6
    momentum = FedAvgM(0.7, 0.9)
    theirs = flower.FedAvgM(server_learning_rate=0.7, server_momentum=0.9)
    assert max(compared(theirs, lambda _: momentum, momentum.start(50))) < 1e-6


ZERO_START = Moments(np.zeros(50), np.zeros(50))


def test_yogi_is_flowers_from_the_same_start() -> None:
    """Algorithm 2 begins with v = τ²; Flower with 0."""
    yogi = FedYogi(0.05, 0.9, 0.99, tau=0.01)
    assert max(compared(flower.FedYogi(eta=0.05, tau=0.01), lambda _: yogi, ZERO_START)) < 1e-6
    assert compared(flower.FedYogi(eta=0.05, tau=0.01), lambda _: yogi, yogi.start(50))[0] > 1e-3


def test_adam_is_flowers_from_the_same_start_without_its_correction() -> None:
    """Algorithm 2 corrects nothing; Flower corrects Adam's zero start, in round t by the powers t + 1."""

    def corrected(number: int) -> FedAdam:
        return FedAdam(0.05 * np.sqrt(1 - 0.99 ** (number + 1)) / (1 - 0.9 ** (number + 1)), 0.9, 0.99, tau=0.01)

    adam = FedAdam(0.05, 0.9, 0.99, tau=0.01)
    assert max(compared(flower.FedAdam(eta=0.05, tau=0.01), corrected, ZERO_START)) < 1e-6
    assert compared(flower.FedAdam(eta=0.05, tau=0.01), lambda _: adam, ZERO_START)[0] > 1e-3
    assert compared(flower.FedAdam(eta=0.05, tau=0.01), corrected, adam.start(50))[0] > 1e-3


def test_robust_rules_are_flowers() -> None:
    shared, changes = np.zeros(50, dtype=np.float32), drawn(3, 11, 50)
    ours = given_to(TrimmedMean(50, 0.2), changes).change()
    theirs = round_of_flower(flower.FedTrimmedAvg(beta=0.2), 1, shared, changes)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    ours = given_to(Krum(50, byzantine=3, keep=4), changes).change()
    theirs = round_of_flower(flower.MultiKrum(num_malicious_nodes=3, num_nodes_to_select=4), 1, shared, changes)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


# -- optimizers ---------------------------------------------------------------------------------------------------


def test_two_steps_by_hand() -> None:
    one, change = row(1), row(0.5)
    shared, state = FedAvg(0.5).step(one, change, FedAvg().start(1))
    assert shared.tolist() == [1.25] and state.first.size == 0
    momentum = FedAvgM(1.0, 0.5)
    shared, state = momentum.step(one, change, momentum.start(1))
    shared, state = momentum.step(shared, change, state)
    assert shared.tolist() == [1 + 0.5 + 0.75]
    adam = FedAdam(learning_rate=1.0, beta_1=0.5, beta_2=0.5, tau=0.5)
    shared, state = adam.step(one, change, adam.start(1))  # m = 1/4; v = 1/2 · 1/4 + 1/2 · 1/4
    assert (state.first.tolist(), state.second.tolist()) == ([0.25], [0.25])
    assert shared.tolist() == [1 + 0.25 / (0.5 + 0.5)]
    yogi = FedYogi(learning_rate=1.0, beta_1=0.5, beta_2=0.5, tau=0.5)
    shared, state = yogi.step(one, row(1), yogi.start(1))  # v = 1/4 + 1/2 · 1, m = 1/2
    assert state.second.tolist() == [0.75]
    assert shared[0] == pytest.approx(1 + 0.5 / (0.75**0.5 + 0.5))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_has_the_same_bits(name: str) -> None:
    optimizer = OPTIMIZERS[name](ServerConfig(learning_rate=0.1))
    straight = resumed = drawn(0, 1)[0]
    first = second = optimizer.start(WIDTH)
    for change in drawn(1, 5):
        straight, first = optimizer.step(straight, change, first)
        stored = {key: array.tobytes() for key, array in second.arrays().items()}
        second = Moments.of({key: np.frombuffer(data) for key, data in stored.items()})
        resumed, second = optimizer.step(resumed, change, second)
    assert straight.tobytes() == resumed.tobytes() and straight.dtype == np.float32
    with pytest.raises(ValueError, match="stored moments"):
        Moments.of({"first": np.zeros(3)})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_factor_that_is_not_trained_rests_with_its_moments(name: str) -> None:
    optimizer = OPTIMIZERS[name](ServerConfig(learning_rate=0.1))
    shared, changes = drawn(0, 1)[0], drawn(1, 2)
    places = np.arange(WIDTH) % 2 == 0
    once, state = optimizer.step(shared, changes[0], optimizer.start(WIDTH))
    after, moments = step_at(optimizer, once, changes[1][places], state, places)
    whole, all_moments = optimizer.step(once, changes[1], state)
    assert (after[places] == whole[places]).all() and (after[~places] == once[~places]).all()
    for key, array in moments.arrays().items():
        if array.size:
            assert (array[places] == all_moments.arrays()[key][places]).all()
            assert (array[~places] == state.arrays()[key][~places]).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_no_change_is_no_step(name: str) -> None:
    optimizer = OPTIMIZERS[name](ServerConfig(learning_rate=1e39))
    for wrong, match in ((row(1, np.nan), "not finite"), (row(1), "shape"), (row(3, 3), "float32")):
        with pytest.raises((ValueError, StepTooLargeError), match=match):
            optimizer.step(row(1, 1), wrong, optimizer.start(2))


# -- products of factors ------------------------------------------------------------------------------------------


def mean_of_products(rows: Array) -> dict[str, np.ndarray]:
    """The plain way: all factors in memory, in float64."""
    factors = [dict(split_factors(SCHEMA, each)) for each in rows]
    return {
        name: np.mean([f[name][1].astype(np.float64) @ f[name][0].astype(np.float64) for f in factors], axis=0)
        for name in factors[0]
    }


def averaging_error(changes: Sequence[Array], received: Array, schema: Schema) -> AveragingError:
    mean = MeanOfProducts(schema, received)
    for change in changes:
        mean.add("d", change)
    return mean.error()


def test_the_error_of_averaging_by_hand() -> None:
    """A = (1), B = 0 received; devices send B = ±1 with A = 1 ± 1: products 2 and 0, their mean 1; means 1 and 0."""
    schema = Schema((("q.lora_A", (1, 1)), ("q.lora_B", (1, 1)), ("v.lora_A", (1, 1)), ("v.lora_B", (1, 1))))
    received = row(1, 0, 0, 0)
    error = averaging_error([row(1, 1, 2, 2), row(-1, -1, 2, 2)], received, schema)
    assert error.layers == {"q": 1.0, "v": 0.0}
    assert error.overall == pytest.approx(1 / np.sqrt(1 + 16))
    assert averaging_error([row(1, 1, 2, 2)], received, schema).overall == 0  # one device's product is that of means
    assert averaging_error([row(0, 0, 0, 0)], received, schema).layers == {"q": 0.0, "v": 0.0}
    with pytest.raises(TooFewReleasesError):
        averaging_error([], received, schema)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 6))
def test_residual_and_product_of_means_are_the_mean_of_products(seed: int, count: int) -> None:
    received, changes = drawn(seed, 1)[0], drawn(seed + 1, count)
    mean = MeanOfProducts(SCHEMA, received)
    for k, change in enumerate(changes):
        mean.add(f"d{k}", change)
    exact, means = mean_of_products(received + changes), mean.means()
    for name, residual in mean.residuals():
        a, b = means[name]
        np.testing.assert_allclose(b @ a + residual, exact[name], atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), order=st.permutations(range(5)))
def test_means_of_products_forget_the_order(seed: int, order: list[int]) -> None:
    received, changes = drawn(seed, 1)[0], drawn(seed + 1, 5)
    means = MeanOfProducts(SCHEMA, received), MeanOfProducts(SCHEMA, received)
    for mean, numbers in zip(means, (range(5), order), strict=True):
        for k in numbers:
            mean.add(f"d{k}", changes[k])
    for (_, one), (_, other) in zip(means[0].products(), means[1].products(), strict=True):
        assert one.tobytes() == other.tobytes()


def test_the_mean_of_products_holds_the_same_for_any_number_of_devices() -> None:
    mean = MeanOfProducts(SCHEMA, drawn(0, 1)[0])
    numbers = WIDTH + 4 * 5 + 6 * 3
    assert mean.held_bytes == 8 * numbers
    for change in drawn(1, 50):
        mean.add("", change)
    assert mean.held_bytes == 8 * numbers and mean.count == 50


def test_a_product_that_is_too_large_leaves_no_trace() -> None:
    mean = MeanOfProducts(SCHEMA, drawn(0, 1)[0])
    mean.add("a", drawn(1, 1)[0])
    before = dict(mean.products())
    for bad in (np.full(WIDTH, 1e4, np.float32), np.full(WIDTH, np.nan, np.float32), row(1)):
        with pytest.raises((BadReleaseError, ValueError)):
            mean.add("b", bad)
    assert mean.count == 1 and all((before[name] == product).all() for name, product in mean.products())


def test_factors_come_in_pairs() -> None:
    with pytest.raises(BadReleaseError, match="q has not A"):
        MeanOfProducts(Schema((("q.lora_B", (4, 2)),)), drawn(0, 1, 8)[0])


# -- encodings ----------------------------------------------------------------------------------------------------

ANY = st.floats(-(2.0**100), 2.0**100, width=32)


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("width", [0, 1, WIDTH])
def test_what_is_encoded_comes_back_in_the_same_form_and_size(name: str, width: int) -> None:
    schema = SCHEMA if width == WIDTH else Schema((("q.lora_B", (width, 2)),))
    arrays, encoding = schema.split(drawn(0, 1, schema.size_bytes // 4)[0]), ENCODINGS[name]
    encoded = encoding.encode(arrays)
    assert sum(array.nbytes for array in encoded.values()) == encoding.size_bytes(schema)
    decoded = encoding.decode(encoded)
    schema.check(decoded)
    for key, array in encoding.decode(encoding.encode(decoded)).items():
        np.testing.assert_allclose(array, decoded[key], rtol=1e-6)  # a second time nothing is lost


def test_sizes_by_hand() -> None:
    assert WIDTH == 10 + 8 + 6 + 12
    assert {name: each.size_bytes(SCHEMA) for name, each in ENCODINGS.items()} == {
        "fp32": 4 * 36,
        "bf16": 2 * 36,
        "int8": 36 + 4 * 4,
    }


@settings(max_examples=100, deadline=None)
@given(numbers=st.lists(ANY, min_size=1, max_size=8))
def test_bfloat16_is_torchs(numbers: list[float]) -> None:
    array = row(*numbers)
    decoded = ENCODINGS["bf16"].decode(ENCODINGS["bf16"].encode({"x": array}))["x"]
    assert (decoded == torch.from_numpy(array).to(torch.bfloat16).to(torch.float32).numpy()).all()
    assert (np.abs(decoded - array) <= np.maximum(np.abs(array) * 2.0**-8, 2.0**-134)).all()


def test_bfloat16_by_hand() -> None:
    encoded = ENCODINGS["bf16"].encode({"x": row(1, 1 + 2**-8, 1 + 3 * 2**-8, -2)})  # 7 bits: the middle two are ties
    assert encoded["x"].tolist() == [0x3F80, 0x3F80, 0x3F82, 0xC000]
    assert ENCODINGS["bf16"].decode(encoded)["x"].tolist() == [1, 1, 1 + 2**-6, -2]


@settings(max_examples=100, deadline=None)
@given(numbers=st.lists(ANY, min_size=1, max_size=8))
def test_int8_is_off_by_half_a_scale(numbers: list[float]) -> None:
    array = row(*numbers)
    encoded = ENCODINGS["int8"].encode({"x": array})
    scale, decoded = np.float64(encoded["x.scale"][0]), ENCODINGS["int8"].decode(encoded)["x"]
    assert (np.abs(decoded.astype(np.float64) - array) <= scale * (0.5 + 1e-5)).all()
    assert 127 * scale >= np.abs(array).max()


def test_int8_by_hand() -> None:
    encoded = ENCODINGS["int8"].encode({"x": row(-127, 2.4, 2.5, 3.5, 0), "y": row(0, 0)})
    assert encoded["x"].tolist() == [-127, 2, 2, 4, 0] and encoded["x.scale"].tolist() == [1]  # ties to the even one
    assert encoded["y"].tolist() == [0, 0] and encoded["y.scale"].tolist() == [0]


@pytest.mark.parametrize("name", ENCODINGS)
def test_what_cannot_be_sent_is_refused(name: str) -> None:
    encoding = ENCODINGS[name]
    for bad in (row(1, np.nan), row(np.inf), row(1e38), np.zeros(2)):
        with pytest.raises(ReleaseRefusedError, match="x"):
            encoding.encode({"x": bad})
    encoding.decode(encoding.encode({"x": row(np.nextafter(np.float32(2.0**126), np.float32(0)))}))


def test_what_cannot_have_been_encoded_is_refused() -> None:
    small, scale, form = np.zeros(2, np.int8), row(1), Schema((("x", (2,)),))
    wrong = {
        "fp32": [{"x": np.zeros(2)}, {"x": row(np.nan)}, {"x": row(np.inf)}],
        "bf16": [{"x": row(1)}, {"x": np.array([0x7F80], np.uint16)}, {"x": np.array([0xFFC1], np.uint16)}],
        "int8": [
            {"x": small},
            {"x.scale": scale},
            {"x": row(1), "x.scale": scale},
            {"x": small, "x.scale": row(np.nan)},
            {"x": small, "x.scale": row(-1)},
            {"x": small, "x.scale": row(1e38)},
            {"x": small, "x.scale": row(1, 1)},
            {"x": np.full(2, -128, np.int8), "x.scale": scale},
        ],
    }
    for name, cases in wrong.items():
        for encoded in cases:
            with pytest.raises(ReleaseRefusedError):
                form.check(ENCODINGS[name].decode(encoded))
    with pytest.raises(ReleaseRefusedError, match="ends the names of scales"):
        ENCODINGS["int8"].encode({"x.scale": row(1)})
