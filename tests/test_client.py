"""A device's parts: scores, buffer and policies, pool, synthesis' checks, state on disk."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from florilegium.client.config import DeviceConfig
from florilegium.client.context import CohortContext
from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.config import SamplingConfig
from florilegium.client.lm.model import LanguageModel
from florilegium.client.observation import Observation
from florilegium.client.phases import annotate, observe, synthesize
from florilegium.client.pii import personal_data
from florilegium.client.pool import Pool, poisson_sample
from florilegium.client.rouge import rouge1
from florilegium.client.round import learn_alone
from florilegium.client.selection import stream_memory
from florilegium.client.selection.buffer import Buffer
from florilegium.client.selection.config import SelectionConfig
from florilegium.client.selection.determinantal import Terms, log_marginals
from florilegium.client.selection.entry import BufferEntry
from florilegium.client.selection.lexicons import BUNDLED, LexiconError, load_lexicons, matches, words
from florilegium.client.selection.policies import POLICIES
from florilegium.client.selection.scores import (
    domain_specific_score,
    dominant_domain,
    entropy_over_tokens,
    in_domain_dissimilarity,
    unit,
)
from florilegium.client.selection.stream_memory import StreamMemory, whitening
from florilegium.client.state import StateError, stage
from florilegium.client.state_store import DeviceStore
from florilegium.client.synthesize import Request, SynthesisConfig, Treatment, objection, unwrap
from florilegium.client.synthesize import synthesize as synthesize_texts
from florilegium.privacy.plan import RoundPlan
from florilegium.simulation.data.population import User

LEXICONS = {"food": frozenset({"bread", "cheese"}), "sea": frozenset({"boat"})}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def kept(identity: str, eoe: float = 0.5, dss: float = 0.5, domain: str = "", angle: float = 0.0) -> BufferEntry:
    embedding = np.array([math.cos(angle), math.sin(angle)], dtype=np.float16)
    return BufferEntry(identity, f"prompt {identity}", domain, embedding, eoe, dss)


def a_buffer(capacity: int, policy: str, bins: tuple[BufferEntry, ...] = ()) -> Buffer:
    return Buffer(SelectionConfig(bins=capacity, policy=policy), bins)


def ids(buffer: Buffer) -> list[str]:
    return [k.id for k in buffer.bins]


# -- scores -------------------------------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    assert entropy_over_tokens(torch.tensor([2.0, 2.0, 2.0])) == pytest.approx(1.0)
    assert entropy_over_tokens(torch.tensor([3.0, 1.0])) == pytest.approx(0.8112781)  # H(¾, ¼) in bits
    assert entropy_over_tokens(torch.tensor([5.0])) == 0.0
    assert domain_specific_score("Bread and a boat", LEXICONS) == pytest.approx(2 / 4 / 2)
    assert domain_specific_score("...", LEXICONS) == 0.0
    assert dominant_domain("cheese, bread, boat", LEXICONS) == "food"
    assert dominant_domain("nothing of that", LEXICONS) == ""
    a, b = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert in_domain_dissimilarity(a, np.stack([a, b])) == pytest.approx(0.5)
    assert in_domain_dissimilarity(a, np.empty((0, 2))) == 1.0


# -- lexicons -----------------------------------------------------------------------------------------------------


def test_lexicons_of_several_sources_are_told_apart(tmp_path: Path) -> None:
    own = tmp_path / "mine.toml"
    own.write_text('fear = "spider spiders"\nsea = "boat sail"\n', encoding="utf-8")
    lexicons = load_lexicons(("general", str(own)))
    assert lexicons["mine.fear"] == {"spider", "spiders"} and "afraid" in lexicons["fear"]
    assert words("Größe, страх: don't 3") == ["größe", "страх", "don't"]
    assert matches("A spider! I sail, afraid.", lexicons) == {
        "fear": ["afraid"],
        "mine.fear": ["spider"],
        "sea": ["sail"],
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("fear = 3", "fear must be words"),
        ('fear = "..."', "fear must be words"),
        ("fear", "not valid TOML"),
        (None, "No such"),
    ],
)
def test_a_lexicon_that_is_not_one_is_named(tmp_path: Path, text: str | None, told: str) -> None:
    path = tmp_path / "mine.toml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(LexiconError, match=told):
        load_lexicons((str(path),))


def test_an_unknown_source_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="general, medical, vader, empath, nrc"):
        SelectionConfig(lexicons=("generall",))


@pytest.mark.parametrize(("source", "domain", "word"), [("empath", "dance", "ballet"), ("nrc", "fear", "afraid")])
def test_lexicons_of_packages(source: str, domain: str, word: str) -> None:
    module = {"empath": "empath", "nrc": "nrclex"}[source]
    if find_spec(module) is None:
        with pytest.raises(LexiconError, match=f"pip install {module}"):
            load_lexicons((source,))
    else:
        assert word in load_lexicons((source,))[domain]


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_lexicons_say_what_may_be_done_with_them(name: str) -> None:
    text = files("florilegium.client.selection").joinpath("wordlists", f"{name}.toml").read_text(encoding="utf-8")
    assert (
        "Apache-2.0" in text.splitlines()[0]
        or files("florilegium.client.selection").joinpath("wordlists", f"{name}.LICENSE.txt").is_file()
    )
    assert load_lexicons((name,))


# -- buffer and policies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"none", "full-stream"}))
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 6)), max_size=30), st.integers(1, 8))
@settings(max_examples=25, deadline=None)
def test_a_buffer_never_holds_more_than_its_capacity(
    policy: str, scores: list[tuple[float, float, float]], capacity: int
) -> None:
    buffer = a_buffer(capacity, policy)
    for n, (eoe, dss, angle) in enumerate(scores):
        before = ids(buffer)
        buffer, taken = buffer.offer(replace(kept(str(n), eoe, dss, angle=angle), value=eoe), rng(n))
        assert len(buffer) == min(capacity, len(before) + 1)
        assert buffer.size_bytes <= capacity * buffer.config.bin_bytes
        assert (str(n) in ids(buffer)) == taken
        assert len(set(before) - set(ids(buffer))) == (taken and len(before) == capacity)


def test_quality_takes_the_place_of_one_that_is_worse_in_all_three() -> None:
    buffer = a_buffer(2, "quality")
    for newcomer in (kept("a", 0.2, 0.2, "x"), kept("b", 0.9, 0.1, "x")):
        buffer, _ = buffer.offer(newcomer, rng())
    same_direction = kept("c", 0.5, 0.5, "x")  # its dissimilarity is 0: it beats nobody
    assert buffer.offer(same_direction, rng())[1] is False
    better = kept("d", 0.5, 0.5, "y")  # first of its domain: dissimilarity 1, but so has a
    assert buffer.offer(better, rng())[1] is False
    bins = (replace(buffer.bins[0], idd=0.3), replace(buffer.bins[1], idd=0.3))
    after, taken = replace(buffer, bins=bins).offer(better, rng())
    assert taken and ids(after) == ["b", "d"]  # a was worse in all three, b not in EOE


def test_fifo_keeps_the_newest_and_kcenter_the_most_spread_out() -> None:
    fifo, spread = a_buffer(2, "fifo"), a_buffer(2, "kcenter")
    for n, angle in enumerate((0.0, 0.1, 1.5)):
        fifo, _ = fifo.offer(kept(str(n), angle=angle), rng())
        spread, _ = spread.offer(kept(str(n), angle=angle), rng())
    assert ids(fifo) == ["1", "2"]
    assert ids(spread) == ["0", "2"]


def test_random_leaves_each_out_equally_often() -> None:
    left = Counter[str]()
    for seed in range(3000):
        buffer = a_buffer(3, "random", (kept("a"), kept("b"), kept("c")))
        after, _ = buffer.offer(kept("d"), rng(seed))
        left.update({"a", "b", "c", "d"} - set(ids(after)))
    assert all(abs(n - 750) < 100 for n in left.values()), left  # σ = 24


def test_the_bounds_keep_nothing_and_everything() -> None:
    nothing, everything = a_buffer(2, "none"), a_buffer(2, "full-stream")
    for n in range(5):
        nothing, refused = nothing.offer(kept(str(n)), rng())
        everything, taken = everything.offer(kept(str(n)), rng())
        assert not refused and taken
    assert ids(nothing) == [] and ids(everything) == ["0", "1", "2", "3", "4"]


def test_a_text_that_does_not_fit_a_bin_is_turned_away() -> None:
    buffer = Buffer(SelectionConfig(bins=2, policy="fifo", bin_bytes=40))
    small, large = kept("a"), replace(kept("b"), prompt="x" * 40)
    assert small.size_bytes == len("prompt a") + 2 * 2  # two numbers in half precision
    buffer, taken = buffer.offer(small, rng())
    after, refused = buffer.offer(large, rng())
    assert taken and not refused and ids(after) == ["a"]


def offered(policy: str, capacity: int, arrivals: Sequence[BufferEntry], seed: int = 0) -> list[str]:
    """The ids that a buffer holds after all have come."""
    buffer, dice = a_buffer(capacity, policy), rng(seed)
    for newcomer in arrivals:
        buffer, _ = buffer.offer(newcomer, dice)
    return ids(buffer)


@pytest.mark.parametrize("score", ["eoe", "dss"])
def test_a_single_score_replaces_one_that_is_lower(score: str) -> None:
    arrivals = [replace(kept(n), **{score: value}) for n, value in (("a", 0.5), ("b", 0.2), ("c", 0.1), ("d", 0.3))]
    assert offered(score, 2, arrivals) == ["a", "d"]  # c beats nobody, d beats b alone


def test_idd_replaces_one_that_was_less_dissimilar_when_it_came() -> None:
    arrivals = [kept("a", angle=0.0), kept("b", angle=0.1), kept("c", angle=0.05), kept("d", angle=1.5)]
    assert offered("idd", 2, arrivals) == ["a", "d"]  # a came first of its domain: 1; b 0.005; c less; d about 0.9


def test_a_recomputed_dissimilarity_looks_at_the_present_buffer() -> None:
    """a came first (IDD 1 for ever, frozen); beside b it is as near as b is, so that d can take either place."""
    arrivals = [kept("a", angle=0.0), kept("b", angle=0.1), kept("d", angle=1.5)]
    gone = set()
    for seed in range(20):
        buffer, dice = Buffer(SelectionConfig(bins=2, policy="idd", dissimilarity="recomputed")), rng(seed)
        for newcomer in arrivals:
            buffer, _ = buffer.offer(newcomer, dice)
        gone |= {"a", "b", "d"} - set(ids(buffer))
        assert "a" in offered("idd", 2, arrivals, seed)
    assert gone == {"a", "b"}


def test_a_reservoir_holds_each_arrival_equally_often() -> None:
    found = Counter(i for seed in range(2000) for i in offered("reservoir", 5, [kept(str(n)) for n in range(20)], seed))
    assert all(abs(n - 500) < 100 for n in found.values()) and len(found) == 20, found  # σ = 19


def test_a_balanced_buffer_gives_a_rare_cluster_its_share() -> None:
    """8 directions are clusters of their own; of 200 arrivals 4 are of the last one, the others mostly of the first."""
    angles = [n * 2 * math.pi / 8 for n in range(8)] + [0.0] * 188 + [7 * 2 * math.pi / 8] * 4
    arrivals = [kept(f"{n}@{round(a * 4 / math.pi)}", angle=a + 0.001 * n) for n, a in enumerate(angles)]
    shares = Counter(i.partition("@")[2] for seed in range(20) for i in offered("balanced", 16, arrivals, seed))
    uniform = Counter(i.partition("@")[2] for seed in range(20) for i in offered("reservoir", 16, arrivals, seed))
    assert shares["7"] >= 20 * 2, shares  # their share of 16 bins is 2
    assert uniform["7"] < 20 * 1, uniform  # 16 · 5 / 200 = 0.4 of them


def test_a_balanced_buffer_holds_a_uniform_sample_of_a_large_cluster() -> None:
    """Six of ten arrivals are of one direction, the others of seven; the first one's kept come from all its time."""
    clusters = [0, 1, 2, 3, 4, 5, 6, 7] + [0 if n % 10 < 6 else 1 + n % 7 for n in range(400)]
    arrivals = [kept(f"{n}@{c}", angle=c * math.pi / 4 + 1e-4 * n) for n, c in enumerate(clusters)]
    held = [i.split("@") for seed in range(60) for i in offered("balanced", 20, arrivals, seed)]
    quarters = Counter(4 * int(n) // len(arrivals) for n, c in held if c == "0")
    assert min(quarters.values()) > 0.5 * max(quarters.values()) and len(quarters) == 4, quarters


def test_herding_keeps_the_mean_of_all_that_came() -> None:
    angles = rng(3).normal(0.7, 0.5, size=60)
    arrivals = [kept(str(n), angle=float(a)) for n, a in enumerate(angles)]
    points = np.stack([[math.cos(a), math.sin(a)] for a in angles])
    target = points.mean(0)

    def error(held: list[str]) -> float:
        return float(np.linalg.norm(points[[int(i) for i in held]].mean(0) - target))

    by_chance = [error(offered("reservoir", 6, arrivals, seed)) for seed in range(50)]
    assert error(offered("herding", 6, arrivals)) < np.quantile(by_chance, 0.1)


def test_whitened_vectors_vary_alike_in_all_directions() -> None:
    """One coordinate varies 5 times as much as another; after whitening by what was remembered, both by 1."""
    loud, quiet = rng(4).normal(size=(2, 3000))
    vectors = np.stack([np.full(3000, 50), loud, quiet / 5], axis=1).astype(np.float16)
    memory: StreamMemory = {}
    for n, vector in enumerate(vectors):
        _, memory = POLICIES["whitened-kcenter"].meet(replace(kept(str(n)), embedding=vector), memory)
    white = unit(vectors) @ whitening(memory)  # three dimensions are not projected
    values = np.sort(np.linalg.eigvalsh(np.cov(white.T)))
    assert values[1:] == pytest.approx([1, 1], abs=0.1)  # at length 1 the third direction has next to none left


def test_leverage_keeps_one_of_each_direction() -> None:
    """Four arrivals along one axis, one along the other: with two bins, one of either stays."""
    axes = {"a": (1, 0.02), "b": (1, 0.01), "c": (0.02, 1), "d": (1, -0.02), "e": (1, -0.01)}
    arrivals = [replace(kept(n), embedding=np.array(v, np.float16)) for n, v in axes.items()]
    assert "c" in offered("leverage", 2, arrivals)


def test_dpp_drops_a_copy_then_what_is_old_then_what_is_noise() -> None:
    """By hand: of N far points and a copy, both halves of the pair have 2·0.001 of variance left, the others 1.001."""
    far = np.diag([9.0, 9.0, 9.0])
    white = np.vstack([far, far[1] * 1.0])  # the last is a copy of the second
    left = log_marginals(white, [0, 0, 0, 0], Terms(quality=0, recency=0))
    assert left[[0, 2]] == pytest.approx([math.log(1.001)] * 2, abs=1e-3)
    assert left[[1, 3]] == pytest.approx([math.log(1.001 - 1 / 1.001)] * 2, abs=1e-3)  # 1.001 less what the twin tells
    aged = log_marginals(far, [0, 0, 0], Terms(quality=0, redundancy=0, recency=2))
    assert aged == pytest.approx([0, 1, 2])
    assert log_marginals(far, [0, 2, -2], Terms(quality=0.25, redundancy=0, recency=0)) == pytest.approx([0, -0.5, 0.5])


def test_a_prompt_surprises_by_deviations_from_the_streams_mean() -> None:
    memory: StreamMemory = {}
    met = []
    for n, value in enumerate((3.0, 5.0, 3.0, 5.0, 9.0)):
        newcomer, memory = POLICIES["dpp"].meet(replace(kept(str(n), angle=n), value=value), memory)
        met.append(newcomer.value)
    assert met == [0, 0, 0, 0, pytest.approx(1.826)]  # of 3, 5, 3, 5, 9: mean 5, deviation √4.8
    assert float(memory["nll_mean"]) == pytest.approx(5) and float(memory["nll_squares"]) == pytest.approx(24)


def test_dpp_and_its_ablations_keep_what_their_terms_say() -> None:
    """Half of 40 arrivals are copies of one text, the last quarter is of a new direction; some are noise."""
    dice, arrivals = rng(5), []
    for n in range(40):
        vector = np.array([9, 0, 0, 0]) if n % 2 else dice.normal(size=4)
        arrivals.append(replace(kept(str(n)), embedding=vector.astype(np.float16), value=8.0 if n % 8 == 4 else 4.0))

    def copies(policy: str) -> int:
        return sum(int(i) % 2 for i in offered(policy, 8, arrivals))

    def noise(policy: str) -> int:
        return sum(int(i) % 8 == 4 for i in offered(policy, 8, arrivals))

    def mean_age(policy: str) -> float:
        return float(np.mean([int(i) for i in offered(policy, 8, arrivals)]))

    without = "florilegium.client.selection.ablations:WITHOUT_"
    assert copies("dpp") <= 2 < copies(without + "REDUNDANCY")
    assert noise("dpp") <= noise(without + "QUALITY")
    assert mean_age("dpp") > mean_age(without + "RECENCY") + 3


def test_perplexity_keeps_the_hardest_or_the_middle() -> None:
    arrivals = [replace(kept(str(n)), value=v) for n, v in enumerate((1.0, 9.0, 5.0, 4.9, 8.0, 2.0))]
    assert offered("perplexity", 2, arrivals) == ["1", "4"]
    assert offered("perplexity-mid", 2, arrivals) == ["2", "3"]  # the mean of all is 4.98


def test_uds_adds_the_distance_to_what_came_before() -> None:
    """Equal nuclear norms: the one that is far from the queue stays, by α · 400 = 1."""
    near, far = np.zeros(4, np.float16), np.array([400, 0, 0, 0], np.float16)
    arrivals = [
        replace(kept(n), embedding=e, value=7.0) for n, e in (("a", near), ("b", near), ("c", far), ("d", near))
    ]
    buffer = a_buffer(4, "uds")
    for newcomer in arrivals:
        buffer, _ = buffer.offer(newcomer, rng())
    assert [k.value for k in buffer.bins] == pytest.approx([7, 7, 8, 7 + 2.5e-3 * 400 / 3], rel=1e-3)
    assert buffer.memory["queue"].shape == (4, 4)
    assert offered("uds", 1, arrivals) == ["c"]


def test_oasis_drops_what_the_others_already_teach() -> None:
    """Three alike and one other: one of the three goes, though the other is the least informative."""
    same, other = np.array([1, 0], np.float16), np.array([0, 1], np.float16)
    arrivals = [
        replace(kept(n), embedding=e, value=v) for n, e, v in (("a", same, 5), ("b", same, 5.1), ("c", other, 1))
    ]
    assert "c" in offered("oasis", 2, [*arrivals, replace(kept("d"), embedding=same, value=5.0)])


def test_a_gradient_is_told_from_the_others_by_standard_deviations() -> None:
    """Mean 10 and variance 4 so far, a norm of 12: σ(1) = 0.7311; of the first there is nothing to tell: σ(0)."""
    memory: StreamMemory = {"mean": np.float64(10), "variance": np.float64(4)}
    newcomer, after = stream_memory.standing(replace(kept("a"), value=12.0), memory)
    assert newcomer.value == pytest.approx(0.7311, abs=1e-4)
    assert float(after["mean"]) == pytest.approx(0.9 * 10 + 0.1 * 12)
    assert float(after["variance"]) == pytest.approx(0.9 * (4 + 0.1 * 2 * 2))
    first, began = stream_memory.standing(replace(kept("b"), value=12.0), {})
    assert (first.value, float(began["mean"]), float(began["variance"])) == (0.5, 12, 0)


def test_what_policies_remember_of_three_arrivals_by_hand() -> None:
    """Vectors (1, 0), (0, 1) and (0, 1), values 3, 5 and 10."""
    arrivals = [replace(kept("a"), embedding=np.array(v, np.float16), value=x)
                for v, x in (((1, 0), 3.0), ((0, 1), 5.0), ((0, 1), 10.0))]  # fmt: skip

    def after(meet: stream_memory.Update) -> StreamMemory:
        memory: StreamMemory = {}
        for newcomer in arrivals:
            _, memory = meet(newcomer, memory)
        return memory

    assert after(stream_memory.count) == {"seen": 3}
    assert after(stream_memory.mean_value) == {"seen": 3, "mean": 6}
    assert after(stream_memory.mean_vector)["mean"] == pytest.approx([1 / 3, 2 / 3])
    spread = after(stream_memory.covariance)  # about (1/3, 2/3): (2/3)² + 2 · (1/3)² = 2/3 along both, −2/3 across
    assert spread["mean"] == pytest.approx([1 / 3, 2 / 3])
    assert spread["squares"].ravel() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3], abs=1e-6)
    assert after(stream_memory.cluster)["met"].tolist() == [1, 1, 1]


