"""Profiles that their owners can edit, devices that adapt when it is time, and people who say what they think."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import Note

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.config import AdapterConfig, SamplingConfig
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.packing import Example
from florilegium.client.personalization.asls import Asls, Device, Interaction
from florilegium.client.personalization.config import ArmName, AslsConfig, ProfileConfig
from florilegium.client.personalization.profile import Interest, Profile, ProfileError, drift
from florilegium.privacy.seeds import derive_seed
from florilegium.simulation.data.population import User
from florilegium.simulation.personalization.config import ReptileConfig, UserConfig
from florilegium.simulation.personalization.interactive import better_from, feedback, reptile, simulate_user

SHAPE, GREEDY = AdapterConfig(rank=2, alpha=4), SamplingConfig(max_new_tokens=6)
AXES = {"ships": [1.0, 0, 0], "sails": [0.95, 0.3, 0], "soup": [0, 1.0, 0], "rain": [0, 0, 1.0]}


def embed(texts: Sequence[str]) -> torch.Tensor:
    return torch.tensor([AXES.get(t, [0.0, 0, 0]) for t in texts])


# -- the profile --------------------------------------------------------------------------------------------------


def test_a_profile_is_the_weighted_sum_of_its_interests() -> None:
    """α ∝ f · log₂(1 + n) · 2^(−age / 10): 1 · 1 · ½ for ships, 0.5 · 2 · 1 for soup."""
    config = ProfileConfig(half_life=10)
    profile = Profile((Interest("ships", 1, 5, 1.0), Interest("soup", 3, 15, 0.5)), 15)
    assert profile.weights(config).tolist() == pytest.approx([1 / 3, 2 / 3])
    assert profile.vector(embed, config).tolist() == pytest.approx([1 / 3, 2 / 3, 0])


def test_what_comes_up_again_counts_and_feedback_moves() -> None:
    config = ProfileConfig(same=0.9, feedback_rate=0.5)
    profile = Profile()
    for text, accepted in (("ships", 1), ("sails", 1), ("soup", 0)):
        profile = profile.after(text, accepted, embed, config)
    ships, soup = profile.interests
    assert (ships.text, ships.count, ships.last, ships.feedback) == ("ships", 2, 2, 0.875)
    assert (soup.text, soup.count, soup.last, soup.feedback) == ("soup", 1, 3, 0.25)
    assert profile.words(config) == "ships, soup" and profile.interactions == 3


def test_the_least_interest_goes_when_there_is_no_room() -> None:
    config = ProfileConfig(interests=2, half_life=1)
    profile = Profile()
    for text in ("ships", "soup", "rain"):
        profile = profile.after(text, 1, embed, config)
    assert [i.text for i in profile.interests] == ["soup", "rain"]


def test_an_owner_reads_edits_and_deletes() -> None:
    config = ProfileConfig()
    profile = Profile((Interest("ships", 2, 4, 0.9), Interest("soup", 1, 5, 0.5)), 5)
    told = json.loads(profile.to_json())
    assert Profile.from_json(profile.to_json()) == profile
    told["interests"].pop(0)
    told["interests"][0]["text"] = "rain"
    edited = Profile.from_json(json.dumps(told))
    assert edited.vector(embed, config).tolist() == pytest.approx([0, 0, 1])
    assert len(profile.to_json()) < 400
    for wrong in ("{", '{"interests": [{"text": "x", "size": 1}], "interactions": 1}', "[]",
                  json.dumps({"interests": [{"text": "x" * 81}], "interactions": 1})):  # fmt: skip
        with pytest.raises(ProfileError):
            Profile.from_json(wrong)


def test_drift_is_one_minus_the_cosine() -> None:
    assert drift(torch.tensor([1.0, 0]), torch.tensor([3.0, 0])) == pytest.approx(0)
    assert drift(torch.tensor([1.0, 0]), torch.tensor([0, 2.0])) == pytest.approx(1)


# -- when, how fast, on what --------------------------------------------------------------------------------------


def met(prompt: str, said: str = "yes", accepted: bool = False, wanted: str = "no, soup") -> Interaction:
    return Interaction(prompt, said, accepted, wanted)


def device_after(asls: Asls, *interactions: Interaction) -> Device:
    device = Device("d")
    for each in interactions:
        device = asls.observe(device, each)
    return device


def test_it_adapts_after_enough_feedback_or_when_the_profile_moves(lm: LanguageModel) -> None:
    asls = Asls(lm, AslsConfig(fresh=3, drift=0.05), 0)
    device = device_after(asls, met("i like ships"), met("i like ships"))
    assert not asls.wants_to_adapt(device) and asls.wants_to_adapt(asls.observe(device, met("i like ships")))
    rows = lm.adapters(lm.layout(SHAPE), lm.layout(SHAPE).start(0))
    (device,), _, _ = asls.adapt([device], rows)
    assert (device.fresh, device.times) == (0, 1)
    same = asls.observe(asls.observe(device, met("i like ships")), met("i like ships"))
    other = asls.observe(asls.observe(device, met("the train is late again")), met("what is seven times eight"))
    assert not asls.wants_to_adapt(same) and asls.wants_to_adapt(other)
    silent = device_after(asls, *[met("hm", wanted="")] * 5)
    assert not asls.wants_to_adapt(silent)  # nothing to learn is known


def test_the_model_describes_a_person_anew_when_the_profile_has_moved(lm: LanguageModel) -> None:
    asls = Asls(lm, AslsConfig(arm="summary", drift=0.05), 0)
    (told,) = asls.refresh([device_after(asls, met("i like ships"))])
    assert told.summary and told.summary in asls.prompt(told, "hello")
    (same,) = asls.refresh([asls.observe(told, met("i like ships"))])
    assert same.told_at is told.told_at
    (moved,) = asls.refresh([asls.observe(same, met("what is seven times eight"))])
    assert moved.told_at is not None and not torch.equal(moved.told_at, told.told_at)  # type: ignore[arg-type]


def test_fresh_feedback_raises_the_rate_and_time_lowers_it(lm: LanguageModel) -> None:
    asls = Asls(lm, AslsConfig(rate=1e-3, boost=2, decay=0.5), 0)
    window = (met("a"), met("b"), met("c"), met("d"))
    assert asls.rate(Device("d", window=window, fresh=2)) == pytest.approx(1e-3 * (1 + 2 * 0.5))
    assert asls.rate(Device("d", window=window, fresh=4, times=2)) == pytest.approx(1e-3 * 3 / 2)


def test_arms_leave_out_what_they_are_named_after(lm: LanguageModel) -> None:
    def of(arm: str) -> Asls:
        return Asls(lm, AslsConfig.model_validate({"arm": arm, "examples": 2, "fresh": 1}), 0)

    four = [met(f"i like {x}") for x in ("ships", "soup", "rain", "sails")]
    assert device_after(of("adaptation-only"), *four).profile == Profile()
    assert of("adaptation-only").chosen(device_after(of("adaptation-only"), *four)) == [four[3], four[2]]
    profiling = of("profiling-only")
    assert not profiling.wants_to_adapt(device_after(profiling, *four))
    assert "ships" in profiling.prompt(device_after(profiling, *four), "hello")
    assert of("full").prompt(device_after(of("full"), *four), "hello") == "hello"
    assert not of("no-retuning").wants_to_adapt(Device("d", window=tuple(four), fresh=4, times=1))
    accepted = Interaction("x", "said", True)
    assert of("no-feedback")._lesson(met("x", "said", False, "wanted")) == "said"
    window = tuple(four)
    four_new = Device("d", window=window, fresh=4)
    assert of("no-feedback").rate(four_new) < of("full").rate(four_new) == of("adaptation-only").rate(four_new)
    told = of("with-words")
    assert "ships" in told.prompt(device_after(told, *four), "hello") and told.config.adapts
    assert (
        of("no-feedback")._lesson(Interaction("x", "said", False)) == "said" and of("full")._lesson(accepted) == "said"
    )
    assert of("full")._lesson(Interaction("x", "said", False)) == ""
    chosen = [tuple(of("random-sampling").chosen(Device("d", window=tuple(four), times=n))) for n in range(8)]
    assert len(set(chosen)) > 1


def test_it_learns_what_is_nearest_to_the_profile(lm: LanguageModel) -> None:
    asls = Asls(lm, AslsConfig(examples=1, window=8), 0)
    four = [met(text) for text in ("i like big ships", "i like old ships", "what time is it", "i like red ships")]
    device = device_after(asls, *four)
    vectors = torch.nn.functional.normalize(asls.embed([i.prompt for i in four]), dim=1)
    near = vectors @ device.profile.vector(asls.embed, asls.config.profile)
    assert asls.chosen(device) == [four[int(near.argmax())]] and near.argmax() != near.argmin()


def test_an_adaptation_makes_what_was_wanted_likelier_and_what_was_rejected_less(lm: LanguageModel) -> None:
    asls = Asls(lm, AslsConfig(steps=6, rate=5e-3, fresh=1), 0)
    layout = lm.lora_layout(SHAPE)
    rows = lm.adapters(layout, torch.stack([layout.start(0)] * 2))
    devices = [
        device_after(asls, met("which soup", "none at all", False, "lentil soup")),
        device_after(asls, met("hm", "ah", True)),
    ]
    _, after, tokens = asls.adapt(devices, rows)
    told = lm.format.dialogues([Dialogue("", "which soup", "lentil soup"), Dialogue("", "which soup", "none at all")])
    bare, now = (lm.score(told, [0, 0], arm) for arm in ([], [after]))
    gained = [b.nll - n.nll for b, n in zip(bare, now, strict=True)]
    assert gained[0] > 0.5 and gained[0] > gained[1] and min(tokens) > 0
    _, alone, _ = asls.adapt(devices[:1], rows.pick([0]))
    torch.testing.assert_close(alone.rows[0], after.rows[0], atol=1e-4, rtol=1e-3)


def test_the_newest_are_kept_and_what_was_met_counts_once(lm: LanguageModel) -> None:
    """A window of two after three: the first has left it, though it counts among what is new."""
    three = [met(text) for text in ("a", "b", "c")]
    device = device_after(Asls(lm, AslsConfig(window=2), 0), *three)
    assert device.window == tuple(three[1:]) and device.fresh == device.profile.interactions == 3
    plain = Asls(lm, AslsConfig(arm="adaptation-only", window=3, examples=2), 0)
    assert plain.chosen(device_after(plain, *three)) == [three[2], three[1]]  # without a profile the newest


def test_a_correction_weighs_a_whole_reply_and_an_accepted_one_half(lm: LanguageModel) -> None:
    """Of replies of four tokens each: ½ and 1 by 8 tokens; without feedback everything is half."""
    training_set, four = [met("a", accepted=True), met("b")], Example((1, 2), (3, 4, 5, 6), (0, 2), False)
    assert Asls(lm, AslsConfig(), 0)._weights(training_set, [four, four]) == [0.5 / 8, 1 / 8]
    assert Asls(lm, AslsConfig(arm="no-feedback"), 0)._weights(training_set, [four, four]) == [0.5 / 8] * 2


def test_a_preference_pulls_back_to_the_model_without_the_adapter(lm: LanguageModel, noted: Note) -> None:
    """What the gradient weighs: ± preference · β · σ(−β · margin), the margin against what is beneath alone.

    At a margin of 0, as with the adapter itself for a reference, that is ± preference · β / 2. A correction's is up.
    """
    layout, shape = lm.lora_layout(SHAPE), lm.lora_layout(AdapterConfig(rank=2, alpha=4, targets=("v_proj",)))
    noise = torch.Generator().manual_seed(0)
    rows = lm.adapters(layout, layout.start(0) + 0.05 * torch.randn(layout.width, generator=noise))
    beneath = [lm.adapters(shape, shape.start(1) + 0.05 * torch.randn(shape.width, generator=noise))]
    asls = Asls(lm, AslsConfig(arm="adaptation-only", steps=1, beta=0.3, preference=0.8), 0, beneath)
    calls = noted(lm.engine, "gradient")
    asls.adapt([device_after(asls, met("which soup", "none at all", False, "lentil soup"))], rows)
    told = lm.format.dialogues([Dialogue("", "which soup", "lentil soup"), Dialogue("", "which soup", "none at all")])
    bare, now = (lm.engine.score(told, [0, 0], arm) for arm in (beneath, [*beneath, rows]))
    margin = (bare[0] - now[0]) - (bare[1] - now[1])
    slope = 0.8 * 0.3 / (1 + math.exp(0.3 * margin))
    (call,) = calls
    assert call["batches"] == [[told[0], *told]] and call["frozen"] == beneath
    assert call["weights"][0] == pytest.approx([1 / told[0].targets, slope, -slope], rel=1e-3)
    assert abs(margin) > 0.5 and slope != pytest.approx(0.12, rel=0.05)


def test_each_device_takes_steps_of_its_own_rate(lm: LanguageModel) -> None:
    """Adam's first step is the rate, wherever there is a gradient: 2e-3 with all feedback fresh, by half later."""
    asls = Asls(lm, AslsConfig(arm="adaptation-only", steps=1, rate=1e-3, boost=1, decay=1), 0)
    layout = lm.lora_layout(SHAPE)
    rows = lm.adapters(layout, torch.stack([layout.start(0)] * 2))
    new, old = (device_after(asls, met("which soup")) for _ in range(2))
    devices, after, tokens = asls.adapt([new, replace(old, times=1)], rows)
    moved = (after.rows - rows.rows).abs().amax(1)
    assert moved.tolist() == pytest.approx([2e-3, 1e-3], rel=1e-3)
    assert [d.times for d in devices] == [1, 2] and [d.fresh for d in devices] == [0, 0]
    asked = lm.format.dialogues([Dialogue("", "which soup", "no, soup")] * 2 + [Dialogue("", "which soup", "yes")])
    assert tokens == [sum(e.length for e in asked)] * 2  # the correction, and the pair of it and what was said


