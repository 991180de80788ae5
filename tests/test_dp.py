"""Proofs that a shared adapter's training has the sensitivity that its accounting assumes, with controls that fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import new_ledger
from opacus import GradSampleModule
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from florilegium.client.calibration import planned_event, release_noise
from florilegium.client.config import DeviceConfig
from florilegium.client.context import CohortContext
from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.adapter import AdapterLayout, Adapters
from florilegium.client.lm.batching import schedule
from florilegium.client.lm.config import AdapterConfig
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.packing import Example
from florilegium.client.lm.peft_format import PREFIX
from florilegium.client.lm.places import nano_folder
from florilegium.client.lm.training_data import TrainingSet
from florilegium.client.phases import annotate, observe
from florilegium.client.private_training import train_shared
from florilegium.client.selection.buffer import Buffer, candidate
from florilegium.client.selection.config import SelectionConfig
from florilegium.client.selection.lexicons import load_lexicons
from florilegium.client.state import DeviceState, States
from florilegium.privacy.accounting import Event, epsilon
from florilegium.privacy.dpsgd import clipped_sum
from florilegium.privacy.ledger import Budget, Request
from florilegium.privacy.plan import RoundPlan
from florilegium.simulation.audit.checks import with_privacy
from florilegium.simulation.data.population import User

CLIP = 1.0
PLAN = RoundPlan(1, 0)
NOISELESS = DeviceConfig.model_validate({
    "privacy": {"mode": "none", "clip_norm_l2": CLIP},
    "selection": {"bins": 8},
    "synthesis": {"per_dialogue": 1, "instruction": "Rewrite: ", "sampling": {"max_new_tokens": 12}},
    "shared": {"pool_capacity": 12, "learning_rate": 1.0, "adapter": {"targets": ["v_proj"]}},
})  # fmt: skip


FULL = NOISELESS.model_copy(update={"shared": NOISELESS.shared.model_copy(update={"sampling_rate": 1.0})})


def annotated(
    lm: LanguageModel, people: list[User], config: DeviceConfig, dialogues: int = 15
) -> tuple[States, CohortContext]:
    """A device for each of the people, as far as it is when the shared adapter's training begins."""
    recorded = {d.id: d.response for user in people for d in user.stream}
    context = CohortContext.of(lm, config, 0, lambda device, dialogue: recorded[dialogue], ledger=new_ledger())
    states = [context.new_state(f"d{k}") for k in range(len(people))]
    states, _ = observe(states, [user.stream[:dialogues] for user in people], PLAN, context)
    return annotate(states, context)[0], context


def spent(state: DeviceState, context: CohortContext) -> list[Event]:
    account = context.accounts.account(state.id, state.genesis)
    assert account
    return account.events


# -- gradients ----------------------------------------------------------------------------------------------------


def test_example_gradients_are_those_of_opacus_hooks(lm: LanguageModel, people: list[User]) -> None:
    """Plain transformers, PEFT and Opacus' GradSampleModule, on a padded batch; A frozen, B not zero."""
    layout = lm.lora_layout(AdapterConfig(rank=2, alpha=4, factors="b", targets=("q_proj", "v_proj")), public_seed=5)
    row = torch.randn(layout.width, generator=torch.Generator().manual_seed(0)) * 0.1
    examples = lm.format.dialogues(people[0].stream[:6])
    assert len({e.length for e in examples}) > 1  # so that there is padding
    ours = example_gradients(lm, layout, row, [], examples, [1 / len(e.reply) for e in examples])
    theirs = opacus_gradients(lm, layout, row, examples)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert ours.norm(dim=1).min() > 1e-2


def example_gradients(
    lm: LanguageModel,
    layout: AdapterLayout,
    row: torch.Tensor,
    frozen: list[Adapters],
    examples: list[Example],
    weights: list[float],
) -> torch.Tensor:
    found = torch.zeros(len(examples), layout.width)
    for group, gradient, _ in lm.engine.row_gradients(
        lm.adapters(layout, row), frozen, examples, [0] * len(examples), weights
    ):
        found[group] = gradient
    return found


