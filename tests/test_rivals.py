"""Each rival does what its paper's equation says, on cases small enough to check, and all of them do as much work."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import new_ledger
from rich.console import Console
from torch import nn

from florilegium.client.calibration import release_noise
from florilegium.client.config import DeviceConfig
from florilegium.client.context import CohortContext
from florilegium.client.lm import layers
from florilegium.client.lm.adapter import AdaptedLayer, Adapters
from florilegium.client.lm.adapter import layout as layout_of
from florilegium.client.lm.config import AdapterConfig
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.packing import Example, Rectangle
from florilegium.client.lm.peft_format import AdapterFormatError, write_peft
from florilegium.client.lm.places import Base
from florilegium.client.lm.training_data import TrainingSet
from florilegium.client.phases import annotate, observe
from florilegium.client.private_training import train_shared
from florilegium.privacy.dpsgd import PrivateRow
from florilegium.privacy.plan import RoundPlan
from florilegium.simulation.audit.report import audit_run
from florilegium.simulation.baselines import evaluation, feddpa, layerwise
from florilegium.simulation.baselines.config import BaselinesConfig
from florilegium.simulation.baselines.context import BaselineContext, Held, aggregate, halves, upload
from florilegium.simulation.baselines.devices import load_run_devices
from florilegium.simulation.baselines.fedalt import gated, rest_of_world
from florilegium.simulation.baselines.registry import BASELINES
from florilegium.simulation.baselines.run import play
from florilegium.simulation.config import BASELINES as NAMES
from florilegium.simulation.config import ExperimentConfig, load_config
from florilegium.simulation.data.population import User
from florilegium.simulation.evaluation.metrics import measure_nll, score_users
from florilegium.simulation.experiment import run_experiment
from florilegium.simulation.runs.callbacks import Callback, RunFacts
from florilegium.simulation.runs.folder import RunError, RunFolder, create
from florilegium.simulation.settings import ConfigError, config_folder
from florilegium.simulation.studies import baselines_report
from florilegium.simulation.studies.config import load_study
from florilegium.simulation.studies.runner import run_study

RATE, STEPS, DEVICES = 1e-2, 4, 3
CPU = torch.device("cpu")
ADAPTER = {"rank": 2, "alpha": 4, "factors": "both", "targets": ["v_proj"]}


def settings(name: str, **rival: Any) -> BaselinesConfig:
    return BaselinesConfig.model_validate({
        "rounds": 2,
        "model": {"dtype": "float32", "limits": {"prompt_tokens": 12, "reply_tokens": 12}},
        "data": {"users": DEVICES},
        "selection": {"policy": "random", "bins": 6},
        "shared": {"adapter": ADAPTER, "source": "buffer", "pool_capacity": 0},
        "personal": {"adapter": ADAPTER},
        "privacy": {"mode": "none", "clips": "change"},
        "baseline": {"name": name, "learning_rate": RATE, "steps": STEPS, "batch_size": 2, **rival},
    })  # fmt: skip


def ground_of(lm: LanguageModel, name: str, **rival: Any) -> BaselineContext:
    return BaselineContext.of(lm, settings(name, **rival), seed=5)


def example(length: int, seed: int) -> Example:
    ids = torch.randint(8, 4000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(tuple(ids[: length // 2]), tuple(ids[length // 2 :]), (0, 1), False)


@pytest.fixture(scope="module")
def sets() -> list[TrainingSet]:
    """Other texts on each device, four batches of two."""
    return [
        TrainingSet([example(8 + k + i, 10 * k + i) for i in range(4)], [[0, 1], [2, 3], [1, 2], [3, 0]])
        for k in range(DEVICES)
    ]


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To a hundredth of the norm: AdamW makes a whole step of a gradient that is all rounding."""
    return bool((found - expected).norm() < 1e-2 * expected.norm())


def turned(context: BaselineContext, sets: Sequence[TrainingSet], rounds: int = 1) -> tuple[Held, torch.Tensor]:
    rival = BASELINES[context.config.baseline.name]
    held, sent = rival.start(context, len(sets)), torch.zeros(0)
    for number in range(1, rounds + 1):
        held, sent = rival.turn(held, sets, context, number)
    return held, sent


# -- the pull -----------------------------------------------------------------------------------------------------