def test_a_reading_that_is_not_a_number_is_turned_away() -> None:
    buffer = a_buffer(2, "kcenter")
    for n in range(3):
        buffer, _ = buffer.offer(kept(str(n), angle=float(n)), rng())
    broken = replace(kept("broken"), embedding=np.array([np.inf, 0], np.float16))
    assert buffer.offer(broken, rng()) == (buffer, False)
    assert buffer.offer(replace(kept("broken"), value=math.nan), rng()) == (buffer, False)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of quality, eoe"):
        SelectionConfig(policy="qality")


# -- pool ---------------------------------------------------------------------------------------------------------


def test_every_dialogue_is_in_the_pool_equally_often() -> None:
    found = Counter[str]()
    for seed in range(2000):
        pool = Pool(5)
        for n in range(20):
            pool = pool.offer(str(n), "p", seed)
        assert len(pool.slots) == 5
        found.update(identity for identity, _ in pool.slots)
    assert all(abs(n - 500) < 100 for n in found.values()), found  # σ = 19


def test_the_pools_coins_do_not_look_at_the_data() -> None:
    """Replacing one dialogue replaces it in the pool, if it is there, and changes nothing else."""
    one, other = Pool(5), Pool(5)
    for n in range(30):
        one = one.offer(str(n), f"prompt {n}", secret=3)
        other = other.offer("new" if n == 7 else str(n), "quite another" if n == 7 else f"prompt {n}", secret=3)
        assert len(set(one.slots) ^ set(other.slots)) <= 2
        assert [i for i, _ in one.slots] == ["7" if i == "new" else i for i, _ in other.slots]


