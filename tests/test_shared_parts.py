"""Methods of which a part is shared: a basis, a network, a codebook, representatives, an adapter that goes along."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import Note
from test_personal import PEOPLE, SHARERS, TEXTS, beneath_of, context, loss, past, person

from florilegium.client.lm.adapter import AdaptedLayer, AdapterLayout, Adapters
from florilegium.client.lm.adapter import layout as lora_layout
from florilegium.client.lm.batching import schedule
from florilegium.client.lm.config import ModelConfig, TextLimits
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.optimizer import Moments, adamw_
from florilegium.client.personalization import aloe, dpl, tap_per, userip
from florilegium.client.personalization.aloe import Aloe
from florilegium.client.personalization.core import Core, basis
from florilegium.client.personalization.dpl import Dpl
from florilegium.client.personalization.history import Person
from florilegium.client.personalization.hypernet import Hypernet, HypernetStart
from florilegium.client.personalization.method import Method
from florilegium.client.personalization.tap_per import TapPer, recency
from florilegium.client.personalization.through import train_through
from florilegium.client.personalization.userip import COMMITMENT, MEMORY, TOKENS, UserIp, kept
from florilegium.privacy.seeds import derive_seed


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.load(ModelConfig(dtype="float32", limits=TextLimits(prompt_tokens=96, reply_tokens=16)))


def prepared(made: Method, people: list[Person]) -> float:
    """The loss of these people's questions once a method is made for them."""
    made.prepare(people)
    made.adapt(made.examples())
    return loss(made.context.lm, made, people)


# -- core ---------------------------------------------------------------------------------------------------------


def test_a_basis_spans_an_adapter_and_a_core_acts_between_its_factors() -> None:
    """Of two layers: U Uᵀ (B A) V Vᵀ = B A, and a row is U R before V."""
    layers = (AdaptedLayer("q", 5, 4), AdaptedLayer("v", 3, 6))
    shape = lora_layout(layers, rank=2, alpha=6.0)
    row = torch.randn(shape.width)
    made, cores = basis(shape, row), torch.randn(3, 8)
    rows = made.rows(cores)
    for i, (name, a, b) in enumerate(shape.split(row[None])):
        u, v = made.left[i], made.layout.frozen[name]
        torch.testing.assert_close(u.T @ u, torch.eye(2) * layers[i].out_features / 2, atol=1e-5, rtol=0)
        unit = u / u.norm(dim=0)
        torch.testing.assert_close(unit @ unit.T @ b[0] @ a[0] @ v.T @ v, b[0] @ a[0], atol=1e-4, rtol=1e-4)
        ((_, frozen, factor),) = [part for part in made.layout.split(rows) if part[0] == name]
        torch.testing.assert_close(factor[2] @ frozen, u @ cores[2].view(2, 2, 2)[i] @ v)
    assert made.width == 2 * 2 * 2 and made.layout.scale == shape.scale == 3
    assert made.bytes == 4 * 2 * (5 + 4 + 3 + 6)


def test_a_core_goes_where_the_loss_falls_by_steps_of_its_own_gradient(lm: LanguageModel) -> None:
    """On what is beneath: AdamW on Uᵀ (∂L/∂B), the rate falling from η to η/2 over two batches."""
    task = beneath_of(lm)
    rate = 5e-3
    at = replace(context(lm, training={"epochs": 1, "batch_size": 2, "learning_rate": rate}), beneath=[task])
    made = Core(at)
    made.prepare(PEOPLE[:1])
    (own,) = made.examples()
    found = train_through(at, made.basis.layout, torch.zeros(1, made.basis.width), made.basis.rows, [own], ["a"])
    encoded, cores = lm.format.dialogues(own), torch.zeros(1, made.basis.width)
    moments = Moments.zeros(cores)
    for step, batch in enumerate(schedule(4, 2, 1, derive_seed(0, "a", "personal"))):
        chosen = [encoded[i] for i in batch]
        stack = Adapters(made.basis.layout, made.basis.rows(cores))
        weights = [1 / sum(e.targets for e in chosen)] * 2
        gradient, _ = lm.engine.gradient(stack, [task], [chosen], [weights])
        slopes = [u.T @ b[0] for u, (_, _, b) in zip(made.basis.left, made.basis.layout.split(gradient), strict=True)]
        adamw_(cores, torch.stack(slopes).flatten()[None], moments, [0], [rate * (1 - step / 2)], 0.0)
    torch.testing.assert_close(found, cores, atol=1e-5, rtol=1e-3)
    rows = [Adapters(made.basis.layout, made.basis.rows(c)) for c in (torch.zeros_like(found), found)]
    before, after = (sum(lm.engine.score(encoded, [0] * 4, [task, r])) for r in rows)
    assert after < before - 0.1


