"""What each phase of a round hands to the language model: which adapters lie beneath, which texts, which rates.

Devices are made by hand. The model's calls are noted and then made.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Note, new_ledger

from florilegium.client import phases
from florilegium.client.config import DeviceConfig
from florilegium.client.context import CohortContext
from florilegium.client.dialogue import Dialogue, Echo
from florilegium.client.lm.batching import schedule, schedule_steps
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.training_data import TrainingSet
from florilegium.client.phases import annotate, learn_personal, observe, synthesize, synthesize_pool
from florilegium.client.round import adopt, contribute, learn_alone
from florilegium.client.selection import policies
from florilegium.client.selection.entry import BufferEntry
from florilegium.client.shared_training import clipped_change, noisy_steps
from florilegium.client.state import DeviceState, States
from florilegium.privacy.dpsgd import PrivateRow
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.seeds import derive_seed

PLAN = RoundPlan(1, 0)
RATE = 1e-3
ORIGINAL = ("do you like old films", "only the silent ones")
MADE = (("do you like old songs", "only the silent ones"), ("old films, do you", "only the silent ones"))
LATER = [Dialogue(str(n), f"text number {n}", "yes") for n in range(12)]
SETTINGS: dict[str, Any] = {
    "selection": {"bins": 4, "policy": "fifo"},
    "shared": {"pool_capacity": 4, "adapter": {"rank": 2, "alpha": 8, "targets": ["v_proj"]}},
    "personal": {
        "adapter": {"rank": 2, "alpha": 4, "targets": ["q_proj"]},
        "learning_rate": RATE,
        "batch_size": 2,
        "weight_decay": 0.25,
    },
    "synthesis": {"per_dialogue": 2, "instruction": "Rewrite: ", "sampling": {"max_new_tokens": 8}},
    "privacy": {"mode": "none"},
}  # fmt: skip


def site_of(lm: LanguageModel, **changes: dict[str, Any]) -> CohortContext:
    """The settings above; a section that is named is changed in part."""
    told = {**SETTINGS, **{name: {**SETTINGS[name], **section} for name, section in changes.items()}}
    replies = {d.id: d.response for d in LATER}
    return CohortContext.of(lm, DeviceConfig.model_validate(told), 7, lambda _, i: replies[i], ledger=new_ledger())


def kept(identity: str, prompt: str) -> BufferEntry:
    return BufferEntry(identity, prompt, "of no list", np.zeros(2, np.float16))


def device(
    context: CohortContext, name: str = "d0", prompt: str = ORIGINAL[0], reply: str = ORIGINAL[1]
) -> DeviceState:
    """With one dialogue, in the buffer and in the pool, of which two were made for each adapter."""
    new = context.new_state(name)
    return replace(
        new,
        buffer=replace(new.buffer, bins=(kept("x", prompt),)),
        pool=new.pool.offer("x", prompt, new.secret),
        replies={"x": reply},
        synthetic={"x": MADE},
        pool_synthetic={"x": MADE[:1]},
    )


def strong(width: int, seed: int = 0) -> torch.Tensor:
    """A row (P,) that changes what the model says."""
    return 0.05 * torch.randn(width, generator=torch.Generator().manual_seed(seed))


# -- the personal adapter -----------------------------------------------------------------------------------------


def test_the_personal_adapter_learns_on_top_of_the_shared_one(lm: LanguageModel, noted: Note) -> None:
    context, calls = site_of(lm), noted(lm.engine, "finetune")
    received = strong(context.shared_layout.width)
    (on_top,), _ = learn_personal([device(context)], received, PLAN, context)
    (bare,), _ = learn_personal([device(context)], None, PLAN, context)
    (beneath,), nothing = (call["frozen"] for call in calls)
    assert beneath.layout is context.shared_layout and torch.equal(beneath.rows, received[None]) and nothing == []
    assert not torch.equal(on_top.personal, bare.personal)
    start = lm.adapters(context.personal_layout, context.new_state("d0").personal)
    shared = lm.adapters(context.shared_layout, received)
    by_hand = lm.engine.finetune(start, [shared], calls[0]["sets"], [[RATE, RATE / 2]], 0.25)
    assert torch.equal(on_top.personal, by_hand.adapters.rows[0])


def test_what_was_made_is_learned_from_with_its_original(lm: LanguageModel, noted: Note) -> None:
    """One dialogue and two like it are three examples; what is not annotated, or in the pool alone, is none."""
    context, calls = site_of(lm), noted(lm.engine, "finetune")
    state = device(context)
    state = replace(
        state,
        buffer=replace(state.buffer, bins=(*state.buffer.bins, kept("unasked", "what time is it"))),
        pool=state.pool.offer("pooled", "who is there", state.secret),
        replies={**state.replies, "pooled": "nobody"},
    )
    _, (page,) = learn_personal([state], None, PLAN, context)
    (training_set,) = calls[0]["sets"]
    assert training_set.examples == lm.format.dialogues([Dialogue("x", *pair) for pair in (ORIGINAL, *MADE)])
    assert sorted(i for batch in training_set.batches for i in batch) == [0, 1, 2] and page.personal_examples == 3
    assert page.personal_tokens == sum(e.length for e in training_set.examples)


def test_the_rate_of_the_personal_adapter_falls_to_zero_and_its_order_is_another_in_each_round(
    lm: LanguageModel, noted: Note
) -> None:
    context, calls = site_of(lm, personal={"steps": 4, "batch_size": 1}), noted(lm.engine, "finetune")
    for number in (1, 2):
        learn_personal([device(context)], None, RoundPlan(number, 0), context)
    assert calls[0]["rates"] == [pytest.approx([RATE, 0.75 * RATE, 0.5 * RATE, 0.25 * RATE])]
    assert calls[0]["weight_decay"] == 0.25
    orders = [schedule_steps(3, 1, 4, derive_seed(7, "d0", number, "personal-order")) for number in (1, 2)]
    assert [call["sets"][0].batches for call in calls] == orders and orders[0] != orders[1]
    by_epochs = site_of(lm, personal={"epochs": 2})
    learn_personal([device(by_epochs)], None, PLAN, by_epochs)
    assert calls[2]["sets"][0].batches == schedule(3, 2, 2, derive_seed(7, "d0", 1, "personal-order"))
    assert calls[2]["rates"] == [pytest.approx([RATE, 0.75 * RATE, 0.5 * RATE, 0.25 * RATE])]


@pytest.mark.parametrize("on_new_shared", ["keep", "retrain"])
def test_a_personal_adapter_goes_on_from_what_it_was_or_begins_anew(
    lm: LanguageModel, noted: Note, on_new_shared: str
) -> None:
    context, calls = site_of(lm, personal={"on_new_shared": on_new_shared}), noted(lm.engine, "finetune")
    older = strong(context.personal_layout.width, 1)
    learn_personal([replace(device(context), personal=older)], None, PLAN, context)
    start = older if on_new_shared == "keep" else context.new_state("d0").personal
    assert torch.equal(calls[0]["trained"].rows, start[None])


def test_each_device_of_a_cohort_has_its_own_lesson_rates_and_row(lm: LanguageModel, noted: Note) -> None:
    context, calls = site_of(lm), noted(lm.engine, "finetune")
    states = [device(context), replace(device(context, "d1", "what is for dinner", "soup"), synthetic={})]
    after, pages = learn_personal(states, None, PLAN, context)
    assert [[e.reply for e in x.examples] for x in calls[0]["sets"]] == [
        [e.reply for e in lm.format.dialogues([Dialogue("", "", reply)] * count)]
        for reply, count in ((ORIGINAL[1], 3), ("soup", 1))
    ]
    assert [len(rates) for rates in calls[0]["rates"]] == [p.personal_steps for p in pages] == [2, 1]
    for state, began in zip(after, states, strict=True):
        (alone,), _ = learn_personal([began], None, PLAN, context)
        torch.testing.assert_close(state.personal, alone.personal, atol=1e-5, rtol=0)
    assert not torch.equal(after[0].personal, after[1].personal)


# -- the shared adapter -------------------------------------------------------------------------------------------


def test_noisy_steps_go_on_from_each_other_with_nothing_personal_beneath(lm: LanguageModel, noted: Note) -> None:
    """Each step's gradients are of the row that the step before made; examples are a dialogue and what is like it.

    Nothing is clipped, so that a sum would not pass for the mean of both texts.
    """
    context = site_of(
        lm, shared={"sampling_rate": 1.0, "steps_per_round": 2, "learning_rate": 0.5}, privacy={"clip_norm_l2": 50.0}
    )
    calls = noted(lm.engine, "dp_gradients")
    state, received = device(context), strong(context.shared_layout.width)
    change = noisy_steps([state], received, PLAN, context)["d0"]
    texts = lm.format.dialogues([Dialogue("x", *pair) for pair in (ORIGINAL, MADE[0])])
    assert [call["batches"] for call in calls] == [[texts]] * 2 and [call["frozen"] for call in calls] == [[], []]
    assert all(call["trained"].layout is context.shared_layout for call in calls)
    row = PrivateRow(
        received, learning_rate=0.5, clip_norm_l2=context.config.privacy.clip_norm_l2, noise_multiplier=0.0,
        expected_batch=4.0, key=0,
    )  # fmt: skip
    for _ in range(2):
        (gradients,), _ = lm.engine.dp_gradients(lm.adapters(context.shared_layout, row.row), [], [texts])
        row.step(gradients.mean(0, keepdim=True))
    torch.testing.assert_close(change, row.row - received, atol=1e-6, rtol=0)
    assert change.norm() > 1e-3


def test_what_a_server_adds_to_frozen_weights_lies_beneath_both_adapters(lm: LanguageModel, noted: Note) -> None:
    context = site_of(
        lm, shared={"sampling_rate": 1.0, "adapter": {**SETTINGS["shared"]["adapter"], "factors": "both"}}
    )
    received = strong(context.whole.with_weights().width)
    private, plain = noted(lm.engine, "dp_gradients"), noted(lm.engine, "finetune")
    noisy_steps([device(context)], received, PLAN, context)
    clipped_change([device(context)], received, PLAN, context)
    learn_personal([device(context)], received, PLAN, context)
    width = context.shared_layout.width
    for (weights,) in (private[0]["frozen"], plain[0]["frozen"]):
        assert torch.equal(weights.rows[0], received[width:])
    shared, weights = plain[1]["frozen"]
    assert torch.equal(shared.rows[0], received[:width]) and torch.equal(weights.rows[0], received[width:])


def test_a_whole_change_is_of_the_pools_own_words_at_one_rate(lm: LanguageModel, noted: Note) -> None:
    """A reply that is the model's is no example; with `source` the buffer's dialogues are, without what was made."""
    sections: dict[str, Any] = {"adamw_learning_rate": 2e-3, "batch_size": 2, "steps_per_round": 3, "proximal": 0.5}
    context = site_of(lm, shared=sections, privacy={"clips": "change"})
    calls, received = noted(lm.engine, "finetune"), strong(context.shared_layout.width)
    state = device(context)
    state = replace(
        state,
        pool=state.pool.offer("echo", "are you a machine", state.secret),
        replies={**state.replies, "echo": Echo("i am")},
        echoes=frozenset({"echo"}),
    )
    changes = clipped_change([state], received, PLAN, context)
    (call,) = calls
    (training_set,) = call["sets"]
    assert training_set.examples == lm.format.dialogues([Dialogue("x", *pair) for pair in (ORIGINAL, MADE[0])])
    assert training_set.batches == schedule_steps(2, 2, 3, derive_seed(7, "d0", 1, "shared-order"))
    assert call["rates"] == [[2e-3] * 3] and call["proximal"] == 0.5 and call["frozen"] == []
    assert torch.equal(call["trained"].rows, received[None])
    assert 0 < changes["d0"].norm() <= context.config.privacy.clip_norm_l2 * 1.001
    from_buffer = site_of(lm, shared={**sections, "source": "buffer"}, privacy={"clips": "change"})
    clipped_change([state], received, PLAN, from_buffer)
    assert calls[1]["sets"][0].examples == lm.format.dialogues([Dialogue("x", *ORIGINAL)])


def test_coins_of_a_sample_are_new_in_each_step_and_round_and_of_each_device(lm: LanguageModel) -> None:
    context = site_of(lm)
    one, other = context.new_state("d0"), context.new_state("d1")
    found = [
        context.coins.sample(state, 200, RoundPlan(number, 0), step, context)
        for state in (one, other)
        for number in (1, 2)
        for step in (0, 1)
    ]
    assert len({tuple(sample) for sample in found}) == 8
    assert found[0] == context.coins.sample(one, 200, RoundPlan(1, 0), 0, context)
    assert all(60 <= len(sample) <= 140 for sample in found)  # half of them; σ = 7


# -- reading and writing ------------------------------------------------------------------------------------------


def test_what_is_written_is_written_by_the_base_model_from_one_original(lm: LanguageModel, noted: Note) -> None:
    """No adapter is on; a dialogue that has its descendants, or whose reply is the model's, is not asked for."""
    context, calls = site_of(lm, shared={"synthetic": 1}), noted(lm, "generate")
    state = replace(device(context), synthetic={}, pool_synthetic={})
    fresh, _ = synthesize_pool([state], context)
    assert calls[0]["prompts"] == [f"Rewrite: {ORIGINAL[0]}"] and calls[0]["adapters"] == []
    assert calls[0]["seeds"] == [derive_seed(7, "d0", "x", "descendants")] and set(fresh[0].pool_synthetic) == {"x"}
    again, _ = synthesize_pool([replace(state, pool_synthetic={"x": MADE})], context)
    echo, _ = synthesize_pool([replace(state, echoes=frozenset({"x"}))], context)
    assert again[0].pool_synthetic == {"x": MADE} and echo[0].pool_synthetic == {}
    assert [call["prompts"] for call in calls[1:]] == [[], []]
    calls.clear()
    (after,), _ = synthesize([state], PLAN, context)
    assert calls[0]["prompts"] == [f"Rewrite: {ORIGINAL[0]}"] * 2 and calls[0]["adapters"] == []
    first = derive_seed(7, "d0", "x", "synthesis")
    assert calls[0]["seeds"] == [first, first + 1] and set(after.synthetic) == {"x"}
    (kept_as_made,), _ = synthesize([device(context)], PLAN, context)
    assert kept_as_made.synthetic == {"x": MADE} and calls[1]["prompts"] == []