def test_every_slot_has_a_coin_of_its_own() -> None:
    assert poisson_sample(50, 0.4, 9) == [i for i in poisson_sample(100, 0.4, 9) if i < 50]
    sizes = [len(poisson_sample(100, 0.4, seed)) for seed in range(2000)]
    assert abs(np.mean(sizes) - 40) < 0.5  # σ = 0.11
    assert abs(np.var(sizes) - 24) < 3  # binomial, as the accounting assumes: 100 · 0.4 · 0.6; σ = 0.76


# -- synthesis ----------------------------------------------------------------------------------------------------


def test_what_is_thrown_away_and_why() -> None:
    config = SynthesisConfig(rouge1_min=0.3, rouge1_max=0.95, length_ratio_max=2, pii_free=True)
    request = Request("d0", ("do you like old films", "yes"), 0)

    def reason(text: str, *seen: str) -> str:
        return objection((text, "yes"), request, {("d0", t) for t in seen}, config)

    assert reason("") == "empty"
    assert reason("completely unrelated words") == "too far"
    assert reason("do you like old films") == "copy"
    assert reason("Do you like old songs?", "do you like old songs") == "copy"
    assert reason("do you like old songs", "do you like old plays") == ""
    assert reason("do you like old films and then so many other things too") == "length"  # 11 words, more than 2 · 5
    assert reason("do you like old films, mail ann@example.org") == "personal data"
    assert rouge1("a b c d", "a b x y") == pytest.approx(0.5)
    assert unwrap("sure: [ a new text ] ok") == "a new text"
    assert unwrap("no brackets") == "no brackets"
    with pytest.raises(ValueError, match="rouge1_min"):
        SynthesisConfig(rouge1_min=0.9, rouge1_max=0.5)
    with pytest.raises(ValueError, match="both 'keep'"):
        SynthesisConfig(prompt="keep", response="keep")


