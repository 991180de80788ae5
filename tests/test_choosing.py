"""Methods that choose among a black-box model's replies: by heads, by metrics, by an inferred reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from conftest import Note
from test_personal import PEOPLE, TEXTS, beneath_of, context, person

from florilegium.client.lm.config import ModelConfig, SamplingConfig, TextLimits
from florilegium.client.lm.model import LanguageModel
from florilegium.client.personalization import dpcml, steerable
from florilegium.client.personalization.against_others import AgainstOthers, Pairs
from florilegium.client.personalization.choosing import CANDIDATES, Choosing
from florilegium.client.personalization.config import TrainingConfig
from florilegium.client.personalization.dpcml import Dpcml
from florilegium.client.personalization.embedding import hidden, space
from florilegium.client.personalization.heads import Judged, learn_head, learn_trunk, logits, trunk
from florilegium.client.personalization.history import Asked
from florilegium.client.personalization.hydra import Hydra
from florilegium.client.personalization.method import Served
from florilegium.client.personalization.steerable import NeuralProcess, Steerable

LOUD = tuple((question, "NO! WHAT A DAY!!!") for question, _ in TEXTS)
CALM = tuple((question, "yes, as i said, it is all fine") for question, _ in TEXTS)
TWO = [person("loud", LOUD), person("calm", CALM)]
POOL = [person("p0", LOUD[:3]), person("p1", CALM[:3]), person("p2", LOUD[1:]), person("p3", CALM[1:])]
LEARNING = {"epochs": 30, "batch_size": 4, "learning_rate": 1e-2}
SAID = ["NO! WHAT A NIGHT!!!", "yes, it is all as fine as i said"]  # what a loud and what a calm person might say


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.load(ModelConfig(dtype="float32", limits=TextLimits(prompt_tokens=96, reply_tokens=8)))


def chosen(made: Choosing) -> list[int]:
    """Which of `SAID` is worth most to the loud person, and to the calm one."""
    asked = Asked("what of today", "what of today")
    return made.best([(0, asked), (1, asked)], [SAID, SAID])


def test_vectors_of_a_pool_have_mean_zero_and_mean_square_length_one(lm: LanguageModel) -> None:
    texts = [text for pair in TEXTS for text in pair]
    made = space(lm, texts)
    torch.testing.assert_close(made(texts).mean(0), torch.zeros(lm.hidden_size), atol=1e-5, rtol=0)
    assert made(texts).square().sum(1).mean().item() == pytest.approx(1, rel=1e-4)
    (one, other), (h, g) = made(texts[:2]), hidden(lm, texts[:2])
    torch.testing.assert_close((one - other) * made.scale, h - g, atol=1e-4, rtol=1e-3)


class Longest(Choosing):
    def worth(self, asked: Sequence[tuple[int, Asked]], replies: Sequence[str]) -> torch.Tensor:
        return torch.tensor([float(len(text)) for text in replies])


def test_of_the_candidates_the_worthiest_is_said_and_of_options_its_label(lm: LanguageModel, noted: Note) -> None:
    """One is greedy, the others are drawn with seeds of their own; options are not written."""
    made, calls = Longest(context(lm)), noted(lm, "generate")
    made.prepare(PEOPLE)
    sampling = SamplingConfig(max_new_tokens=6)
    free, choice = PEOPLE[0].questions[0][0], Asked("which?", "", ("no", "a longer one", "yes"), ("(a)", "(b)", "(c)"))
    said = made.reply([(0, free), (1, choice)], [free.prompt, "which?"], Served([0, 1], []), sampling, [7, 8])
    assert [c["sampling"].temperature for c in calls] == [0] + [1] * (CANDIDATES - 1)
    assert all(c["prompts"] == [free.prompt] for c in calls) and len({tuple(c["seeds"]) for c in calls}) == CANDIDATES
    drawn = [lm.generate(c["prompts"], c["slots"], [], c["sampling"], c["seeds"])[0] for c in calls[:CANDIDATES]]
    assert said == [max(drawn, key=len), "(b)"] and len(set(drawn)) > 1


# -- heads --------------------------------------------------------------------------------------------------------


def test_a_head_is_a_weighted_sum_with_a_bias() -> None:
    features, head = torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([2.0, 1.0, 0.25])
    assert logits(features, head).tolist() == [0.25, 4.25]
    assert logits(features, torch.stack([head, -head])).tolist() == [0.25, -4.25]


def test_a_head_learns_what_is_right_for_its_person_and_the_trunk_stays() -> None:
    """Two people want the opposite of each other: their heads disagree, by a trunk that has met neither."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(16, 2, 4, generator=generator)
    labels = (pairs[:, 1, 0] > 0).float()
    shared, training = trunk(4, 0, "t"), TrainingConfig(epochs=60, batch_size=8, learning_rate=3e-2)
    heads = learn_trunk(shared, [Judged(pairs, labels), Judged(pairs, 1 - labels)], training, 0)
    torch.testing.assert_close(shared.mean_head, heads.mean(0))
    before = [p.clone() for p in shared.parameters()]
    newcomers = [Judged(pairs, labels), Judged(pairs, 1 - labels)]
    for own in newcomers:
        head = learn_head(shared, own, training, 1)
        with torch.no_grad():
            found = logits(shared(own.pairs), head)
        assert found[own.labels == 1].min() > 0 > found[own.labels == 0].max()
    assert all(torch.equal(a, b) for a, b in zip(before, shared.parameters(), strict=True))
    nobody = Judged(pairs[:0], labels[:0])
    assert torch.equal(learn_head(shared, nobody, training, 1), shared.mean_head)