def test_the_first_step_of_a_pull_is_adam_on_the_gradient_and_the_pull(
    lm: LanguageModel, sets: list[TrainingSet]
) -> None:
    """Adam's first step is the rate times the sign of g + μ (row − anchor): of the pull alone where μ is large."""
    layout = lm.lora_layout(AdapterConfig.model_validate(ADAPTER))
    row, anchor = layout.start(0)[None], layout.start(1)[None]
    one = [TrainingSet(sets[0].examples, [[0, 1]])]
    moved = (
        lm.engine.finetune(Adapters(layout, row), [], one, [[RATE]], proximal=1e6, anchor=anchor).adapters.rows - row
    )
    away = (row - anchor).abs() > 1e-3
    torch.testing.assert_close(moved[away], -RATE * (row - anchor)[away].sign(), atol=1e-6, rtol=0)


def test_a_strong_pull_keeps_a_row_at_its_anchor_and_none_is_no_pull(
    lm: LanguageModel, sets: list[TrainingSet]
) -> None:
    layout = lm.lora_layout(AdapterConfig.model_validate(ADAPTER))
    rows = torch.stack([layout.start(k) for k in range(DEVICES)])
    long, rates = [TrainingSet(x.examples, [*x.batches] * 5) for x in sets], [[RATE] * 20] * DEVICES
    far = {}
    for mu in (0.0, 1.0, 1e6):
        far[mu] = lm.engine.finetune(Adapters(layout, rows), [], long, rates, proximal=mu).adapters.rows - rows
    plain = lm.engine.finetune(Adapters(layout, rows), [], long, rates).adapters.rows - rows
    assert torch.equal(far[0.0], plain)  # bit for bit
    norms = [far[mu].norm() for mu in (0.0, 1.0, 1e6)]
    assert norms[0] > norms[1] > norms[2]
    assert far[1e6].abs().max() <= 1.01 * RATE < 0.5 * far[0.0].abs().max()  # a step away and back again


def test_each_device_is_pulled_to_its_own_anchor_whatever_its_company(
    lm: LanguageModel, sets: list[TrainingSet]
) -> None:
    layout = lm.lora_layout(AdapterConfig.model_validate(ADAPTER))
    rows, anchors = (torch.stack([layout.start(k + s) for k in range(DEVICES)]) for s in (0, 9))
    uneven = [TrainingSet(x.examples, x.batches[: 4 - k]) for k, x in enumerate(sets)][::-1]
    rates = [[1e-4] * len(x.batches) for x in uneven]
    together = lm.engine.finetune(Adapters(layout, rows), [], uneven, rates, proximal=3.0, anchor=anchors).adapters.rows
    for k in range(DEVICES):
        alone = lm.engine.finetune(
            Adapters(layout, rows[k : k + 1]), [], [uneven[k]], [rates[k]], proximal=3.0, anchor=anchors[k : k + 1]
        )
        torch.testing.assert_close(together[k], alone.adapters.rows[0], atol=1e-6, rtol=0)


def private_row(proximal: float, noise: float = 0.0) -> PrivateRow:
    return PrivateRow(
        torch.tensor([1.0, 2.0]), learning_rate=0.5, clip_norm_l2=1.0, noise_multiplier=noise, expected_batch=1.0,
        key=7, proximal=proximal,
    )  # fmt: skip


def test_the_pull_in_noisy_steps_by_hand() -> None:
    """w₁ = w₀ − 0.5 g; w₂ = w₁ − 0.5 g − 0.5 · 0.4 (w₁ − w₀): what is clipped does not see the pull."""
    row, gradient = private_row(proximal=0.4), torch.tensor([[30.0, 40.0]])  # clipped to (0.6, 0.8)
    row.step(gradient)
    torch.testing.assert_close(row.row, torch.tensor([0.7, 1.6]))
    row.step(gradient)
    torch.testing.assert_close(row.row, torch.tensor([0.7 - 0.3 + 0.06, 1.6 - 0.4 + 0.08]))


def test_clipping_noise_and_sensitivity_are_those_without_a_pull() -> None:
    """The first step is the same bit for bit; after it a replaced example moves the row no further than without."""
    gradients = torch.tensor([[3.0, 4.0], [0.1, 0.2]]), torch.tensor([[-3.0, -4.0], [0.1, 0.2]])
    plain, pulled = private_row(0.0, noise=2.0), private_row(0.4, noise=2.0)
    for row in (plain, pulled):
        row.step(gradients[0])
    assert torch.equal(plain.row, pulled.row)
    apart = {}
    for mu in (0.0, 0.4):
        ends = []
        for first in gradients:
            row = private_row(mu, noise=2.0)
            row.step(first)
            row.step(gradients[0])
            ends.append(row.row)
        apart[mu] = float((ends[0] - ends[1]).norm())
    assert apart[0.0] == pytest.approx(0.5 * 2.0, rel=1e-5)  # η · 2C
    assert apart[0.4] == pytest.approx((1 - 0.5 * 0.4) * apart[0.0], rel=1e-5)