def test_another_devices_text_is_no_copy_and_ones_own_is() -> None:
    config, request = SynthesisConfig(), Request("d0", ("do you like old films", "yes"), 0)
    made = ("do you like old songs", "yes")
    assert objection(made, request, {("d1", "do you like old songs")}, config) == ""
    assert objection(made, request, {("d0", "do you like old songs")}, config) == "copy"


@pytest.mark.parametrize(("prompt", "response"), [("rewrite", "keep"), ("keep", "rewrite"), ("rewrite", "rewrite")])
def test_what_is_written_anew_and_what_is_kept(lm: LanguageModel, prompt: Treatment, response: Treatment) -> None:
    """Each request asks for two; together and alone they get the same."""
    config = SynthesisConfig(
        per_dialogue=2,
        attempts=20,
        prompt=prompt,
        response=response,
        instruction="Rewrite: ",
        rouge1_min=0,
        rouge1_max=1,
        length_ratio_max=100,
        sampling=SamplingConfig(max_new_tokens=12, temperature=1.2),
    )
    requests = [Request("d0", ("do you like old films", "yes I do"), 5), Request("d1", ("are you ill?", "a bit"), 9)]
    together = synthesize_texts(requests, [], lm, config)
    assert together == [synthesize_texts([r], [], lm, config)[0] for r in requests]
    for request, written in zip(requests, together, strict=True):
        assert len(written.kept) == 2 and len(set(written.kept)) == 2
        for part, how in enumerate((prompt, response)):
            assert all((made[part] == request.original[part]) == (how == "keep") for made in written.kept)