# -- people -------------------------------------------------------------------------------------------------------


def test_a_user_accepts_what_is_near_enough_slips_and_corrects() -> None:
    sure = UserConfig(accepts=0.5, slips=0, corrects=1)
    assert feedback("lentil soup", "lentil soup", sure, 0) == (True, "")
    assert feedback("no", "lentil soup", sure, 0) == (False, "lentil soup")
    noisy = UserConfig(accepts=0.5, slips=0.2, corrects=0.5)
    answers = [feedback("no", "lentil soup", noisy, seed) for seed in range(2000)]
    rejected = [wanted for accepted, wanted in answers if not accepted]
    assert 1 - len(rejected) / 2000 == pytest.approx(0.2, abs=0.03)
    assert sum(map(bool, rejected)) / len(rejected) == pytest.approx(0.5, abs=0.04)


FAST = ("with-words", "adaptation-only")


@pytest.mark.parametrize(
    "arm", [arm if arm in FAST else pytest.param(arm, marks=pytest.mark.slow) for arm in get_args(ArmName)]
)
def test_a_stream_is_lived_through(lm: LanguageModel, people: list[User], arm: str) -> None:
    streams = {f"d{k}": user.stream[:6] for k, user in enumerate(people)}
    config = AslsConfig.model_validate({"arm": arm, "fresh": 2})
    found = simulate_user(lm, config, UserConfig(corrects=1), SHAPE, GREEDY, streams, seed=0)
    assert found.nll.shape == (2, 6) and np.isfinite(found.nll).all()
    adapts = arm not in ("none", "profiling-only", "summary")
    assert bool(found.tokens.sum()) == adapts == bool(found.spent["trained"])
    assert found.seconds > 0
    if arm == "no-retuning":
        assert ((found.tokens > 0).sum(1) == 1).all()
    again = simulate_user(lm, config, UserConfig(corrects=1), SHAPE, GREEDY, {"d1": streams["d1"]}, seed=0)
    np.testing.assert_allclose(again.nll[0], found.nll[1], atol=1e-3)  # alone as in company