@pytest.mark.parametrize("proximal", [0.0, 0.5])
def test_the_noise_of_a_release_is_what_is_announced(lm: LanguageModel, people: list[User], proximal: float) -> None:
    """From empty pools; with μ earlier steps' noise is pulled back with what it moved."""
    config = DeviceConfig.model_validate({
        "rounds": 1,
        "shared": {"adapter": {"rank": 16}, "pool_capacity": 8, "steps_per_round": 3, "proximal": proximal},
        "privacy": {"mode": "example-local", "epsilon": 4.0},
    })  # fmt: skip
    replies = {d.id: d.response for d in people[0].stream}
    context = CohortContext.of(lm, config, 11, lambda device, dialogue: replies[dialogue], ledger=new_ledger())
    plan = RoundPlan(1, 0)
    states, _ = annotate(observe([context.new_state("d")], [()], plan, context)[0], context)
    _, changes, _ = train_shared(states, torch.zeros(context.shared_layout.width), plan, context)
    assert changes[0] is not None
    assert changes[0].std() == pytest.approx(release_noise(config, 1, 0).on_device, rel=0.03)


def test_a_pull_beyond_what_was_received_is_refused() -> None:
    with pytest.raises(ValueError, match="must be <= 1"):
        DeviceConfig.model_validate({"shared": {"proximal": 2.0, "learning_rate": 1.0}})


# -- the gate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gate", "weight"), [(1e4, 1.0), (-1e4, 0.0), (0.0, 0.5), (0.25, 1 / (1 + math.exp(-1.5)))])
def test_a_gate_weighs_an_adapter_against_the_others_by_hand(gate: float, weight: float) -> None:
    """Two devices with a token (1, 2, 3) each, W = 0: g · B A x + (1 − g) · others, with g = σ(gate · Σ x)."""
    base = torch.nn.Linear(3, 2, bias=False)
    base.weight.data.zero_()
    modules = {"l": layers.AdaptedLinear(base)}
    plain = layout_of((AdaptedLayer("l", 3, 2),), rank=1, alpha=2.0)
    ends = replace(plain, gated=True)
    assert (plain.width, ends.width) == (5, 8)
    world = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 3.0, 0.0]])  # 2 · 6 and 2 · 18 in the first place
    own = torch.tensor([[0.0, 0.0, 1.0, 0.0, 1.0, *[gate] * 3]]).repeat(2, 1)  # 2 · 3 in the second
    with layers.Adaptable(modules, layers.AdaptedEmbedding(nn.Embedding(1, 1))).active(
        [Adapters(plain, world), Adapters(ends, own)], Rectangle([1, 1], CPU), torch.float32
    ):
        y = modules["l"](torch.tensor([[1.0, 2.0, 3.0]] * 2))
    expected = torch.tensor([[12 * (1 - weight), 6 * weight], [36 * (1 - weight), 6 * weight]])
    torch.testing.assert_close(y, expected)


def test_gates_learn_alone_as_together_and_their_gradient_is_that_of_torch(lm: LanguageModel) -> None:
    layout = replace(lm.lora_layout(AdapterConfig.model_validate({**ADAPTER, "targets": []})), gated=True)
    plain = replace(layout, gated=False)
    world = torch.stack([plain.start(k) + 0.03 for k in range(2)])
    rows = torch.stack([layout.start(7) + 0.02 * (k + 1) for k in range(2)])
    work = [TrainingSet([example(7 + 5 * k, k), example(9, 5 + k)], [[0, 1]]) for k in range(2)]
    beneath = [Adapters(plain, world)]
    together = lm.engine.finetune(Adapters(layout, rows), beneath, work, [[1e-3]] * 2).adapters.rows
    gates = slice(plain.width, layout.width)
    assert (together - rows)[:, gates].abs().max() > 1e-4
    for k in range(2):
        own = Adapters(layout, rows[k : k + 1]), [Adapters(plain, world[k : k + 1])]
        alone = lm.engine.finetune(*own, [work[k]], [[1e-3]]).adapters.rows[0]
        assert close(together[k] - rows[k], alone - rows[k])
    step = torch.zeros_like(rows[:1])
    step[:, gates.start + 3] = 1e-2
    found, _ = lm.engine.dp_gradients(Adapters(layout, rows[:1]), [beneath[0].pick([0])], [[work[0].examples[1]]])
    tokens = work[0].examples[1].targets
    up, down = (
        lm.engine.score([work[0].examples[1]], [0], [beneath[0].pick([0]), Adapters(layout, rows[:1] + s)])[0] / tokens
        for s in (step, -step)
    )
    assert float(found[0][0, gates.start + 3]) == pytest.approx((up - down) / 2e-2, rel=0.05, abs=1e-4)