def opacus_gradients(
    lm: LanguageModel, layout: AdapterLayout, row: torch.Tensor, examples: list[Example]
) -> torch.Tensor:
    plain = AutoModelForCausalLM.from_pretrained(str(nano_folder()), dtype=torch.float32)
    names = [layer.name for layer in layout.layers]
    model = get_peft_model(plain, LoraConfig(r=layout.rank, lora_alpha=int(layout.alpha), target_modules=names))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, a, b in layout.split(row[None]):
            parameters[f"{PREFIX}{name}.lora_A.default.weight"].copy_(a)
            parameters[f"{PREFIX}{name}.lora_B.default.weight"].copy_(b[0])
    for name, parameter in parameters.items():
        parameter.requires_grad_("lora_B" in name)
    hooked = GradSampleModule(model.train(), loss_reduction="sum")
    ids = pad_sequence([torch.tensor(e.prompt + e.reply) for e in examples], batch_first=True)
    labels = pad_sequence([torch.tensor([-100] * len(e.prompt) + list(e.reply)) for e in examples], True, -100)
    mask = (torch.arange(ids.shape[1]) < torch.tensor([[e.length] for e in examples])).long()
    logits = hooked(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    losses = cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
    (losses.sum(1) / torch.tensor([len(e.reply) for e in examples])).sum().backward()
    samples = [parameters[f"{PREFIX}{name}.lora_B.default.weight"].grad_sample for name in names]
    return torch.cat([s.reshape(len(examples), -1) for s in samples], dim=1)


# -- coupling -----------------------------------------------------------------------------------------------------


def clipped_sum_of_round(lm: LanguageModel, stream: tuple[Dialogue, ...], config: DeviceConfig) -> torch.Tensor:
    """What one noisy step would add its noise to, after the whole round up to it, with fixed coins."""
    recorded = {d.id: d.response for d in stream}
    context = CohortContext.of(lm, config, 11, lambda device, dialogue: recorded[dialogue], ledger=new_ledger())
    states, _ = observe([context.new_state("d")], [stream], PLAN, context)
    states, _ = annotate(states, context)
    received = 0.05 * torch.randn(context.shared_layout.width, generator=torch.Generator().manual_seed(2))
    _, changes, _ = train_shared(states, received, PLAN, context)
    assert changes[0] is not None
    shared = config.shared
    return changes[0] * shared.sampling_rate * shared.pool_capacity / shared.learning_rate


def neighbours(people: list[User], length: int = 30) -> list[tuple[tuple[Dialogue, ...], tuple[Dialogue, ...]]]:
    """A real stream, and the same with one of its first dialogues replaced by one of another person."""
    stream, others = people[0].stream[:length], people[1].stream
    return [(stream, (*stream[:i], others[i], *stream[i + 1 :])) for i in range(10)]


def test_replacing_one_dialogue_moves_the_clipped_sum_by_at_most_twice_the_norm(
    lm: LanguageModel, people: list[User]
) -> None:
    """The whole stream is run again; full batches, so that the coin cannot hide the replaced one."""
    moved = []
    for one, other in neighbours(people)[::2]:
        change = clipped_sum_of_round(lm, one, FULL) - clipped_sum_of_round(lm, other, FULL)
        moved.append(float(change.norm()))
    assert max(moved) <= 2 * CLIP + 1e-4
    assert max(moved) > 0.5 * CLIP  # some replaced dialogue was in the pool: the test could have failed


def test_one_long_reply_among_short_ones_moves_the_clipped_sum_no_further(lm: LanguageModel) -> None:
    """A loss averaged over the tokens of all would fail here."""
    short = tuple(Dialogue(str(i), "are you there?", "yes") for i in range(12))
    long = (Dialogue("0", "are you there?", "no " * 40), *short[1:])
    moved = clipped_sum_of_round(lm, short, FULL) - clipped_sum_of_round(lm, long, FULL)
    assert 0.1 * CLIP < moved.norm() <= 2 * CLIP + 1e-4


@pytest.mark.parametrize("clips", ["dialogue", "change"])
def test_the_shared_adapter_learns_from_the_pool_alone(lm: LanguageModel, people: list[User], clips: str) -> None:
    """Neither the personal adapter nor the buffer nor what was synthesized from it changes a bit of a release."""
    states, context = annotated(lm, people, with_privacy(FULL, clips=clips))
    received = torch.zeros(context.shared_layout.width)
    _, changes, _ = train_shared(states, received, PLAN, context)
    other = [
        replace(
            s,
            personal=torch.randn_like(s.personal),
            buffer=Buffer(SelectionConfig(bins=1, policy="fifo")),
            synthetic={},
        )
        for s in states
    ]
    _, again, _ = train_shared(other, received, PLAN, context)
    for one, two in zip(changes, again, strict=True):
        assert one is not None and two is not None
        assert torch.equal(one, two) and one.abs().max() > 0


def test_a_pool_that_is_not_full_keeps_its_public_denominator(lm: LanguageModel, people: list[User]) -> None:
    states, context = annotated(lm, people[:1], FULL, dialogues=3)
    _, changes, _ = train_shared(states, torch.zeros(context.shared_layout.width), PLAN, context)
    examples = lm.format.dialogues(people[0].stream[:3])
    row, weights = torch.zeros(context.shared_layout.width), [1 / len(e.reply) for e in examples]
    expected = clipped_sum(example_gradients(lm, context.shared_layout, row, [], examples, weights), CLIP) / 12
    assert changes[0] is not None
    torch.testing.assert_close(changes[0], -expected.float(), atol=1e-5, rtol=0)


# -- noise --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
def test_noise_of_a_round_is_what_was_charged_and_never_the_same(
    lm: LanguageModel, people: list[User], steps: int
) -> None:
    """(private − noiseless change) over two devices and two rounds, from pools without a dialogue.

    An empty pool leaves noise alone: its deviation must be rate · σ · C · √T / (q · capacity).
    """
    settings = NOISELESS.model_dump()
    settings["privacy"] = {"mode": "example-local", "epsilon": 4.0, "clip_norm_l2": CLIP}
    settings["shared"] |= {"steps_per_round": steps, "adapter": {**settings["shared"]["adapter"], "rank": 32}}
    config = DeviceConfig.model_validate({**settings, "rounds": 2})
    states, context = annotated(lm, people, config, dialogues=0)
    received, drawn = torch.zeros(context.shared_layout.width), []
    for number in (1, 2):
        states, changes, _ = train_shared(states, received, RoundPlan(number, number - 1), context)
        drawn += [c.numpy() for c in changes if c is not None]
    events = spent(states[0], context)
    assert [e.steps for e in events] == [steps, steps]
    assert 3.9 < epsilon(events, config.privacy.delta) <= 4.0
    expected = events[0].noise_multiplier * CLIP * steps**0.5 / (0.5 * 12)
    for noise in drawn:
        assert noise.std() == pytest.approx(expected, rel=0.02)  # 24,576 numbers: σ = 0.45 %
    assert np.abs(np.corrcoef(np.stack(drawn)) - np.eye(4)).max() < 0.03  # σ = 0.006


def test_steps_and_rounds_and_devices_toss_their_own_coins(lm: LanguageModel, people: list[User]) -> None:
    states, context = annotated(lm, people, NOISELESS, dialogues=12)
    received = torch.zeros(context.shared_layout.width)
    seen = []
    for number in (1, 2, 3):
        _, changes, _ = train_shared(states, received, RoundPlan(number, number - 1), context)
        seen += [tuple(c.tolist()) for c in changes if c is not None]
    assert len(set(seen)) == 6  # 2 devices with pools of their own, 3 rounds: chance of equal coins 2⁻¹²
    twin = [states[0], replace(states[0], id="twin", secret=states[1].secret)]
    _, changes, _ = train_shared(twin, received, PLAN, replace(context, ledger=new_ledger()))
    assert changes[0] is not None and changes[1] is not None and not torch.equal(changes[0], changes[1])


@pytest.mark.parametrize("secret", ["seed", "os"])
def test_no_two_steps_share_a_coin_nor_two_releases_a_key(lm: LanguageModel, secret: str) -> None:
    """Two devices, three rounds of three steps: 64 slots at rate 1/2 fall alike with a chance of 2⁻⁶⁴."""
    config = NOISELESS.model_copy(update={"privacy": NOISELESS.privacy.model_copy(update={"secret": secret})})
    context = CohortContext.of(lm, config, 0, lambda device, dialogue: "")
    states, coins = [context.new_state("d0"), context.new_state("d1")], context.coins
    plans = [RoundPlan(n, n - 1) for n in (1, 2, 3)]
    samples = [tuple(coins.sample(s, 64, p, t, context)) for s in states for p in plans for t in range(3)]
    keys = [coins.noise_key(s, p, context) for s in states for p in plans]
    assert len(set(samples)) == 18 and len({*keys, *(s.secret for s in states)}) == 8
    assert 24 < np.mean([len(s) for s in samples]) < 40 and len({len(s) for s in samples}) > 4
    again = [tuple(coins.sample(states[0], 64, plans[0], t, context)) for t in range(3)]
    assert (again == samples[:3]) == (secret == "seed")


def test_both_factors_get_their_noise(lm: LanguageModel, people: list[User]) -> None:
    """Of an empty pool each layer's A and each B is noise alone, of the announced deviation."""
    adapter = {**NOISELESS.shared.adapter.model_dump(), "factors": "both", "rank": 4}
    settings = {**NOISELESS.model_dump(), "privacy": {"epsilon": 4.0}, "rounds": 1}
    config = DeviceConfig.model_validate({**settings, "shared": {**settings["shared"], "adapter": adapter}})
    states, context = annotated(lm, people[:1], config, dialogues=0)
    _, [change], _ = train_shared(states, torch.zeros(context.shared_layout.width), PLAN, context)
    assert change is not None
    expected = release_noise(config, 1, 0).on_device
    for part in change.split(context.shared_layout.sizes):
        assert float(part.std()) == pytest.approx(expected, rel=0.25)  # 192 numbers or more: σ = 5 %


def test_a_dialogue_that_has_paid_for_all_its_releases_is_drawn_no_more(lm: LanguageModel, people: list[User]) -> None:
    config = DeviceConfig.model_validate({**FULL.model_dump(), "privacy": {"epsilon": 4.0, "releases": 1}, "rounds": 2})
    (before,), context = annotated(lm, people[:1], config, dialogues=12)
    old, event = [i for i, _ in before.pool.slots[:5]], planned_event(config)
    earlier = Request(before.id, before.genesis, context.experiment, 1, "", event, tuple(old))
    assert not context.accounts.reserve([earlier], config.privacy.budget)[0].refusal
    (after,), [change], _ = train_shared([before], torch.zeros(context.shared_layout.width), RoundPlan(2, 1), context)
    assert change is not None and after.pool.seen == before.pool.seen
    assert after.pool.slots == tuple(s for s in before.pool.slots if s[0] not in old) and len(after.pool.slots) == 7


# -- controls -----------------------------------------------------------------------------------------------------


def test_control_a_pool_chosen_by_quality_breaks_the_bound(lm: LanguageModel, people: list[User]) -> None:
    """One dialogue decides which others stay: here, of many real replacements, the one that decides most."""
    stream, others = people[0].stream, people[1].stream
    features = {d.id: lm.embed([d.prompt])[0] for d in (*stream, *others)}
    selection = SelectionConfig(bins=8, policy="quality")

    def chosen(dialogues: Sequence[Dialogue]) -> dict[str, Dialogue]:
        buffer, by_id = Buffer(selection), {d.id: d for d in dialogues}
        for n, d in enumerate(dialogues):
            asks = candidate(d, features[d.id], load_lexicons(selection.lexicons), selection)
            buffer, _ = buffer.offer(asks, np.random.default_rng(n))
        return {k.id: by_id[k.id] for k in buffer.bins}

    kept = chosen(stream)
    pairs = [chosen((*stream[:i], other, *stream[i + 1 :])) for i in range(8) for other in others[:30]]
    other = max(pairs, key=lambda found: len(set(found) ^ set(kept)))
    layout = lm.lora_layout(NOISELESS.shared.adapter, public_seed=1)
    sums = []
    for dialogues in (kept, other):
        examples = lm.format.dialogues(list(dialogues.values()))
        weights = [1 / len(e.reply) for e in examples]
        sums.append(clipped_sum(example_gradients(lm, layout, torch.zeros(layout.width), [], examples, weights), CLIP))
    assert (sums[0] - sums[1]).norm() > 2 * CLIP, len(set(other) ^ set(kept))


def test_control_an_active_personal_adapter_breaks_the_bound(lm: LanguageModel, people: list[User]) -> None:
    """It was trained on the same dialogues without noise, so one of them changes the gradient of every other."""
    shared, personal = lm.lora_layout(NOISELESS.shared.adapter, public_seed=1), lm.lora_layout(AdapterConfig())
    stream, other = neighbours(people, length=20)[3]
    sums, without = [], []
    for dialogues in (stream, other):
        examples = lm.format.dialogues(dialogues)
        weights = [1 / len(e.reply) for e in examples]
        training_set = TrainingSet(examples, schedule(len(examples), 4, 2, 0))
        start = lm.adapters(personal, personal.start(0))
        trained = lm.engine.finetune(start, [], [training_set], [[2e-2] * len(training_set.batches)]).adapters
        row = torch.zeros(shared.width)
        sums.append(clipped_sum(example_gradients(lm, shared, row, [trained], examples, weights), CLIP))
        without.append(clipped_sum(example_gradients(lm, shared, row, [], examples, weights), CLIP))
    assert (sums[0] - sums[1]).norm() > 2 * CLIP
    assert (without[0] - without[1]).norm() <= 2 * CLIP + 1e-4


def test_control_a_loss_averaged_over_the_batch_breaks_the_bound(lm: LanguageModel) -> None:
    """Its denominator is the tokens of all: a long reply shrinks the gradient of every other example."""
    layout = lm.lora_layout(NOISELESS.shared.adapter, public_seed=1)
    short = [Dialogue(str(i), "are you there?", "yes") for i in range(64)]
    long = [Dialogue("0", "are you there?", "no " * 40), *short[1:]]
    gradients = {}
    for loss in ("batch", "own"):
        for name, dialogues in (("short", short), ("long", long)):
            examples = lm.format.dialogues(dialogues)
            total = sum(len(e.reply) for e in examples)
            weights = [(len(examples) / total if loss == "batch" else 1 / len(e.reply)) for e in examples]
            row = torch.zeros(layout.width)
            gradients[loss, name] = example_gradients(lm, layout, row, [], examples, weights)
    clip = float(gradients["own", "short"].norm(dim=1).max())
    moved = {
        loss: float((clipped_sum(gradients[loss, "short"], clip) - clipped_sum(gradients[loss, "long"], clip)).norm())
        for loss in ("batch", "own")
    }
    assert moved["batch"] > 2 * clip
    assert moved["own"] <= 2 * clip


# -- budget -------------------------------------------------------------------------------------------------------


def test_the_last_release_that_the_budget_allows_succeeds_and_the_next_is_refused(
    lm: LanguageModel, people: list[User]
) -> None:
    privacy = {"mode": "example-local", "epsilon": 2.0}
    config = DeviceConfig.model_validate({**NOISELESS.model_dump(), "privacy": privacy, "rounds": 2})
    states, context = annotated(lm, people[:1], config)
    received = torch.zeros(context.shared_layout.width)
    for number in (1, 2):
        states, changes, notes = train_shared(states, received, RoundPlan(number, number - 1), context)
        assert changes[0] is not None and changes[0].abs().max() > 0
    assert 1.9 < notes[0].epsilon <= 2.0
    before = states[0]
    states, changes, notes = train_shared(states, received, RoundPlan(3, 2), context)
    assert changes == [None]
    assert states[0] == before  # nothing was charged, nothing changed
    assert epsilon(spent(states[0], context), 1e-5) <= 2.0


def test_a_device_with_little_left_sends_nothing_while_others_go_on(lm: LanguageModel, people: list[User]) -> None:
    config = DeviceConfig.model_validate({**NOISELESS.model_dump(), "privacy": {"epsilon": 4.0}, "rounds": 1})
    states, context = annotated(lm, people, config)
    pool = tuple(i for i, _ in states[0].pool.slots)
    earlier = Request(states[0].id, states[0].genesis, "earlier", 1, "", Event(1.0, 0.5, 1), pool)
    context.accounts.reserve([earlier], Budget(100.0, 1e-5, "replace-one", "dialogue"))
    _, changes, _ = train_shared(states, torch.zeros(context.shared_layout.width), PLAN, context)
    assert changes[0] is None and changes[1] is not None