@pytest.mark.slow
def test_learning_from_a_stream_helps_later_in_it(lm: LanguageModel, people: list[User]) -> None:
    streams = {f"d{k}": user.stream[:24] for k, user in enumerate(people)}
    asked = UserConfig(accepts=1, slips=0, corrects=1)
    learned, none = (
        simulate_user(lm, AslsConfig.model_validate({"arm": arm}), asked, SHAPE, GREEDY, streams, seed=0)
        for arm in ("full", "none")
    )
    np.testing.assert_allclose(learned.nll[:, 0], none.nll[:, 0], atol=1e-4)  # tested before it learns
    assert learned.nll[:, 12:].mean() < none.nll[:, 12:].mean()


def test_what_is_measured_is_what_the_device_could_do_before(lm: LanguageModel, people: list[User]) -> None:
    """The second interaction's figure is that of the adapter after the first one."""
    streams = {f"d{k}": user.stream[:2] for k, user in enumerate(people)}
    config, asked = AslsConfig(fresh=1, steps=4, rate=5e-3), UserConfig(accepts=1, slips=0, corrects=1)
    first = simulate_user(lm, config, asked, SHAPE, GREEDY, {n: s[:1] for n, s in streams.items()}, seed=0)
    both = simulate_user(lm, config, asked, SHAPE, GREEDY, streams, seed=0)
    assert (first.tokens > 0).all() and (both.tokens > 0).all()
    second = lm.format.dialogues([s[1] for s in streams.values()])

    def scored(rows: torch.Tensor) -> list[float]:
        found = lm.score(second, [0, 1], [lm.adapters(lm.layout(SHAPE), rows)])
        return [s.nll / s.tokens for s in found]

    np.testing.assert_allclose(both.nll[:, 1], scored(first.rows), atol=1e-4)
    assert np.abs(both.nll[:, 1] - scored(both.rows)).max() > 0.05