def test_hydra_judges_an_item_by_whether_it_makes_the_persons_reply_likelier(lm: LanguageModel) -> None:
    """On top of what the base is for the task; of each item only those before it."""
    task = beneath_of(lm)
    made = Hydra(replace(context(lm, name="hydra", retrieve=1), beneath=[task]))
    made.people = [PEOPLE[0]]
    super(Hydra, made).prepare(made.people)
    (judged,) = made._judged_items()
    told = [(i, j) for i in range(4) for j in range(i)]
    expected = {}
    for i, j in told:
        own, item = PEOPLE[0].history[i], PEOPLE[0].history[j]
        both = [replace(own.example, prompt=made.context.prompt(own.asked, items)) for items in ([item], [])]
        with_item, without = (s.nll for s in lm.score(lm.format.dialogues(both), [0, 0], [task]))
        expected[i, j] = float(with_item < without)
    vectors = {
        (i, j): made.space([PEOPLE[0].history[i].search, PEOPLE[0].history[j].document]).flatten() for i, j in told
    }
    assert len(judged.labels) == len(told) and set(judged.labels.tolist()) == {0.0, 1.0}
    for pair, label in zip(judged.pairs, judged.labels, strict=True):
        (which,) = [k for k, v in vectors.items() if torch.allclose(v, pair.flatten(), atol=1e-4)]
        assert label == expected[which]


def test_hydra_shows_first_what_its_head_finds_best_and_before_it_has_learned_what_is_retrieved(
    lm: LanguageModel,
) -> None:
    made, asked = Hydra(context(lm, name="hydra", retrieve=2)), Asked("", "do you cook soup")
    made.prepare(PEOPLE[:1])
    plain = made.retrieved(0, asked)
    assert plain == made._nearest(0, asked, None)[:2][::-1]
    made.learn(PEOPLE[1:])
    made.prepare(PEOPLE[:1])
    found = made._nearest(0, asked, None)
    worth = logits(made._features(made.reranker, asked, found), made.rerank_heads[0])
    order = sorted(range(4), key=lambda i: -float(worth[i]))
    assert made.retrieved(0, asked) == [found[order[1]], found[order[0]]]  # the best last, next to the question


def test_hydras_heads_choose_what_their_persons_would_say(lm: LanguageModel) -> None:
    """Against the model's replies; one head is of a person who says the opposite of what is right for the other."""
    made = Hydra(context(lm, name="hydra", training=LEARNING))
    made.learn(POOL)
    made.prepare(TWO)
    asked = [(k, Asked(q, q)) for k in (0, 1) for q, _ in TEXTS[:2]]
    said = [e for own in made.replies_of_model([[p.example for p in x.history[:2]] for x in TWO]) for e in own]
    own = made.worth(asked, [x.history[i].example.response for x in TWO for i in (0, 1)])
    assert (own > made.worth(asked, said)).all()
    loud, calm = (made.worth([(k, asked[0][1])] * 2, SAID) for k in (0, 1))
    assert loud[0] - loud[1] > calm[0] - calm[1]
    assert made.kept_bytes == 2 * 4 * 17 and made.fetched_bytes == 4 * (3 * lm.hidden_size * 16 + 16 + 17)


# -- against others -----------------------------------------------------------------------------------------------