def test_gates_have_no_place_in_pefts_format(lm: LanguageModel, tmp_path: Path) -> None:
    layout = gated(ground_of(lm, "fedalt"))
    with pytest.raises(AdapterFormatError, match="gates"):
        write_peft(tmp_path, layout, torch.zeros(layout.width), Base("nano"))


# -- rivals -------------------------------------------------------------------------------------------------------


def test_halves_are_all_of_the_batches_once() -> None:
    work = TrainingSet([example(4, 0)], [[0], [0, 0], [0, 0, 0], [0] * 4])
    (first,), (second,) = halves([work])
    assert first.batches == [[0], [0, 0]] and second.batches == [[0, 0, 0], [0] * 4]
    assert first.examples == second.examples == work.examples


def test_the_mean_of_the_others_by_hand() -> None:
    sent = torch.tensor([[1.0, 0.0], [2.0, 3.0], [6.0, 9.0]])
    assert rest_of_world(sent).tolist() == [[4.0, 6.0], [3.5, 4.5], [1.5, 1.5]]


def test_fedprox_without_a_pull_is_fedavg_bit_for_bit(lm: LanguageModel, sets: list[TrainingSet]) -> None:
    avg, prox = (turned(ground_of(lm, name), sets, rounds=2) for name in ("fedavg", "fedprox"))
    assert torch.equal(avg[0].shared, prox[0].shared) and torch.equal(avg[1], prox[1])
    strong = ground_of(lm, "fedprox")
    near = replace(strong, config=strong.config.model_copy(
        update={"shared": strong.config.shared.model_copy(update={"proximal": 1e6})}
    ))  # fmt: skip
    assert turned(near, sets)[1].norm() < 0.5 * avg[1].norm()


def test_fedavg_adds_the_mean_of_the_changes(lm: LanguageModel, sets: list[TrainingSet]) -> None:
    context = ground_of(lm, "fedavg")
    held, sent = turned(context, sets)
    torch.testing.assert_close(held.shared, context.first + sent.mean(0), atol=1e-7, rtol=0)
    alone = context.train(context.layout, context.first, [sets[1]])
    assert close(sent[1], (alone - context.first)[0])


def test_ditto_follows_what_it_received_and_without_a_pull_learns_alone(
    lm: LanguageModel, sets: list[TrainingSet]
) -> None:
    first, second = halves(sets)
    free = turned(ground_of(lm, "ditto", ditto_lambda=0.0), sets)[0]
    context = ground_of(lm, "ditto", ditto_lambda=1e6)
    torch.testing.assert_close(free.own, context.train(context.layout, context.first, second), atol=1e-6, rtol=0)
    held, sent = BASELINES["ditto"].turn(free, sets, context, 2)
    assert ((held.own - free.shared).norm() < (free.own - free.shared).norm()).all()  # what was received, not the new
    expected = context.train(context.layout, free.shared, first) - free.shared
    torch.testing.assert_close(sent, expected, atol=1e-6, rtol=0)