def test_reptile_goes_where_people_lead_and_by_their_mean(lm: LanguageModel, people: list[User]) -> None:
    layout, stream = lm.layout(SHAPE), people[0].stream[:8]
    told = lm.format.dialogues(stream)

    def loss(row: torch.Tensor) -> float:
        return sum(s.nll for s in lm.score(told, [0] * 8, [lm.adapters(layout, row)]))

    once = ReptileConfig(rounds=1, people=2, batch_size=8, outer=1.0)
    one, two = reptile(lm, layout, once, [stream], 0), reptile(lm, layout, once, [stream, stream], 0)
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)  # two who lead alike lead as far as one
    assert loss(one) < loss(layout.start(derive_seed(0, "live", "start"))) - 1


def test_reptile_moves_the_start_by_epsilon_of_the_change(lm: LanguageModel, people: list[User]) -> None:
    """One person in a round and ε = 1: the start is where the person's steps lead."""
    layout, streams = lm.layout(SHAPE), [people[0].stream[:8]]
    whole = reptile(lm, layout, ReptileConfig(rounds=1, people=1, outer=1.0), streams, 0)
    half = reptile(lm, layout, ReptileConfig(rounds=1, people=1, outer=0.5), streams, 0)
    first = reptile(lm, layout, ReptileConfig(rounds=1, people=1, outer=1e-9), streams, 0)
    torch.testing.assert_close(half, (whole + first) / 2, atol=1e-6, rtol=1e-5)
    assert (whole - first).norm() > 1e-2 and math.isfinite(float(whole.norm()))


def test_from_when_one_is_better() -> None:
    other = np.zeros((2, 8))
    one = np.array([[1, 1, 1, -1, -1, -1, -1, -1]] * 2, dtype=float)
    assert better_from(one, other, window=1) == 4 and better_from(-one, other, window=1) is None
    assert better_from(one, other, window=2) == 5 and better_from(other - 1, other, window=3) == 3
