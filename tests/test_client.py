"""A device's parts: scores, buffer and policies, pool, synthesis' checks, state on disk."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.buffer import Buffer, Kept
from client.config import DeviceConfig, SelectionConfig
from client.lm.model import LanguageModel
from client.phases import Site, annotate, observe, synthesize
from client.policies import POLICIES
from client.pool import Pool
from client.scores import (
    domain_specific_score,
    dominant_domain,
    entropy_of_embedding,
    in_domain_dissimilarity,
)
from client.state import DeviceStore, StateError, stage
from client.synthesize import SynthesisConfig, objection, rouge1, unwrap
from privacy.accounting import Event
from privacy.plan import RoundPlan
from simulation.data.population import User

LEXICONS = {"food": frozenset({"bread", "cheese"}), "sea": frozenset({"boat"})}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def kept(identity: str, eoe: float = 0.5, dss: float = 0.5, domain: str = "", angle: float = 0.0) -> Kept:
    embedding = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float16)
    return Kept(identity, f"prompt {identity}", domain, embedding, eoe, dss)


def ids(buffer: Buffer) -> list[str]:
    return [k.id for k in buffer.bins]


# -- scores -------------------------------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    assert entropy_of_embedding(torch.tensor([2.0, 2.0, 2.0])) == pytest.approx(1.0)
    assert entropy_of_embedding(torch.tensor([3.0, 1.0])) == pytest.approx(0.8112781)  # H(¾, ¼) in bits
    assert entropy_of_embedding(torch.tensor([5.0])) == 0.0
    assert domain_specific_score("Bread and a boat", LEXICONS) == pytest.approx(2 / 4 / 2)
    assert domain_specific_score("...", LEXICONS) == 0.0
    assert dominant_domain("cheese, bread, boat", LEXICONS) == "food"
    assert dominant_domain("nothing of that", LEXICONS) == ""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert in_domain_dissimilarity(a, [a, b]) == pytest.approx(0.5)
    assert in_domain_dissimilarity(a, []) == 1.0


# -- buffer and policies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 6)), max_size=30), st.integers(1, 8))
@settings(max_examples=25, deadline=None)
def test_a_buffer_never_holds_more_than_its_capacity(
    policy: str, scores: list[tuple[float, float, float]], capacity: int
) -> None:
    buffer = Buffer(capacity, policy)
    for n, (eoe, dss, angle) in enumerate(scores):
        before = ids(buffer)
        buffer, taken = buffer.offer(kept(str(n), eoe, dss, angle=angle), rng(n))
        assert len(buffer) == min(capacity, len(before) + 1)
        assert (str(n) in ids(buffer)) == taken
        assert len(set(before) - set(ids(buffer))) == (taken and len(before) == capacity)


def test_quality_takes_the_place_of_one_that_is_worse_in_all_three() -> None:
    buffer = Buffer(2, "quality")
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
    fifo, spread = Buffer(2, "fifo"), Buffer(2, "kcenter")
    for n, angle in enumerate((0.0, 0.1, 1.5)):
        fifo, _ = fifo.offer(kept(str(n), angle=angle), rng())
        spread, _ = spread.offer(kept(str(n), angle=angle), rng())
    assert ids(fifo) == ["1", "2"]
    assert ids(spread) == ["0", "2"]


def test_random_leaves_each_out_equally_often() -> None:
    left = Counter[str]()
    for seed in range(3000):
        buffer = Buffer(3, "random", (kept("a"), kept("b"), kept("c")))
        after, _ = buffer.offer(kept("d"), rng(seed))
        left.update({"a", "b", "c", "d"} - set(ids(after)))
    assert all(abs(n - 750) < 100 for n in left.values()), left  # σ = 24


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="quality, random, fifo, kcenter"):
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


def test_empty_slots_have_coins_too() -> None:
    full = Pool(100, tuple((str(n), "") for n in range(100)))
    half = Pool(100, full.slots[:50])
    assert half.sample(0.4, 9) == [i for i in full.sample(0.4, 9) if i < 50]
    sizes = [len(full.sample(0.4, seed)) for seed in range(2000)]
    assert abs(np.mean(sizes) - 40) < 0.5  # σ = 0.11
    assert abs(np.var(sizes) - 24) < 3  # binomial, as the accounting assumes: 100 · 0.4 · 0.6; σ = 0.76


# -- synthesis ----------------------------------------------------------------------------------------------------


def test_what_is_thrown_away_and_why() -> None:
    config = SynthesisConfig(rouge1_min=0.3, rouge1_max=0.95)
    original = "do you like old films"
    assert objection("", original, [], config) == "empty"
    assert objection("completely unrelated words", original, [], config) == "too far"
    assert objection("do you like old films", original, [], config) == "copy"
    assert objection("do you like old songs", original, ["do you like old songs"], config) == "copy"
    assert objection("do you like old songs", original, [], config) == ""
    assert rouge1("a b c d", "a b x y") == pytest.approx(0.5)
    assert unwrap("sure: [ a new text ] ok") == "a new text"
    assert unwrap("no brackets") == "no brackets"
    with pytest.raises(ValueError, match="rouge1_min"):
        SynthesisConfig(rouge1_min=0.9, rouge1_max=0.5)


# -- phases and state ---------------------------------------------------------------------------------------------


def site_of(lm: LanguageModel, config: DeviceConfig, people: list[User]) -> Site:
    recorded = {d.id: d.response for user in people for d in user.stream}
    return Site.of(lm, config, 0, lambda device, dialogue: recorded[dialogue])


SETTINGS = DeviceConfig.model_validate({
    "selection": {"bins": 4},
    "shared": {"pool_capacity": 6},
    "synthesis": {"per_dialogue": 2, "instruction": "Rewrite: ", "sampling": {"max_new_tokens": 16}},
})  # fmt: skip


def test_a_device_remembers_itself(lm: LanguageModel, people: list[User], tmp_path: Path) -> None:
    site, plan = site_of(lm, SETTINGS, people), RoundPlan(1, 0)
    states, _ = observe([site.new_state("d0")], [people[0].stream[:20]], plan, site)
    states, _ = annotate(states, site)
    states, _ = synthesize(states, plan, site)
    state = replace(states[0], events=(Event(1.5, 0.5, 3),))
    store = DeviceStore(tmp_path)
    store.save([state], stage(1))
    again = store.load("d0", stage(1))
    assert torch.equal(again.personal, state.personal)
    assert [k.embedding.tolist() for k in again.buffer.bins] == [k.embedding.tolist() for k in state.buffer.bins]
    plain = {"personal": torch.empty(0), "buffer": None}
    assert replace(again, **plain) == replace(state, **plain)
    assert ids(again.buffer) == ids(state.buffer)
    with pytest.raises(StateError, match="d1"):
        store.load("d1", stage(1))


def test_selection_is_the_same_alone_and_in_a_cohort(lm: LanguageModel, people: list[User]) -> None:
    site, plan = site_of(lm, SETTINGS, people), RoundPlan(1, 0)
    arrived = [user.stream[:25] for user in people]
    states = [site.new_state("d0"), site.new_state("d1")]
    together, _ = observe(states, arrived, plan, site)
    for k in range(2):
        alone, _ = observe([states[k]], [arrived[k]], plan, site)
        assert ids(alone[0].buffer) == ids(together[k].buffer)
        assert alone[0].pool == together[k].pool


def test_a_user_is_asked_once_for_each_dialogue_that_is_kept(lm: LanguageModel, people: list[User]) -> None:
    site = site_of(lm, SETTINGS, people)
    states, _ = observe([site.new_state("d0")], [people[0].stream[:20]], RoundPlan(1, 0), site)
    once, notes = annotate(states, site)
    twice, again = annotate(once, site)
    wanted = {k.id for k in once[0].buffer.bins} | {i for i, _ in once[0].pool.slots}
    assert set(once[0].replies) == wanted
    assert notes == again == [{"annotations": len(wanted)}]
    assert twice == once


def test_an_empty_stream_is_no_error(lm: LanguageModel, people: list[User]) -> None:
    site, plan = site_of(lm, SETTINGS, people), RoundPlan(1, 0)
    states, notes = observe([site.new_state("d0")], [[]], plan, site)
    states, _ = annotate(states, site)
    states, written = synthesize(states, plan, site)
    assert len(states[0].buffer) == 0 and notes[0]["arrived"] == 0
    assert written == [{"synthetic_kept": 0, "synthetic_rejected": 0}]