def test_a_persons_replies_are_set_against_those_of_others(lm: LanguageModel) -> None:
    made = Dpcml(context(lm, name="dpcml"))
    made.learn(POOL)
    twins = [replace(POOL[0], person="loud"), replace(POOL[1], person="calm"), replace(POOL[2], person="loud")]
    alone = Dpcml(context(lm, name="dpcml"))
    alone.learn(twins)
    others = alone.pairs(twins[0]).others  # none of them of another moment of the same person
    calm = alone.space([past.example.response for past in twins[1].history])
    assert len(others) == 3 and all(any(torch.equal(row, own) for own in calm) for row in others)
    there = made.pairs(POOL[0])
    torch.testing.assert_close(there.own, made.space([reply for _, reply in LOUD[:3]]))
    theirs = {tuple(v) for who, v in zip(made.whose, made.said.tolist(), strict=True) if who != "p0"}
    assert all(tuple(v) in theirs for v in there.others.tolist()) and len(there.others) == 3
    assert made.fetched_bytes > 4 * made.said.numel() == 4 * 12 * lm.hidden_size


def test_the_metrics_loss_by_hand() -> None:
    """Vectors (0, 0) and (1, 0): s of (0, 1) is 1, of (1, .5) it is .25, and δ = (1 + 1) / (2 · 2 · 1) = .5."""
    vectors = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
    far, near = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.5]])
    assert dpcml.distances(vectors, far).tolist() == [1.0] and dpcml.distances(vectors, near).tolist() == [0.25]
    assert dpcml.spread(vectors).tolist() == [0.5]
    assert dpcml.loss(vectors, near, far).item() == 0  # .5 + .25 − 1 < 0
    assert dpcml.loss(vectors, far, near).item() == pytest.approx(0.5 + 1 - 0.25)
    same, apart = torch.zeros(1, 2, 2), torch.tensor([[[-1.0, 0.0], [1.0, 0.0]]])  # δ = 0 and 2
    assert dpcml.loss(same, same[:, 0], same[:, 0]).item() == pytest.approx(0.5 + 0.1 * 0.1)
    assert dpcml.loss(apart, same[:, 0], same[:, 0]).item() == pytest.approx(0.5 + 0.1 * 1.5)
    outside = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    torch.testing.assert_close(dpcml.in_ball(outside), torch.tensor([[0.6, 0.8], [0.3, 0.4]]))


def test_the_divergence_of_two_gaussians_is_torchs() -> None:
    one, other = torch.randn(2, 5), torch.randn(2, 5)
    normals = [torch.distributions.Normal(m, s.exp()) for m, s in (one, other)]
    expected = torch.distributions.kl_divergence(*normals).sum()
    torch.testing.assert_close(steerable.divergence(one, other), expected)


def test_a_neural_processs_loss_is_that_of_its_preferences_and_of_what_the_context_leaves_open() -> None:
    torch.manual_seed(0)
    made, noise = NeuralProcess(6), torch.randn(steerable.LATENT)
    told = Pairs(torch.randn(3, 6), torch.randn(3, 6))
    every, one = made.infer(told), made.infer(Pairs(told.own[:1], told.others[:1]))
    z = every[0] + every[1].exp() * noise
    rewards = [[made.reward(v[None], z[None]) for v in side] for side in (told.own, told.others)]
    likely = [torch.log(torch.sigmoid(up - down)) for up, down in zip(*rewards, strict=True)]
    expected = -torch.stack(likely).mean() + steerable.divergence(every, one) / 3
    torch.testing.assert_close(made.loss(told, [0], noise), expected)
    torch.testing.assert_close(made.loss(told, [0, 1, 2], noise), -torch.stack(likely).mean())
    backwards = [made.infer(Pairs(told.own[order], told.others[order])) for order in ([0, 1, 2], [2, 0, 1])]
    torch.testing.assert_close(*backwards)  # of a set


@pytest.mark.parametrize("kind", [Dpcml, Steerable])
def test_each_persons_kind_of_reply_is_chosen(lm: LanguageModel, kind: type[AgainstOthers]) -> None:
    """Of a loud and of a calm reply, to a question that neither has met, by people who are not of the pool."""
    made = kind(context(lm, training=LEARNING))
    made.learn(POOL)
    made.prepare(TWO)
    assert chosen(made) == [0, 1]
    assert made.kept_bytes == 4 * {Dpcml: dpcml.VECTORS * dpcml.WIDTH, Steerable: steerable.LATENT}[kind]