def test_siblings_that_come_out_alike_are_copies(lm: LanguageModel) -> None:
    """At temperature 0 three are the same text: one is kept. Those of another device are no copies of them."""
    config = SynthesisConfig(
        per_dialogue=3, instruction="Rewrite: ", rouge1_min=0, rouge1_max=1, length_ratio_max=100,
        sampling=SamplingConfig(max_new_tokens=12),
    )  # fmt: skip
    requests = [Request(device, ("do you like old films", "yes"), 5) for device in ("d0", "d1")]
    for written in synthesize_texts(requests, [], lm, config):
        assert len(written.kept) == 1 and written.rejected == Counter(copy=2)


def test_a_reply_that_would_become_less_likely_is_thrown_away(lm: LanguageModel) -> None:
    """Of the same draws those are kept whose prompt makes the user's reply no less likely than the original's did."""
    request = Request("d0", ("hm?", "i like old films too"), 5)  # an original prompt that says little
    settings: dict[str, Any] = {
        "per_dialogue": 12, "instruction": "Rewrite: ", "rouge1_min": 0.0, "rouge1_max": 1.0, "length_ratio_max": 100.0,
        "sampling": {"max_new_tokens": 12, "temperature": 1.0},
    }  # fmt: skip
    free, likely = (
        synthesize_texts([request], [], lm, SynthesisConfig.model_validate({**settings, "accept": accept}))[0]
        for accept in ("paper", "likely")
    )

    def nll(pair: tuple[str, str]) -> float:
        (score,) = lm.score(lm.format.dialogues([Dialogue("", *pair)]), [0], [])
        return score.nll / score.tokens

    assert likely.kept == tuple(pair for pair in free.kept if nll(pair) <= nll(request.original) + 5e-4)
    assert 0 < len(likely.kept) < len(free.kept)
    assert likely.rejected["unlikely"] == len(free.kept) - len(likely.kept) and "unlikely" not in free.rejected