def test_a_core_on_what_others_span_is_small_and_its_owners(lm: LanguageModel) -> None:
    made = Core(context(lm, training={"epochs": 4, "batch_size": 4, "learning_rate": 5e-3}))
    made.learn(SHARERS)
    before, bare = prepared(Core(context(lm)), PEOPLE[:1]), loss(lm, Method(context(lm)), PEOPLE[:1])
    assert before != bare and prepared(made, PEOPLE[:1]) < bare
    layers = len(made.basis.left)
    assert made.kept_bytes == 4 * layers * 2 * 2 and isinstance(made.basis.layout, AdapterLayout)
    assert made.fetched_bytes == made.basis.bytes == 4 * lm.lora_layout(made.context.config.adapter).width


# -- hypernetwork -------------------------------------------------------------------------------------------------


def test_a_network_makes_cores_of_profiles_and_learns_by_the_pools_questions(lm: LanguageModel) -> None:
    """Nothing at first; then the pool's replies are likelier, and a person of whom nothing is known gets g(0)."""
    made = Hypernet(context(lm, training={"epochs": 5, "batch_size": 2, "learning_rate": 1e-2}))
    made.prepare(SHARERS)
    assert not made.start().any()
    bare = loss(lm, Method(context(lm)), SHARERS)
    made.learn(SHARERS)
    assert prepared(made, SHARERS) < bare - 0.1
    assert made.adapters and made.spent["trained"] == 0
    mean = made.space([past.document for past in SHARERS[1].history]).mean(0)
    with torch.no_grad():
        torch.testing.assert_close(made.adapters.rows[1:], made.basis.rows(made.network(mean[None])))
    made.prepare([Person("nobody", ())])
    with torch.no_grad():
        torch.testing.assert_close(made.start(), made.network(torch.zeros(1, lm.hidden_size)))


def test_training_begins_where_the_network_leads(lm: LanguageModel, noted: Note) -> None:
    made = HypernetStart(context(lm, training={"epochs": 2, "batch_size": 4, "learning_rate": 5e-3}))
    made.learn(SHARERS)
    made.prepare(PEOPLE[:1])
    calls, start = noted(lm.engine, "gradient"), made.basis.rows(made.start())
    made.adapt(made.examples())
    assert start.any() and len(calls) == 2
    torch.testing.assert_close(calls[0]["trained"].rows, start)
    assert made.adapters and (made.adapters.rows - start).abs().max() > 1e-3
    assert made.spent["trained"] == 2 * made.tokens(made.examples()[0])


# -- prefix with decay --------------------------------------------------------------------------------------------