def test_ours_learns_its_own_on_the_shared_adapter_of_this_round(lm: LanguageModel, sets: list[TrainingSet]) -> None:
    """A half of the steps makes the new shared adapter; the other half is on top of that one, as it is used."""
    context = ground_of(lm, "ours")
    before, _ = turned(context, sets)
    after, sent = BASELINES["ours"].turn(before, sets, context, 2)
    to_share, to_keep = halves(sets)
    expected = context.train(context.layout, before.shared, to_share) - before.shared
    torch.testing.assert_close(sent, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(after.shared, before.shared + sent.mean(0), atol=1e-6, rtol=0)
    new, old = (context.train(context.layout, before.own, to_keep, [lm.adapters(context.layout, held.shared)])
                for held in (after, before))  # fmt: skip
    torch.testing.assert_close(after.own, new, atol=1e-6, rtol=0)
    assert (after.own - old).abs().max() > 1e-4
    shared, own = BASELINES["ours"].arm(after, context)
    assert torch.equal(shared.rows, after.shared) and torch.equal(own.rows, after.own)


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
def test_layers_that_stay_are_in_nothing_that_is_sent(lm: LanguageModel, sets: list[TrainingSet], name: str) -> None:
    context = ground_of(lm, name, personal_share=0.5)
    base, head = layerwise.parts(context)
    assert base.layers + head.layers == context.layout.layers and len(head.layers) == 2
    held, sent = turned(context, sets)
    assert sent.shape == (DEVICES, base.width) and held.own.shape == (DEVICES, head.width)
    assert (held.own[0] - held.own[1]).abs().max() > 1e-4  # each device's own
    torch.testing.assert_close(held.shared, context.first[:, : base.width] + sent.mean(0), atol=1e-7, rtol=0)
    if name == "fedper":  # both together: the steps of a whole adapter
        whole = context.train(context.layout, context.first, sets)
        torch.testing.assert_close(held.own, whole[:, base.width :], atol=1e-6, rtol=0)


def test_fedrep_trains_the_head_on_what_was_received_and_then_the_representation(
    lm: LanguageModel, sets: list[TrainingSet]
) -> None:
    context = ground_of(lm, "fedrep")
    (base, head), (first, second) = layerwise.parts(context), halves(sets)
    held, sent = turned(context, sets)
    received, before = context.first[:, : base.width], context.first[:, base.width :]
    own = context.train(head, before, first, [lm.adapters(base, received)])
    torch.testing.assert_close(held.own, own, atol=1e-6, rtol=0)
    expected = context.train(base, received, second, [lm.adapters(head, own)]) - received
    torch.testing.assert_close(sent, expected, atol=1e-6, rtol=0)
    other_order = context.train(base, received, first, [lm.adapters(head, before)]) - received
    assert (sent - other_order).abs().max() > 1e-3


def test_feddpa_at_weight_one_is_the_local_adapter_and_at_none_the_global_one(lm: LanguageModel) -> None:
    layout = ground_of(lm, "feddpa").layout
    shared, own = (torch.stack([layout.start(k) + 0.05 * s for k in range(2)]) for s in (1, 2))
    texts, weights = [example(9, 1), example(12, 2)], torch.tensor([1.0, 0.0])
    mixed = [Adapters(layout, feddpa.scaled(layout, rows, w)) for rows, w in ((shared, 1 - weights), (own, weights))]
    found = lm.engine.score(texts, [0, 1], mixed)
    assert found[0] == pytest.approx(lm.engine.score(texts[:1], [0], [Adapters(layout, own[:1])])[0], abs=1e-4)
    assert found[1] == pytest.approx(lm.engine.score(texts[1:], [0], [Adapters(layout, shared[1:])])[0], abs=1e-4)


def test_feddpa_weighs_a_query_by_how_like_its_own_examples_it_is(lm: LanguageModel, people: list[User]) -> None:
    """The one example that a device has, asked again: cosine 1 and the largest weight. Other devices' do not count."""
    context, dialogues = ground_of(lm, "feddpa", mix=0.8), people[0].stream[:4]
    learned = [TrainingSet(lm.format.dialogues([d]), [[0]]) for d in dialogues[:2]]
    held, nothing = feddpa.start(context, 2), TrainingSet([], [])
    weights = feddpa.mixed(held, context, [[dialogues[0], dialogues[2]], [dialogues[0]]], learned)
    assert weights[0] == pytest.approx(0.8, abs=1e-5)
    assert (weights >= 0).all() and (weights[1:] < 0.8 - 1e-4).all()
    assert feddpa.mixed(held, context, [[dialogues[0]], [dialogues[1]]], [learned[0], nothing])[1] == 0


def test_feddpa_scores_each_query_under_its_own_mixture(lm: LanguageModel, people: list[User]) -> None:
    streams = {str(k): u.stream[:8] for k, u in enumerate(people)}
    played = play(lm, settings("feddpa"), streams, 3)
    queries = [u.held_out[:2] for u in people]
    assert played.baseline.by_query is not None
    found = evaluation.nll(played, queries)
    shared, own = played.baseline.by_query(played.held, played.context, queries, played.sets)
    third = [Adapters(a.layout, a.rows[2:3]) for a in (shared, own)]
    alone = measure_nll(score_users(lm, [queries[1][:1]], {"x": third})["x"])
    assert found.by_query[2] == pytest.approx(alone.by_query[0], abs=1e-4) and len(found.by_user) == 2


def test_fedalt_trains_its_own_beside_the_others_and_sends_no_gate(lm: LanguageModel, sets: list[TrainingSet]) -> None:
    context = ground_of(lm, "fedalt")
    held, sent = turned(context, sets)
    again, _ = BASELINES["fedalt"].turn(held, sets, context, 2)
    assert torch.equal(sent, held.own[:, : context.layout.width])
    assert held.own.shape[1] - sent.shape[1] == sum(x.in_features for x in context.layout.layers)
    torch.testing.assert_close(held.shared[0], sent[1:].mean(0), atol=1e-7, rtol=0)
    beside = lm.adapters(context.layout, held.shared[:1])
    alone = context.train(gated(context), held.own[:1], [sets[0]], [beside])
    assert close(again.own[0] - held.own[0], alone[0] - held.own[0])
    assert (again.own[:, context.layout.width :]).abs().max() > 0  # the gates have learned


# -- what leaves --------------------------------------------------------------------------------------------------


def test_in_user_central_changes_are_clipped_and_the_sum_is_noised(lm: LanguageModel, sets: list[TrainingSet]) -> None:
    plain = settings("ours")
    privacy = {"mode": "user-central", "epsilon": 8.0, "clip_norm_l2": 0.01}
    context = BaselineContext.of(lm, BaselinesConfig.model_validate({**plain.model_dump(), "privacy": privacy}), 5)
    changes = torch.tensor([[3.0, 4.0], [0.003, 0.004], [0.0, 0.0]])
    torch.testing.assert_close(upload(changes, context), torch.tensor([[0.006, 0.008], [0.003, 0.004], [0.0, 0.0]]))
    _, sent = turned(context, sets)
    assert (sent.norm(dim=1) <= 0.01 * 1.001).all() and (sent.norm(dim=1) > 0.009).all()
    noise = aggregate(torch.zeros(DEVICES, 4000), context, 1)
    assert noise.std() == pytest.approx(release_noise(context.config, 1, 0).of_mean(DEVICES), rel=0.05)
    assert not torch.equal(noise, aggregate(torch.zeros(DEVICES, 4000), context, 2))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"baseline": {"name": "fedalt"}, "privacy": {"mode": "user-central"}}, "whole adapters"),
        ({"privacy": {"mode": "example-local"}, "shared": {"adapter": ADAPTER}}, "must be 'none' or 'user-central'"),
        ({"personal": {"adapter": {**ADAPTER, "rank": 3}}}, "must be equal"),
        ({"baseline": {"steps": 5}}, "must be even"),
        ({"data": {"users": 1}}, "must be >= 2"),
    ],
)
def test_settings_that_compare_nothing_are_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        BaselinesConfig.model_validate({**settings("ours").model_dump(), **change})