def test_what_was_thrown_away_is_written_again(lm: LanguageModel) -> None:
    """With attempts to spare the count is reached, and every attempt that failed is counted."""
    request = Request("d0", ("do you like old films or the new ones", "yes"), 5)
    settings = {
        "per_dialogue": 3,
        "instruction": "Rewrite: ",
        "rouge1_max": 0.76,
        "sampling": {"max_new_tokens": 16, "temperature": 0.9},
    }
    once = synthesize_texts([request], [], lm, SynthesisConfig.model_validate({**settings, "attempts": 1}))[0]
    often = synthesize_texts([request], [], lm, SynthesisConfig.model_validate({**settings, "attempts": 12}))[0]
    assert once.kept == often.kept[: len(once.kept)]
    assert len(once.kept) + once.rejected.total() == 3
    assert len(often.kept) == 3 and often.rejected.total() >= once.rejected.total()
    assert len(once.kept) < 3, "nothing was thrown away: the test shows nothing"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("write to ann.b@mail.example.org", ["e-mail"]),
        ("call (202) 555-0143 after six", ["long number"]),
        ("see https://example.org/me", ["link"]),
        ("I am @somebody there", ["handle"]),
        ("12 Old Mill Road, please", ["street"]),
        ("we were 3 of 120 in 1999", []),
        ("it costs 1,200 or 1500", []),
    ],
)
def test_personal_data(text: str, found: list[str]) -> None:
    assert personal_data(text) == found


