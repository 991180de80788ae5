"""Votes for candidates: one a dialogue, for the nearest, moved by nobody else's words, noised and paid for."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import new_ledger

from florilegium.client.calibration import planned_event
from florilegium.client.context import CohortContext
from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.model import LanguageModel
from florilegium.client.pool import Pool
from florilegium.client.state import DeviceState
from florilegium.client.votes import VotingContext, _noised, cast_votes, counts, place
from florilegium.privacy.accounting import epsilon
from florilegium.privacy.plan import RoundPlan
from florilegium.simulation.benchmarks.votes import Voters, histogram, once, winners
from florilegium.simulation.config import ExperimentConfig, load_config
from florilegium.simulation.settings import find_config

TEA = Dialogue("tea", "Do you like green tea?", "Yes, I drink it every morning.")
RAIN = Dialogue("rain", "Will it rain tomorrow?", "They say it will rain all day.")
CODE = Dialogue("code", "Why does my program crash?", "It reads past the end of the list.")
CANDIDATES = (TEA, RAIN, CODE)


def config(*overrides: str) -> ExperimentConfig:
    return once(load_config(find_config("scale/votes"), ["shared.pool_capacity=6", *overrides]))


def context(lm: LanguageModel, *overrides: str) -> VotingContext:
    ours = CohortContext.of(lm, config(*overrides), 0, lambda device, dialogue: "", None, new_ledger())
    return VotingContext.about(CANDIDATES, ours)


def device(said: list[Dialogue], about: VotingContext) -> DeviceState:
    slots = tuple((d.id, d.prompt) for d in said)
    state = about.new_state("one")
    return replace(state, pool=Pool(6, slots, len(slots)), replies={d.id: d.response for d in said})


def named(*said: Dialogue) -> list[Dialogue]:
    return [replace(d, id=f"d{i}") for i, d in enumerate(said)]


def test_each_dialogue_votes_for_the_nearest_candidate(lm: LanguageModel) -> None:
    """What is word for word a candidate votes for it; one whose user has said nothing to it has no vote."""
    about = context(lm)
    assert counts(device(named(TEA, CODE, TEA, TEA), about), about).tolist() == [3, 0, 1]
    unsaid = replace(device(named(TEA, RAIN), about), replies={"d1": RAIN.response})
    assert counts(unsaid, about).tolist() == [0, 1, 0]


@pytest.mark.parametrize("other", ["", "tea " * 400, "Will it rain?"])
def test_a_dialogue_that_is_replaced_moves_one_vote_and_no_others(lm: LanguageModel, other: str) -> None:
    about = context(lm)
    before = device(named(TEA, RAIN, CODE), about)
    after = device(named(TEA, RAIN, Dialogue("", other, "Hm.")), about)
    moved = counts(after, about) - counts(before, about)
    assert float(moved.norm()) <= math.sqrt(2) and float(moved.sum()) == 0
    assert torch.equal(place(TEA, lm), place(TEA, lm)) and float(place(TEA, lm).norm()) == pytest.approx(1)


def test_the_noise_is_for_what_a_replaced_dialogue_moves(lm: LanguageModel) -> None:
    """A noise multiplier is for what moves by 2, replace-one: for √2 it takes σ / √2."""
    about = context(lm)
    event, privacy = planned_event(about.config), about.config.privacy
    assert (event.sampling_rate, event.steps) == (1.0, 1)  # no coin keeps a dialogue from voting
    assert epsilon([event], privacy.delta, "replace-one") <= privacy.epsilon
    assert about.noise_std * math.sqrt(2) == pytest.approx(event.noise_multiplier)
    state, plan = about.new_state("one"), RoundPlan(1, 0)
    drawn = torch.cat([_noised(torch.zeros(400), replace(state, secret=k), plan, about) for k in range(25)])
    assert float(drawn.std()) == pytest.approx(about.noise_std, rel=0.03)
    assert abs(float(drawn.mean())) < 4 * about.noise_std / 100


def test_votes_are_summed_by_the_server_and_paid_for(lm: LanguageModel) -> None:
    """Without noise the sum is the counts; with it each device has spent its budget: a second round gets none."""
    streams = {"one": named(TEA, CODE, TEA), "two": named(RAIN, TEA)}
    plain = Voters(context_of(lm, streams, "privacy.mode=none"), streams, at_once=True)
    assert histogram(plain).tolist() == pytest.approx([3, 1, 1])
    noisy = Voters(context_of(lm, streams, "privacy.epsilon=8"), streams, at_once=True)
    assert histogram(noisy).tolist() != [3, 1, 1]
    spent = [seen.epsilon for seen in noisy.observations[0].values()]
    assert all(e is not None and 0 < e <= 8 for e in spent)
    again = noisy.contribute(list(streams), torch.ones(3), RoundPlan(2, 1))
    assert again == [None, None]


def context_of(lm: LanguageModel, streams: dict[str, list[Dialogue]], *overrides: str) -> VotingContext:
    said = {name: {d.id: d.response for d in of} for name, of in streams.items()}
    ours = CohortContext.of(lm, config(*overrides), 0, lambda device, d: said[device][d], None, new_ledger())
    return VotingContext.about(CANDIDATES, ours)


def test_what_noise_alone_can_give_wins_nothing() -> None:
    assert winners(np.array([9.0, 4.0, -3.0]), 2.0).tolist() == [9, 0, 0]
    assert winners(np.array([9.0, 4.0, 0.0]), 0.0).tolist() == [9, 4, 0]


def test_votes_are_cast_about_candidates_alone(lm: LanguageModel) -> None:
    plain = CohortContext.of(lm, config(), 0, lambda device, dialogue: "")
    with pytest.raises(TypeError, match="VotingContext"):
        cast_votes([plain.new_state("one")], torch.zeros(3), RoundPlan(1, 0), plain)
    sampled = CohortContext.of(lm, load_config(find_config("scale/votes")), 0, lambda device, dialogue: "")
    with pytest.raises(ValueError, match=r"shared\.sampling_rate = 1"):
        cast_votes([], torch.zeros(3), RoundPlan(1, 0), VotingContext.about(CANDIDATES, sampled))