def test_a_dialogue_is_read_with_what_was_said_before_it_and_pooled_without(lm: LanguageModel, noted: Note) -> None:
    context, calls = site_of(lm), noted(lm, "embed")
    arrived = [[Dialogue("a", "and you?", "", context="i like tea"), LATER[0]], [LATER[1]]]
    (one, two), notes = observe([context.new_state("d0"), context.new_state("d1")], arrived, PLAN, context)
    assert calls[0] == {
        "texts": ["i like tea\nand you?", "text number 0", "text number 1"],
        "readings": [context.config.selection.reading],
    }
    assert [k.prompt for k in one.buffer.bins] == ["i like tea\nand you?", "text number 0"]
    assert one.pool.slots == (("a", "and you?"), ("0", "text number 0")) and two.pool.slots == (("1", "text number 1"),)
    alone = lm.embed(["text number 1"], [context.config.selection.reading])[0].readings[
        context.config.selection.reading
    ]
    np.testing.assert_allclose(two.buffer.bins[0].embedding, alone.vector.numpy(), atol=1e-2)
    assert [n.arrived for n in notes] == [2, 1] and (one.arrived, two.arrived) == (2, 1)


def test_a_policy_by_chance_draws_anew_in_each_round(
    lm: LanguageModel, noted: Note, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds of twelve arrivals at two full bins: 24 decisions, in each round by others of its own coins."""
    context, decisions = site_of(lm, selection={"policy": "random", "bins": 2}), []
    policy = policies.POLICIES["random"]

    def deciding(*given: Any) -> int | None:
        decisions.append(policy.decide(*given))
        return decisions[-1]

    monkeypatch.setitem(policies.POLICIES, "random", replace(policy, decide=deciding))
    full = replace(context.new_state("d0").buffer, bins=(kept("a", "one"), kept("b", "two")))
    states = [replace(context.new_state("d0"), buffer=full)]
    for number in (1, 2):
        observe(states, [LATER], RoundPlan(number, 0), context)
    observe([replace(states[0], id="d1")], [LATER], RoundPlan(1, 0), context)
    observe(states, [LATER], RoundPlan(1, 0), context)
    first, second, other, again = (tuple(decisions[i : i + 12]) for i in range(0, 48, 12))
    assert len({first, second, other}) == 3 and again == first


# -- the whole round ----------------------------------------------------------------------------------------------


def test_a_round_goes_through_its_phases_in_order(lm: LanguageModel) -> None:
    heard: list[str] = []
    context = replace(site_of(lm, shared={"synthetic": 1}), listener=heard.append)
    received = strong(context.shared_layout.width)
    states: States = [context.new_state("d0")]
    states, (release,), _ = contribute(states, [LATER[:2]], received, PLAN, context)
    assert heard == ["observe", "annotate", "descend", "learn_shared", "release"] and release is not None
    heard.clear()
    states, _ = adopt(states, received, RoundPlan(1, 1), context)
    assert heard == ["synthesize", "learn_personal"] and states[0].sent is None


def test_the_personal_adapter_is_trained_on_the_shared_one_that_came_back(lm: LanguageModel, noted: Note) -> None:
    context, calls = site_of(lm), noted(lm.engine, "finetune")
    before, after = (strong(context.shared_layout.width, seed) for seed in (0, 1))
    states, _, _ = contribute([context.new_state("d0")], [LATER[:2]], before, PLAN, context)
    assert calls == []  # with a noisy step there is no AdamW before the release
    adopt(states, after, RoundPlan(1, 1), context)
    assert torch.equal(calls[0]["frozen"][0].rows[0], after)


def test_what_a_device_remembers_goes_over_rounds(lm: LanguageModel, noted: Note) -> None:
    """Two bins, the oldest leaves; two dialogues arrive, then one, then none."""
    context, calls = site_of(lm, selection={"bins": 2}, shared={"pool_capacity": 0}), noted(lm.engine, "finetune")
    states, pages = [context.new_state("d0")], []
    held = []
    for number, arrived in enumerate((LATER[:2], LATER[2:3], [])):
        states, (page,) = learn_alone(states, [arrived], None, RoundPlan(number + 1, 0), context)
        held.append(states[0])
        pages.append((page.arrived, page.buffered, page.annotations))
    assert [s.arrived for s in held] == [2, 3, 3] and pages == [(2, 2, 2), (1, 2, 3), (0, 2, 3)]
    assert [set(s.replies) for s in held] == [{"0", "1"}, {"1", "2"}, {"1", "2"}]
    assert [set(s.synthetic) for s in held] == [{"0", "1"}, {"1", "2"}, {"1", "2"}]
    assert held[1].synthetic["1"] is held[0].synthetic["1"] and held[2].synthetic == held[1].synthetic
    began = [call["trained"].rows[0] for call in calls]
    for row, before in zip(began[1:], held, strict=False):
        assert torch.equal(row, before.personal)
    assert len({tuple(s.personal.tolist()) for s in held}) == 3


def test_the_models_words_are_known_for_its_own_as_long_as_they_are_kept(lm: LanguageModel) -> None:
    """What was liked once is no word of the user's in a later round either; a dropped dialogue is forgotten."""
    context = replace(site_of(lm, selection={"bins": 2}), user=lambda _, i: Echo("i am") if i == "0" else "yes")
    states: States = [context.new_state("d0")]
    for number, arrived in enumerate((LATER[:1], LATER[1:2])):
        states, _ = observe(states, [arrived], RoundPlan(number + 1, 0), context)
        states, _ = annotate([replace(states[0], replies=dict(states[0].replies))], context)
    assert states[0].echoes == {"0"} and states[0].own == {"1": "yes"}
    plain = replace(states[0], replies={i: str(reply) for i, reply in states[0].replies.items()})  # as they are stored
    (again,), _ = annotate([plain], context)
    assert again.own == {"1": "yes"}


def test_no_text_that_a_device_has_may_be_written_again(lm: LanguageModel, noted: Note) -> None:
    context, calls = site_of(lm), noted(phases, "write_similar")
    state = device(context)
    state = replace(state, buffer=replace(state.buffer, bins=(*state.buffer.bins, kept("y", "what time is it"))))
    other = device(context, "d1", "who is there", "nobody")
    synthesize([replace(state, replies={**state.replies, "y": "noon"}), replace(other, synthetic={})], PLAN, context)
    own = [("d0", text) for text in (*ORIGINAL, "what time is it", "noon", *(t for pair in MADE for t in pair))]
    assert set(calls[0]["known"]) == {*own, ("d1", "who is there"), ("d1", "nobody")}
    assert [(r.device, r.original) for r in calls[0]["requests"]] == [
        ("d0", ("what time is it", "noon")), ("d1", ("who is there", "nobody")),
    ]  # fmt: skip


def test_a_limit_asks_for_others_than_the_pools(lm: LanguageModel) -> None:
    """Of four bins two are pooled: they are asked for anyway, and of the other two one. The same on six devices."""
    context = site_of(lm, selection={"annotations_per_round": 1}, shared={"pool_capacity": 2})
    states, _ = observe([context.new_state(f"d{k}") for k in range(6)], [LATER[:4]] * 6, PLAN, context)
    once, notes = annotate(states, context)
    for state, note in zip(once, notes, strict=True):
        pool = {i for i, _ in state.pool.slots}
        assert len(pool) == 2 and pool < set(state.replies) and len(state.replies) == note.annotations == 3
    twice, _ = annotate(once, context)
    assert all(set(state.replies) == {d.id for d in LATER[:4]} for state in twice)


def test_a_lesson_of_nothing_trains_nothing(lm: LanguageModel, noted: Note) -> None:
    context, calls = site_of(lm), noted(lm.engine, "finetune")
    (state,), (page,) = learn_personal([context.new_state("d0")], None, PLAN, context)
    assert calls[0]["sets"] == [TrainingSet([], [])] and page.personal_loss_first is None
    assert torch.equal(state.personal, context.new_state("d0").personal)