# -- phases and state ---------------------------------------------------------------------------------------------


def site_of(lm: LanguageModel, config: DeviceConfig, people: list[User]) -> CohortContext:
    recorded = {d.id: d.response for user in people for d in user.stream}
    return CohortContext.of(lm, config, 0, lambda device, dialogue: recorded[dialogue])


SETTINGS = DeviceConfig.model_validate({
    "selection": {"bins": 4},
    "shared": {"pool_capacity": 6},
    "synthesis": {"per_dialogue": 2, "instruction": "Rewrite: ", "sampling": {"max_new_tokens": 16}},
})  # fmt: skip


def test_a_device_remembers_itself(lm: LanguageModel, people: list[User], tmp_path: Path) -> None:
    context, plan = site_of(lm, SETTINGS, people), RoundPlan(1, 0)
    states, _ = observe([context.new_state("d0")], [people[0].stream[:20]], plan, context)
    states, _ = annotate(states, context)
    states, _ = synthesize(states, plan, context)
    state = replace(states[0], head="of the ledger", pool_synthetic={"x": (("a", "b"),)})
    store = DeviceStore(tmp_path / "states.db")
    store.save([state], stage(1))
    again = store.load("d0", stage(1))
    assert torch.equal(again.personal, state.personal)
    assert [k.embedding.tolist() for k in again.buffer.bins] == [k.embedding.tolist() for k in state.buffer.bins]
    plain = {"personal": torch.empty(0), "buffer": None}
    assert replace(again, **plain) == replace(state, **plain)
    assert ids(again.buffer) == ids(state.buffer)
    with pytest.raises(StateError, match="d1"):
        store.load("d1", stage(1))


@pytest.mark.parametrize("policy", POLICIES)
def test_selection_goes_on_after_a_restart_as_if_there_had_been_none(
    policy: str, lm: LanguageModel, people: list[User], tmp_path: Path
) -> None:
    """Everything that a policy remembers is on the disk: two halves with a restart between give the same bins."""
    settings = SETTINGS.model_copy(update={"selection": SelectionConfig(policy=policy, bins=4)})
    context, store = site_of(lm, settings, people), DeviceStore(tmp_path / "states.db")
    stream = people[0].stream[:30]
    halves = [[stream[:15]], [stream[15:]]]
    states = [context.new_state("d0")]
    states, _ = observe(states, halves[0], RoundPlan(1, 0), context)
    store.save(states, stage(1))
    restarted = [store.load("d0", stage(1))]
    went_on, _ = observe(states, halves[1], RoundPlan(2, 0), context)
    again, _ = observe(restarted, halves[1], RoundPlan(2, 0), context)
    assert ids(again[0].buffer) == ids(went_on[0].buffer)
    assert again[0].buffer.memory.keys() == went_on[0].buffer.memory.keys()
    for name, value in went_on[0].buffer.memory.items():
        assert np.array_equal(value, again[0].buffer.memory[name]), name
    assert [replace(k, embedding=None) for k in again[0].buffer.bins] == [
        replace(k, embedding=None) for k in went_on[0].buffer.bins
    ]


def test_selection_is_the_same_alone_and_in_a_cohort(lm: LanguageModel, people: list[User]) -> None:
    context, plan = site_of(lm, SETTINGS, people), RoundPlan(1, 0)
    arrived = [user.stream[:25] for user in people]
    states = [context.new_state("d0"), context.new_state("d1")]
    together, _ = observe(states, arrived, plan, context)
    for k in range(2):
        alone, _ = observe([states[k]], [arrived[k]], plan, context)
        assert ids(alone[0].buffer) == ids(together[k].buffer)
        assert alone[0].pool == together[k].pool


def test_a_user_is_asked_once_for_each_dialogue_that_is_kept(lm: LanguageModel, people: list[User]) -> None:
    context = site_of(lm, SETTINGS, people)
    states, _ = observe([context.new_state("d0")], [people[0].stream[:20]], RoundPlan(1, 0), context)
    once, notes = annotate(states, context)
    twice, again = annotate(once, context)
    wanted = {k.id for k in once[0].buffer.bins} | {i for i, _ in once[0].pool.slots}
    assert set(once[0].replies) == wanted
    assert notes == again == [Observation(annotations=len(wanted))]
    assert twice == once