def test_a_state_is_the_mean_of_projected_items_by_recency(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a half-life of one item three weigh 1/7, 2/7 and 4/7, the newest most."""
    monkeypatch.setattr(tap_per, "HALF_LIFE", 1.0)
    torch.testing.assert_close(recency(3), torch.tensor([1.0, 2.0, 4.0]) / 7)
    made = TapPer(context(lm, name="tap-per"))
    assert made.layout.tokens == 2
    items, question = torch.randn(3, lm.hidden_size), torch.randn(lm.hidden_size)
    state, near = made.token(question, items).view(2, -1)
    one, two, three = made.projection(items)
    torch.testing.assert_close(state, (one + 2 * two + 4 * three) / 7)
    torch.testing.assert_close(near, super(TapPer, made).token(question, items))
    size = lm.hidden_size
    assert made.fetched_bytes == 4 * (size * 2 * size + 2 * size + 2 * size * size + size)


# -- codebook -----------------------------------------------------------------------------------------------------


def test_a_token_becomes_the_nearest_code_of_its_place() -> None:
    """Two places, two codes each: (0, 0) and (4, 4), (1, 1) and (−1, −1)."""
    codes = torch.tensor([[[0.0, 0.0], [1.0, 1.0]], [[4.0, 4.0], [-1.0, -1.0]]])  # (C, m, H)
    tokens = torch.tensor([[1.0, 0.0, -1.0, 0.0], [3.0, 3.0, 2.0, 0.0]])
    assert userip.nearest(tokens, codes).tolist() == [[0, 1], [1, 0]]
    assert userip.quantised(tokens, codes).tolist() == [[0, 0, -1, -1], [4, 4, 1, 1]]
    moved = userip.followed(codes, tokens)
    expected = MEMORY * codes + (1 - MEMORY) * torch.tensor([[[1.0, 0.0], [2.0, 0.0]], [[3.0, 3.0], [-1.0, 0.0]]])
    torch.testing.assert_close(moved, expected)
    torch.testing.assert_close(userip.followed(codes, tokens[:1])[1, 0], codes[1, 0])  # nobody's stays


def test_a_derivative_goes_straight_through_the_codes_and_tokens_are_drawn_to_them() -> None:
    tokens = torch.randn(2, 3 * TOKENS, requires_grad=True)
    codes, slope = torch.randn(2, 3 * TOKENS), torch.randn(2, 3 * TOKENS)
    rows = userip.straight(tokens, codes)
    torch.testing.assert_close(rows.detach(), codes)
    rows.backward(slope)
    commitment = tokens.detach().clone().requires_grad_()
    (COMMITMENT * (commitment - codes).view(2, TOKENS, 3).square().sum(2) / 3).sum().backward()
    assert commitment.grad is not None
    torch.testing.assert_close(tokens.grad, slope + commitment.grad)


def test_an_index_survives_randomised_response_by_the_odds_of_epsilon() -> None:
    assert kept(2, math.log(3)) == pytest.approx(3 / 4) and kept(16, 0.0) == 1 / 16
    told = kept(16, 2.0) / ((1 - kept(16, 2.0)) / 15)  # of the true index against any other
    assert told == pytest.approx(math.exp(2))


def test_a_person_is_served_codes_that_others_have_made(lm: LanguageModel) -> None:
    made = UserIp(context(lm, name="userip", training={"epochs": 3, "batch_size": 4, "learning_rate": 3e-2}))
    first = made.codes.clone()
    made.learn(SHARERS)
    shared = made.codes.clone()
    assert not torch.equal(first, shared)
    prepared(made, PEOPLE[:2])
    assert torch.equal(made.codes, shared) and made.adapters and made.kept_bytes == TOKENS * 4 / 8
    for row in made.adapters.rows.view(2, TOKENS, -1):
        assert all(any(torch.equal(token, code) for code in shared[:, j]) for j, token in enumerate(row))


# -- differences --------------------------------------------------------------------------------------------------


def test_centres_are_those_of_lloyd() -> None:
    """Three points near the origin and two far from it, by hand."""
    points = torch.tensor([[0.0, 0.0], [0.0, 3.0], [0.0, 0.0], [10.0, 0.0], [12.0, 0.0]])
    assert dpl.centres(points, 2).tolist() == [[0, 1], [11, 0]]


def test_differences_from_representatives_are_summed_up_in_front_of_the_question(
    lm: LanguageModel, noted: Note
) -> None:
    made = Dpl(context(lm, name="dpl"))
    made.learn(SHARERS)
    assert {p.id for p in made.representatives} == {"s", "t"}
    calls, somebody = noted(lm, "generate"), person("n", TEXTS[::-1])
    made.prepare([somebody])
    compared, summed = calls
    others = made.representatives
    assert len(compared["prompts"]) == 3 and compared["adapters"] == summed["adapters"] == []
    for i, prompt in enumerate(compared["prompts"]):
        documents = [p.document for p in others[i % 2].history]
        mine = made.space([somebody.history[i].document])
        best = int(torch.cosine_similarity(made.space(documents), mine).argmax())
        assert prompt == dpl.ASK_FOR_DIFFERENCE.format(
            own=somebody.history[i].shown, other=others[i % 2].history[best].shown
        )
    differences = [t for t in lm.generate(compared["prompts"], range(3), [], compared["sampling"], compared["seeds"])]
    assert summed["prompts"] == [dpl.ASK_FOR_SUMMARY.format(differences="\n".join(differences))]
    question = somebody.questions[0][0]
    assert made.prompt(0, question) == made.context.prompt(question, [], made.profiles[0]) != question.prompt
    assert made.fetched_bytes == sum(len(p.shown.encode()) for o in others for p in o.history)


# -- going along --------------------------------------------------------------------------------------------------


def test_what_a_person_said_is_preferred_turn_by_turn_by_one_adapter_for_all(
    lm: LanguageModel, noted: Note, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn's prompt has what was said before it; after learning the replies have gained more than the model's."""
    monkeypatch.setattr(aloe, "TURNS", 4)
    settings = {"retrieve": 2, "retriever": "recent", "training": {"epochs": 3, "batch_size": 4, "learning_rate": 1e-2}}
    made, written = Aloe(context(lm, name="aloe", **settings)), noted(lm, "generate")
    many = replace(SHARERS[0], history=tuple(past(i, f"what of {i}", f"it is {i}") for i in range(6)))
    made.learn([many, SHARERS[1]])
    (call,) = written
    assert len(call["prompts"]) == 4 + 2
    shown = [p.shown for p in many.history]
    assert all(shown[i] in call["prompts"][3] for i in (1, 2)) and shown[3] not in call["prompts"][3]
    own = [e for examples in made.examples() for e in examples]
    said = lm.generate(call["prompts"], call["slots"], [], call["sampling"], call["seeds"])
    others = [replace(e, response=s) for e, s in zip(own, said, strict=True)]
    assert made.adapters and len(made.adapters.rows) == 1

    def rewards(replies: object) -> torch.Tensor:
        bare, now = (lm.engine.score(replies, [0] * len(own), on) for on in ([], [made.adapters]))  # type: ignore
        return torch.tensor(bare) - torch.tensor(now)

    assert (rewards(lm.format.dialogues(own)) > rewards(lm.format.dialogues(others))).float().mean() > 0.8
    made.prepare(PEOPLE)
    served = made.serving([(2, PEOPLE[2].questions[0][0])])
    assert served.arm == [made.adapters] and served.slots == [2] and not made.spent["trained"]