def test_every_rival_plays_and_trains_on_the_same_tokens(
    lm: LanguageModel, people: list[User], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two real users, two rounds; the engine counts what it is given."""
    counted, engine = [0], lm.engine
    plain = engine.finetune

    def counting(trained: Adapters, frozen: Any, sets: Sequence[TrainingSet], *rest: Any, **named: Any) -> Any:
        counted[0] += sum(x.examples[i].length for x in sets for batch in x.batches for i in batch)
        return plain(trained, frozen, sets, *rest, **named)

    monkeypatch.setattr(engine, "finetune", counting)
    streams, queries = {str(k): u.stream[:8] for k, u in enumerate(people)}, [u.held_out[:2] for u in people]
    tokens, scores = set(), {}
    assert set(BASELINES) == set(NAMES)
    for name in BASELINES:
        counted[0] = 0
        played = play(lm, settings(name), streams, 3)
        assert counted[0] == 2 * played.tokens > 0
        tokens.add(played.tokens)
        scores[name] = evaluation.nll(played, queries).by_user
        width = lm.lora_layout(played.context.config.shared.adapter).width
        sent = {"local": 0, "fedper": width // 2, "fedrep": width // 2}.get(name, width)
        assert played.upload_bytes == 4 * sent and played.download_bytes == 4 * sent
        stranger = evaluation.strangers(played)
        assert (stranger is None) == (name in ("fedavg", "fedprox"))
        if stranger:
            assert evaluation.nll(stranger, queries).by_user != scores[name]
    assert len(tokens) == 1
    assert len(set(scores.values())) == len(BASELINES) - 1  # μ is 0: FedProx is FedAvg


# -- in a run -----------------------------------------------------------------------------------------------------


def written(folder: Path) -> Path:
    """Three people with ten replies each."""
    path = folder / "people.jsonl"
    said = [
        {"user": f"u{u}", "prompt": f"what of {u * t}?", "response": f"{u} says {t} and {u + t}", "time": t}
        for u in range(DEVICES)
        for t in range(10)
    ]
    path.write_text("\n".join(map(json.dumps, said)), encoding="utf-8")
    return path


def config_of_a_run(name: str, people: Path, **baseline: Any) -> ExperimentConfig:
    tree = settings(name, **baseline).model_dump(mode="json")
    tree |= {
        "data": {"name": str(people), "users": DEVICES, "split": "all", "min_pairs": 4, "queries_per_user": 1},
        "evaluation": {"every_round": False, "rouge_queries_per_user": 0, "pooled_epochs": 0},
        "server": {"rule": "none" if name == "local" else "mean"},
    }
    return ExperimentConfig.model_validate(tree)


@pytest.mark.parametrize("name", ["local", "fedavg", "ditto", "fedrep", "feddpa"])
def test_a_run_trains_the_same_adapters_as_a_study_on_the_same_people(tmp_path: Path, name: str) -> None:
    """Behind Flower's messages, with states on the disk, and bit for bit: people, batches, training and the mean."""
    config, folder = config_of_a_run(name, written(tmp_path)), tmp_path / "run"
    summary = run_experiment(config, folder)
    devices = load_run_devices(RunFolder(folder))
    names = list(devices.users)
    played = play(devices.context.lm, config, {n: devices.users[n].stream for n in names}, config.seed)
    assert torch.equal(torch.stack([s.personal for s in devices.states(names)]), played.held.own)
    assert summary.nll["personal"].mean_per_user < summary.nll["base"].mean_per_user
    assert summary.tokens_trained == played.tokens * DEVICES and summary.baseline == name
    if name != "local":
        last = RunFolder(folder).last_shared()
        assert last and torch.equal(torch.from_numpy(devices.schema.join(last.shared)), played.held.shared[0])
        assert summary.upload_bytes_per_release == played.upload_bytes


@pytest.mark.slow
def test_a_baseline_is_computed_by_rays_actors_too(tmp_path: Path) -> None:
    """In other processes, with states on the disk: the same adapters and figures, but for rounding."""
    config = config_of_a_run("ditto", written(tmp_path))
    ends = []
    for name, ray in (("here", {}), ("actors", {"actors": 2})):
        tree = config.model_dump(mode="json") | {"workers": 1, "ray": ray}
        summary = run_experiment(ExperimentConfig.model_validate(tree), tmp_path / name)
        devices = load_run_devices(RunFolder(tmp_path / name))
        ends.append((summary, torch.stack([s.personal for s in devices.states(list(devices.users))])))
    (here, own), (there, theirs) = ends
    torch.testing.assert_close(theirs, own, rtol=1e-4, atol=1e-6)
    assert there.nll["personal"].mean_per_user == pytest.approx(here.nll["personal"].mean_per_user, abs=1e-4)
    assert there.tokens_trained == here.tokens_trained > 0


class Stopping(Callback):
    """Ctrl-C when the first round is over."""

    def on_round_end(self, facts: RunFacts) -> None:
        raise KeyboardInterrupt


def test_a_run_of_a_baseline_that_was_stopped_goes_on_to_the_same_end(tmp_path: Path) -> None:
    config = config_of_a_run("ditto", written(tmp_path))
    whole = run_experiment(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt, match="go on with --resume"):
        run_experiment(config, tmp_path / "run", callbacks=[Stopping()])
    assert RunFolder(tmp_path / "run").done == 1
    assert run_experiment(config, tmp_path / "run", resuming=True).nll == whole.nll
    one, other = (load_run_devices(RunFolder(tmp_path / name)) for name in ("whole", "run"))
    for a, b in zip(one.states(list(one.users)), other.states(list(one.users)), strict=True):
        assert torch.equal(a.personal, b.personal)


@pytest.mark.parametrize("name", ["fedavg", "ditto", "ours"])
def test_a_training_of_a_baseline_that_diverges_is_told(tmp_path: Path, name: str) -> None:
    """Such a device keeps what it came with: of the shared adapter nothing changes, and the run goes on."""
    config = config_of_a_run(name, written(tmp_path), learning_rate=1e38).model_copy(update={"rounds": 1})
    summary = run_experiment(config, tmp_path / "run")
    assert [told.partition(":")[0] for told in summary.failed_trainings] == [f"device-{k:05d}" for k in range(DEVICES)]
    last = RunFolder(tmp_path / "run").last_shared()
    assert last and all(np.isfinite(array).all() for array in last.shared.values())


def test_in_a_run_each_device_clips_and_pays(tmp_path: Path) -> None:
    """Changes are longer than the bound; the ledger lets a device send once, and after that it learns for itself."""
    tree = settings("fedavg").model_dump(mode="json")
    tree |= {"privacy": {"mode": "user-central", "clip_norm_l2": 0.01, "releases": 1}}
    tree["data"] = {"name": str(written(tmp_path)), "users": DEVICES, "split": "all", "min_pairs": 4}
    tree["evaluation"] = {"pooled_epochs": 0}
    devices = load_run_devices(create(tmp_path / "run", ExperimentConfig.model_validate(tree)))
    with pytest.raises(RunError, match="our own method"):
        audit_run(devices.run, 2, 100, print)
    names, start = list(devices.users), devices.context.shared_layout.start(0)
    for number, sending in ((1, True), (2, False)):
        releases = devices.contribute(names, start, RoundPlan(number, number - 1))
        assert [r is not None for r in releases] == [sending] * DEVICES
        for r in filter(None, releases):
            assert 0.009 < np.linalg.norm(devices.schema.join(r.arrays)) < 0.01 * 1.001
        devices.adopt(names, start, RoundPlan(number, number))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("baseline.name=fedalt",), "use florilegium study"),
        (("baseline.name=ditto", "privacy.mode=user-local"), "must be 'none' or 'user-central'"),
        (("baseline.name=ditto", "server.rule=none", "privacy.mode=none"), "has a server"),
        (("baseline.name=local", "server.rule=mean"), "has no server"),
        (("baseline.name=fedper", "world.classes=world/devices"), "no \\[world\\]"),
        (("baseline.name=fedper", "server.products=stack", "privacy.mode=none"), "no server.products"),
        (("baseline.name=fedavg", "evaluation.newcomers=1"), "no newcomers"),
    ],
)
def test_what_a_baseline_does_not_have_is_refused(overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(config_folder() / "quickstart.toml", overrides)


def test_a_baseline_protects_devices_where_nothing_else_is_said() -> None:
    for name in set(BASELINES) - {"fedalt"}:
        config = load_config(config_folder() / "quickstart.toml", [f"baseline.name={name}"])
        assert config.privacy.mode == ("none" if name == "local" else "user-central")
        assert config.server.absent == (name == "local") and config.shared.adapter.factors == "both"


# -- the study ----------------------------------------------------------------------------------------------------


def test_a_study_of_rivals_compares_them_on_the_same_people(tmp_path: Path) -> None:
    least = [
        "data.split=development", "data.users=2", "study.seeds=2", "rounds=1", "baseline.steps=2",
        "baseline.batch_size=2", "data.queries_per_user=1", "selection.bins=2", "evaluation.sampling.max_new_tokens=2",
        "model.limits={prompt_tokens=8, reply_tokens=8}",
        'study.tables={few={rows={"baseline.name"=["local", "ours", "feddpa"]}}}',
    ]  # fmt: skip
    study = load_study(config_folder() / "rivals.toml", least)
    run_study(study, tmp_path, lambda phase: None)
    assert baselines_report.report(study, tmp_path).write(tmp_path).exists()
    (shown,) = baselines_report.tables(study, tmp_path)
    assert [o.rival for o in shown.outcomes] == ["local", "ours", "feddpa"]
    assert len({o.measured("base") for o in shown.outcomes}) == 1 and len(shown.outcomes[0].by_seed()) == 2
    found = shown.against(shown.outcomes[2], "ours")
    assert found and found.equal_cost and found.found.users == 4 and found.p_holm is not None
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert [c["upload_bytes"] > 0 for c in summary["tables"]["few"]["cells"]] == [False, True, True]
    told = Console(record=True, width=200, file=io.StringIO())
    told.print(baselines_report.report(study, tmp_path).text)
    assert "feddpa" in told.export_text()
    before = (tmp_path / "cells" / next(iter(study.cells)) / "seed0.json").stat().st_mtime_ns
    run_study(study, tmp_path, lambda phase: None)
    assert (tmp_path / "cells" / next(iter(study.cells)) / "seed0.json").stat().st_mtime_ns == before


def test_what_is_wrong_in_a_cell_is_told_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="whole adapters"):
        load_study(config_folder() / "rivals.toml", ["privacy={mode='user-central'}"])