def test_a_limit_on_annotations_leaves_the_pool_and_the_full_stream_alone(
    lm: LanguageModel, people: list[User]
) -> None:
    stream, plan = people[0].stream[:20], RoundPlan(1, 0)

    def replies(policy: str, limit: int) -> tuple[set[str], set[str]]:
        selection = SelectionConfig(policy=policy, bins=4, annotations_per_round=limit)
        context = site_of(lm, SETTINGS.model_copy(update={"selection": selection}), people)
        states, _ = observe([context.new_state("d0")], [stream], plan, context)
        states, _ = annotate(states, context)
        return {i for i, _ in states[0].pool.slots}, set(states[0].replies)

    pool, everything = replies("quality", 0)
    limited_pool, limited = replies("quality", 1)
    assert limited_pool == pool <= limited < everything
    assert replies("full-stream", 1)[1] == {d.id for d in stream}


def test_who_is_asked_does_not_depend_on_when_it_came(lm: LanguageModel, people: list[User]) -> None:
    """Else a limit would prefer what came while a bin was free, of policies that keep it."""
    selection = SelectionConfig(policy="quality", bins=20, annotations_per_round=5)
    shared = SETTINGS.shared.model_copy(update={"pool_capacity": 0})
    context = site_of(lm, SETTINGS.model_copy(update={"selection": selection, "shared": shared}), people)
    first = []
    for name in (f"d{n}" for n in range(40)):
        states, _ = observe([context.new_state(name)], [people[0].stream[:20]], RoundPlan(1, 0), context)
        states, _ = annotate(states, context)
        first += [ids(states[0].buffer).index(k.id) < 10 for k in states[0].annotated]
    assert len(first) == 200 and np.mean(first) == pytest.approx(0.5, abs=0.12)  # σ = 0.035


def test_settings_of_another_selection_are_refused(lm: LanguageModel, people: list[User]) -> None:
    context = site_of(lm, SETTINGS, people)
    other = site_of(lm, SETTINGS.model_copy(update={"selection": SelectionConfig(policy="uds", bins=4)}), people)
    with pytest.raises(StateError, match="selected by other settings"):
        observe([context.new_state("d0")], [people[0].stream[:2]], RoundPlan(1, 0), other)


@pytest.mark.parametrize("policy", ["fifo", "quality", "random"])
def test_a_limit_makes_every_policy_ask_equally_often(policy: str, lm: LanguageModel, people: list[User]) -> None:
    """4 bins, 2 asked a round: after two rounds 4, whatever left the buffer; what waits is not learned from."""
    selection = SelectionConfig(policy=policy, bins=4, annotations_per_round=2)
    update = {"selection": selection, "shared": SETTINGS.shared.model_copy(update={"pool_capacity": 0})}
    context = site_of(lm, SETTINGS.model_copy(update=update), people)
    states = [context.new_state("d0")]
    for number, part in ((1, people[0].stream[:15]), (2, people[0].stream[15:40])):
        states, notes = learn_alone(states, [part], None, RoundPlan(number, 0), context)
        assert notes[0].annotations == 2 * number
        assert len(states[0].annotated) <= 2 * number and len(states[0].buffer) == 4
        assert set(states[0].synthetic) == {k.id for k in states[0].annotated}
        made = sum(map(len, states[0].synthetic.values()))
        assert notes[0].personal_examples == len(states[0].annotated) + made


def test_an_empty_stream_is_no_error(lm: LanguageModel, people: list[User]) -> None:
    context, plan = site_of(lm, SETTINGS, people), RoundPlan(1, 0)
    states, notes = observe([context.new_state("d0")], [[]], plan, context)
    states, _ = annotate(states, context)
    states, written = synthesize(states, plan, context)
    assert len(states[0].buffer) == 0 and notes[0].arrived == 0
    assert written == [Observation(synthetic_kept=0, synthetic_rejected=0, synthetic_reasons={})]


def test_an_observation_is_kept_as_json_and_joined_with_what_comes_later() -> None:
    early = Observation(arrived=3, epsilon=0.0, seconds={"observe": 1.0})
    late = Observation(epsilon=2.0, personal_loss_first=None, seconds={"learn_personal": 2.0})
    both = early.joined(late)
    assert both == Observation(arrived=3, epsilon=2.0, seconds={"observe": 1.0, "learn_personal": 2.0})
    assert Observation.of(json.loads(json.dumps(both.seen()))) == both
    assert Observation.of({"arrived": 3, "of_a_later_version": 1}) == Observation(arrived=3)
    assert early.seen() == {"arrived": 3, "epsilon": 0.0, "seconds": {"observe": 1.0}}
