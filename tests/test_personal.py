"""Methods of personalisation: each does what its paper's equation says, on cases small enough to check."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Note

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.adapter import AdaptedLayer, Adapters
from florilegium.client.lm.adapter import layout as lora_layout
from florilegium.client.lm.batching import schedule
from florilegium.client.lm.config import AdapterConfig, ModelConfig, SamplingConfig, TextLimits
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.optimizer import Moments, adamw_
from florilegium.client.lm.training_data import TrainingSet
from florilegium.client.personalization import kgt, per_pcs, rpo
from florilegium.client.personalization.choosing import Choosing
from florilegium.client.personalization.config import NAMES, MethodConfig, TrainingConfig
from florilegium.client.personalization.history import Asked, Past, Person, Wording
from florilegium.client.personalization.kgt import KnowledgeGraph, Triple
from florilegium.client.personalization.method import Method, MethodContext, NoRoomError
from florilegium.client.personalization.oppu import Oppu, Pooled
from florilegium.client.personalization.per_pcs import Assembled, Pieces, assembled, wide
from florilegium.client.personalization.pplug import TEMPERATURE, Pplug
from florilegium.client.personalization.preference import Preferences, prefer, value_and_weights
from florilegium.client.personalization.prompting import ASK_FOR_PROFILE, Prompting
from florilegium.client.personalization.registry import METHODS, method
from florilegium.client.personalization.retrieve import rankings
from florilegium.client.personalization.rpo import Rpo, nearness
from florilegium.client.personalization.task_adapter import learn_task
from florilegium.privacy.seeds import derive_seed

TEXTS = (
    ("what did you cook", "a lentil soup with cumin"),
    ("how was work", "long, the train was late again"),
    ("any plans tonight", "i will read about ships"),
    ("do you like soup", "only lentil soup, with cumin"),
)


def past(number: int, prompt: str, reply: str) -> Past:
    return Past(prompt, f'"{prompt}" "{reply}"', Dialogue(f"d{number}", prompt, reply, float(number)), prompt)


def person(name: str, texts: Sequence[tuple[str, str]] = TEXTS) -> Person:
    question, reply = "which soup do you like", "lentil soup"
    return Person(
        name,
        tuple(past(i, *text) for i, text in enumerate(texts)),
        ((Asked(question, question), Dialogue("q", question, reply)),),
    )


PEOPLE = [person("a"), person("b", TEXTS[::-1]), person("c", TEXTS[1:])]
SHARERS = [person("s", TEXTS[:2]), person("t", TEXTS[2:])]
OTHER = person(
    "a", (("where is the boat", "in the harbour, with a red sail"), ("who rows", "my brother in law, badly"))
)
SMALL = {"adapter": {"rank": 2, "alpha": 4}, "training": {"epochs": 2, "batch_size": 2, "learning_rate": 5e-3}}


def context(lm: LanguageModel, **settings: Any) -> MethodContext:
    return MethodContext(lm, MethodConfig.model_validate({**SMALL, **settings}), Wording(), seed=0)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """With room for items in its prompts."""
    return LanguageModel.load(ModelConfig(dtype="float32", limits=TextLimits(prompt_tokens=160, reply_tokens=64)))


def loss(lm: LanguageModel, made: Method, people: Sequence[Person]) -> float:
    """Of the questions' replies, nats a token, as the method answers them."""
    asked = [(k, a) for k, p in enumerate(people) for a, _ in p.questions]
    replies = [replace(r, prompt=made.prompt(k, a)) for k, p in enumerate(people) for a, r in p.questions]
    served = made.serving(asked)
    scores = lm.score(lm.format.dialogues(replies), served.slots, served.arm)
    return sum(s.nll for s in scores) / sum(s.tokens for s in scores)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_learns_prepares_prompts_adapts_and_answers(lm: LanguageModel, name: str) -> None:
    made = method(context(lm, name=name, retrieve=0 if name in ("pplug", "kgt") else 1))
    assert type(made) is METHODS[name] and set(METHODS) == set(NAMES)
    made.learn(PEOPLE[1:])
    made.prepare(PEOPLE)
    examples = made.examples()
    assert [len(own) for own in examples] == [len(p.history) for p in PEOPLE]
    made.adapt(examples)
    assert math.isfinite(loss(lm, made, PEOPLE))
    made.prepare([Person("nobody", (), PEOPLE[0].questions)])  # without any history
    made.adapt(made.examples())
    assert math.isfinite(loss(lm, made, [Person("nobody", (), PEOPLE[0].questions)]))


@pytest.mark.parametrize("name", NAMES)
def test_every_method_works_on_top_of_what_the_base_is_for_the_task(lm: LanguageModel, noted: Note, name: str) -> None:
    """All that is trained or scored lies on the task's adapter, and answers do; PER-PCS has it merged into the base."""
    task = beneath_of(lm)
    trained, scored, weighed = (noted(lm.engine, call) for call in ("finetune", "score", "gradient"))
    written = noted(lm, "generate")
    made = method(replace(context(lm, name=name, training={"epochs": 1}), beneath=[task]))
    made.learn(SHARERS[:1])
    made.prepare([person("a", TEXTS[:1]), person("b", TEXTS[1:2])])
    made.adapt(made.examples())
    frozen = [call["frozen"] for call in trained] + [call["adapters"][:1] for call in scored]
    frozen += [] if name == "per-pcs" else [call["frozen"] for call in weighed]
    assert all(below == [task] for below in frozen)
    assert (len(trained), bool(scored), bool(weighed)) == {
        "base": (0, False, False), "oppu": (1, False, False), "pooled": (1, False, False), "pplug": (0, False, True),
        "kgt": (0, True, False), "per-pcs": (1, False, True), "rpo": (0, True, True),
        "hydra": (0, False, False), "dpcml": (0, False, False), "steerable": (0, False, False),
        "core": (1, False, True), "hypernet": (1, False, True), "hypernet-start": (1, False, True),
        "tap-per": (0, False, True), "userip": (0, False, True), "dpl": (0, False, False), "aloe": (0, True, True),
    }[name]  # fmt: skip
    of_base = {"kgt": [[]] * kgt.PROPOSED}  # it proposes what is known of a person
    expected = {**of_base, "rpo": [[task]], "hydra": [[task]] * 2, "dpl": [[]] * 2, "aloe": [[task]]}.get(name, [])
    assert [call["adapters"] for call in written] == expected
    served = made.serving([(1, made.people[1].questions[0][0])])
    assert served.arm[0] is task and len(served.arm) == (
        1 if name in ("base", "kgt", "hydra", "dpcml", "steerable", "dpl") else 2
    )


def beneath_of(lm: LanguageModel) -> Adapters:
    """An adapter of one row that changes what the model says."""
    shape = lm.lora_layout(AdapterConfig(rank=2, alpha=4, targets=("v_proj",)))
    noise = torch.randn(shape.width, generator=torch.Generator().manual_seed(1))
    return lm.adapters(shape, shape.start(0) + 0.1 * noise)


def test_the_rate_of_a_method_falls_to_zero_over_its_batches(lm: LanguageModel, noted: Note) -> None:
    """Of two batches η and η/2; each person's examples in an order of their own, everybody from the same start."""
    calls, at = (
        noted(lm.engine, "finetune"),
        context(lm, training={"epochs": 1, "batch_size": 2, "learning_rate": 4e-3}),
    )
    own = [[p.example for p in person.history] for person in (PEOPLE[0], PEOPLE[2])]
    at.train(at.config.adapter, at.config.training, own, ["a", "c"])
    (call,) = calls
    assert call["rates"] == [[4e-3, 2e-3], [4e-3, 2e-3]]
    assert [x.examples for x in call["sets"]] == [lm.format.dialogues(examples) for examples in own]
    orders = [schedule(len(o), 2, 1, derive_seed(0, n, "personal")) for o, n in zip(own, "ac", strict=True)]
    assert [x.batches for x in call["sets"]] == orders
    assert torch.equal(*call["trained"].rows) and call["trained"].rows.any()


def test_each_method_trains_on_whose_examples_it_says(lm: LanguageModel, noted: Note) -> None:
    """OPPU each person's own, `pooled` all in one, PER-PCS the sharers', the task's stage the others' questions."""
    calls, people = noted(lm.engine, "finetune"), [person("a", TEXTS[:2]), person("b", TEXTS[2:])]
    at = context(lm, retrieve=1, training={"epochs": 1})
    for kind in (Oppu, Pooled):
        made = kind(at)
        made.prepare(people)
        made.adapt(made.examples())
    sharing = Assembled(at)
    sharing.learn(people)
    learn_task(at, Prompting(at), people, at.config.adapter, at.config.training)
    sets = [[[e.reply for e in x.examples] for x in call["sets"]] for call in calls]
    replies = [
        [e.reply for e in lm.format.dialogues([Dialogue("", "", r) for _, r in TEXTS[i : i + 2]])] for i in (0, 2)
    ]
    (answer,) = lm.format.dialogues([Dialogue("", "", "lentil soup")])
    assert sets == [replies, [[*replies[0], *replies[1]]], replies, [[answer.reply] * 2]]
    prompting = Prompting(at)
    prompting.prepare(people)
    asked = [prompting.prompt(k, p.questions[0][0]) for k, p in enumerate(people)]
    assert [e.prompt for e in calls[3]["sets"][0].examples] == [e.prompt for e in lm.format.prompts(asked)]
    assert [e.prompt for x in calls[0]["sets"] for e in x.examples] == [
        e.prompt for own in prompting.examples() for e in lm.format.dialogues(own)
    ]
    assert TEXTS[0][1] in prompting.examples()[0][1].prompt  # each item behind the one before it


def test_the_projection_is_taught_by_each_persons_own_items(lm: LanguageModel, noted: Note) -> None:
    """The soft token of a question is of the history of who asks it; the weight is that of the mean over tokens."""
    people = [person("a", TEXTS[:2]), person("b", TEXTS[2:])]
    made, calls = Pplug(context(lm, training={"epochs": 1, "batch_size": 2})), noted(lm.engine, "gradient")
    made.prepare(people)
    questions = made._embedded([p.questions[0][0].search for p in people])
    tokens = torch.stack([made.token(q, items) for q, items in zip(questions, made.items, strict=True)])
    made.learn(people)
    (order,) = schedule(2, 2, 1, derive_seed(0, "pplug", "order"))
    (call,) = calls
    torch.testing.assert_close(call["trained"].rows, tokens[order].detach())
    told = lm.format.dialogues([p.questions[0][1] for p in people])
    assert call["batches"] == [[told[i]] for i in order]
    assert call["weights"] == [[1 / sum(e.targets for e in told)]] * 2


# -- prompts ------------------------------------------------------------------------------------------------------


def test_bm25_by_hand(lm: LanguageModel) -> None:
    """Three documents of two words each; "soup" is in one, "we" in all: idf ln(1 + 2.5/1.5) and ln(1 + 0.5/3.5).

    With every document of mean length a word that occurs once scores idf / (1 + k1) · … the same factor for all, so
    the order is that of the summed idf.
    """
    history = [past(0, "we sing", ""), past(1, "we soup", ""), past(2, "we walk", "")]
    (ranking,) = rankings("bm25", [history], lm, ["a"], 0)
    assert ranking(Asked("", "we like soup"), 3) == [1, 2, 0]  # the newer of two equals first
    assert ranking(Asked("", "we like soup"), 1) == [0]
    assert ranking(Asked("", "soup"), 1) == [0] and ranking(Asked("", "nothing known"), 3) == [2, 1, 0]
    assert ranking(Asked("", "soup"), 0) == []


def test_bm25_counts_no_word_of_an_item_that_came_later(lm: LanguageModel) -> None:
    """Of the first two items "we" and "sea" are in one each, so the newer comes first; later "sea" is everywhere."""
    history = [past(i, text, "") for i, text in enumerate(["we sing", "sea song", *["sea"] * 8])]
    for there in (history, history[:2]):
        (ranking,) = rankings("bm25", [there], lm, ["a"], 0)
        assert ranking(Asked("", "we sea"), 2) == [1, 0]
    (ranking,) = rankings("bm25", [history], lm, ["a"], 0)
    assert ranking(Asked("", "we sea"), 10)[0] == 0


def test_recent_is_the_newest_first_whatever_is_asked(lm: LanguageModel) -> None:
    (ranking,) = rankings("recent", [PEOPLE[0].history], lm, ["a"], 0)
    assert ranking(Asked("", "soup"), 4) == [3, 2, 1, 0] and ranking(Asked("", "soup"), 2) == [1, 0]


def test_a_profile_is_of_items_spread_over_the_history(lm: LanguageModel, noted: Note) -> None:
    """Of 16 items every second one, from the first on; the base model says it."""
    calls, words = noted(lm, "generate"), [f"w{n}" for n in range(16)]
    made = Prompting(context(lm, profile=True))
    made.prepare([Person("p", tuple(replace(past(i, w, ""), shown=w) for i, w in enumerate(words)))])
    (call,) = calls
    assert call["prompts"] == [ASK_FOR_PROFILE.format(items="\n".join(words[::2]))] and call["adapters"] == []
    assert made.profiles == lm.generate(call["prompts"], [0], [], call["sampling"], call["seeds"])


def test_dense_is_the_cosine_of_mean_hidden_states(lm: LanguageModel) -> None:
    history = PEOPLE[0].history
    (ranking,) = rankings("dense", [history], lm, ["a"], 0)
    found = lm.embed([p.document for p in history] + ["i want soup"])
    *items, question = (torch.nn.functional.normalize(f.readings["mean"].vector, dim=0) for f in found)
    cosines = [float(item @ question) for item in items]
    assert ranking(Asked("", "i want soup"), 4) == sorted(range(4), key=lambda i: -cosines[i])


def test_random_items_are_the_same_again_and_differ_by_question_and_person(lm: LanguageModel) -> None:
    history = [past(i, str(i), "") for i in range(20)]
    one, other = rankings("random", [history, history], lm, ["a", "b"], 0)
    assert one(Asked("x", ""), 20) == one(Asked("x", ""), 20) != one(Asked("y", ""), 20)
    assert one(Asked("x", ""), 20) != other(Asked("x", ""), 20)


@pytest.mark.parametrize("retriever", ["bm25", "dense", "recent", "random"])
def test_an_items_prompt_holds_earlier_items_only(lm: LanguageModel, retriever: str) -> None:
    made = Prompting(context(lm, retrieve=2, retriever=retriever))
    made.prepare(PEOPLE)
    for k, own in enumerate(made.examples()):
        history = PEOPLE[k].history
        for i, example in enumerate(own):
            shown = {j for j, p in enumerate(history) if p.shown in example.prompt}
            assert len(shown) == min(i, 2) and all(j < i for j in shown)
            assert example.prompt.endswith(history[i].example.prompt)


def test_the_nearest_item_stands_next_to_the_question_and_the_profile_first(lm: LanguageModel) -> None:
    made = Prompting(context(lm, retrieve=2, profile=True))
    made.prepare(PEOPLE[:1])
    text = made.prompt(0, Asked("which soup do you like", "which soup do you like"))
    assert text.splitlines() == [
        f"The user: {made.profiles[0]}", PEOPLE[0].history[0].shown, PEOPLE[0].history[3].shown,
        "which soup do you like",
    ]  # fmt: skip


def test_a_question_stays_whole_and_every_item_is_seen_from_its_beginning(lm: LanguageModel) -> None:
    made, long = context(lm), " ".join(f"word{i}" for i in range(300))
    items = [replace(past(0, "", ""), shown=f"first {long}"), replace(past(1, "", ""), shown="second is short")]
    question = Asked("the question " + " ".join("why" for _ in range(40)), "")
    text = made.prompt(question, items, profile=f"profile {long}")
    (encoded,) = lm.format.prompts([text])
    assert not encoded.truncated and text.endswith(question.prompt) and encoded.length > 150
    assert "The user: profile word0" in text and "first word0" in text and "second is short" in text
    longer = Asked(" ".join("why" for _ in range(150)), "")
    assert made.prompt(longer, items) == longer.prompt  # no room but for scraps


@pytest.mark.parametrize("name", [n for n in NAMES if n != "pooled"])
def test_a_person_gets_nothing_of_anybody_elses(lm: LanguageModel, name: str) -> None:
    """One person's history is another one: what all others are given and served stays bit by bit."""

    def prompts_and_losses(people: Sequence[Person]) -> list[tuple[str, list[float]]]:
        made = method(
            context(lm, name=name, profile=name in ("base", "oppu"), retrieve=name in ("base", "oppu", "aloe"))
        )
        made.learn(SHARERS)
        made.prepare(people)
        made.adapt(made.examples())
        asked = [(k, p.questions[0][0]) for k, p in enumerate(people)]
        replies = [
            replace(p.questions[0][1], prompt=made.prompt(k, a)) for (k, a), p in zip(asked, people, strict=True)
        ]
        served = made.serving(asked)
        scores = lm.score(lm.format.dialogues(replies), served.slots, served.arm)
        chosen = made.worth(asked, ["lentil soup"] * len(asked)) if isinstance(made, Choosing) else [0.0] * len(asked)
        return [
            (r.prompt, [round(s.nll, 3), round(float(w), 5)]) for r, s, w in zip(replies, scores, chosen, strict=True)
        ]

    there = prompts_and_losses([PEOPLE[0], PEOPLE[1], PEOPLE[2]])
    changed = prompts_and_losses([OTHER, PEOPLE[1], PEOPLE[2]])
    moved = prompts_and_losses([PEOPLE[1], PEOPLE[0], PEOPLE[2]])
    assert changed[1:] == there[1:] and changed[0] != there[0]
    assert moved[1] == there[0] and moved[0] == there[1]  # nobody is served with the first one's


def test_the_pooled_adapter_is_everybodys(lm: LanguageModel) -> None:
    rows = []
    for last in (PEOPLE[2], OTHER):
        made = Pooled(context(lm))
        made.prepare([*PEOPLE[:2], last])
        made.adapt(made.examples())
        assert made.adapters
        rows.append(made.adapters.rows)
    assert rows[0].shape[0] == 1 and not torch.equal(*rows)


def test_an_adapter_is_trained_on_what_the_base_is_for_the_task(lm: LanguageModel) -> None:
    plain = context(lm)
    beneath = plain.train(plain.config.adapter, plain.config.training, [[p.example for p in OTHER.history]], ["task"])
    own = [[p.example for p in PEOPLE[0].history]]
    one, other = (d.train(d.config.adapter, d.config.training, own, ["a"]).rows for d in
                  (plain, replace(plain, beneath=[beneath])))  # fmt: skip
    assert (one - other).abs().max() > 1e-4


# -- one adapter a person -----------------------------------------------------------------------------------------


def test_no_others_history_is_in_an_adapter(lm: LanguageModel) -> None:
    """A marker as long as what it replaces leaves the others' passes what they were: bits tell of any leak."""
    marked = person("a", (("what did you cook", "a lentil soup with pepper"), *TEXTS[1:]))
    same = lm.format.dialogues([p.example for p in marked.history])
    assert [e.length for e in same] == [e.length for e in lm.format.dialogues([p.example for p in PEOPLE[0].history])]
    rows = []
    for people in (PEOPLE, [marked, *PEOPLE[1:]]):
        made = Oppu(context(lm))
        made.prepare(people)
        made.adapt(made.examples())
        assert made.adapters
        rows.append(made.adapters.rows)
    assert torch.equal(rows[0][1:], rows[1][1:]) and not torch.equal(rows[0][0], rows[1][0])


def test_an_adapter_is_the_same_alone_and_in_company(lm: LanguageModel) -> None:
    both = []
    for people in (PEOPLE, PEOPLE[1:2]):
        made = Oppu(context(lm, retrieve=1))
        made.prepare(people)
        made.adapt(made.examples())
        assert made.adapters
        both.append(made.adapters.rows)
    torch.testing.assert_close(both[0][1], both[1][0], atol=1e-4, rtol=1e-3)


def test_a_task_adapter_beneath_is_one_merged_into_the_base(lm: LanguageModel) -> None:
    base = context(lm)
    task = learn_task(base, Prompting(base), PEOPLE, AdapterConfig(rank=2, alpha=4), TrainingConfig(learning_rate=1e-2))
    examples = lm.format.dialogues([p.example for p in PEOPLE[0].history])
    bare = [s.nll for s in lm.score(examples, [0] * 4, [])]
    beneath = [s.nll for s in lm.score(examples, [0] * 4, [task])]
    with lm.engine.adaptable.merged([task]):
        merged = [s.nll for s in lm.score(examples, [0] * 4, [])]
    assert (
        merged == pytest.approx(beneath, rel=1e-4) and max(abs(a - b) for a, b in zip(bare, merged, strict=True)) > 0.1
    )
    assert [s.nll for s in lm.score(examples, [0] * 4, [])] == bare
    made = Prompting(base)
    made.prepare(PEOPLE)
    before, after = loss(lm, made, PEOPLE), loss(lm, prepared(replace(base, beneath=[task])), PEOPLE)
    assert after < before - 0.05


def prepared(at: MethodContext) -> Method:
    made = Prompting(at)
    made.prepare(PEOPLE)
    return made


# -- soft token, graph, pieces ------------------------------------------------------------------------------------


def test_a_soft_token_is_the_mean_of_projected_items_by_softmax(lm: LanguageModel) -> None:
    made = Pplug(context(lm))
    items, question = torch.randn(3, made.layout.hidden), torch.randn(made.layout.hidden)
    cosines = torch.stack([torch.cosine_similarity(item, question, dim=0) for item in items])
    weights = torch.exp(cosines / TEMPERATURE) / torch.exp(cosines / TEMPERATURE).sum()
    expected = sum(w * made.projection(item) for w, item in zip(weights, items, strict=True))
    torch.testing.assert_close(made.token(question, items), expected)


def test_the_projection_learns_and_nothing_else_does(lm: LanguageModel) -> None:
    made = Pplug(context(lm, training={"epochs": 30, "batch_size": 3, "learning_rate": 3e-3}))
    made.prepare(PEOPLE)
    before = loss(lm, made, PEOPLE)
    base = [p.clone() for p in lm.engine.model.parameters()]
    made.learn(PEOPLE)
    made.prepare(PEOPLE)
    assert loss(lm, made, PEOPLE) < before - 0.1
    assert all(torch.equal(a, b) for a, b in zip(base, lm.engine.model.parameters(), strict=True))


def test_a_graph_keeps_what_makes_replies_likelier_and_drops_what_is_not_missed(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = KnowledgeGraph(context(lm))
    made.prepare(PEOPLE)
    assert all(now <= bare for now, bare in zip(made.losses(made.graphs), made.losses([[], [], []]), strict=True))
    useful, useless = Triple("likes", "lentil soup with cumin"), Triple("is", "zq zq zq zq zq zq")
    made.graphs = [[], [], []]
    made._try([useful] * 3)
    kept = list(map(list, made.graphs))
    made._try([useless] * 3)
    assert [useful] in kept and all(useless not in g for g in made.graphs)
    made.graphs = [[useful, useless]] * 3
    monkeypatch.setattr(kgt, "PROPOSED", 2)
    made._drop()
    assert [g for g in made.graphs if useless in g] == []


def test_triples_are_tried_on_the_newest_replies_and_proposed_from_the_newest_items(
    lm: LanguageModel, noted: Note
) -> None:
    """Of eight replies six are scored: another first one changes nothing, another last one does."""
    texts, other = [(f"what of number {n}", f"it is {n}") for n in range(8)], ("who rows the red boat", "my brother")
    made, found = KnowledgeGraph(context(lm)), []
    for own in (texts, [other, *texts[1:]], [*texts[:-1], other]):
        made.people = [person("n", own)]
        found.append(made.losses([[Triple("likes", "boats")]]))
    assert found[0] == found[1] != found[2]
    calls = noted(lm, "generate")
    made.people, made.graphs = [person("n", texts)], [[]]
    for number in (0, 1):
        made._proposed(number)
    newest, next_one = (call["prompts"][0] for call in calls)
    assert texts[7][0] in newest and "likes" in newest and texts[6][0] in next_one and "dislikes" in next_one


def test_a_graph_without_room_for_an_item_names_the_limit_that_it_needs(lm: LanguageModel) -> None:
    def limited(tokens: int) -> LanguageModel:
        limits = TextLimits(prompt_tokens=tokens, reply_tokens=16)
        return LanguageModel.load(ModelConfig(dtype="float32", limits=limits))

    least = lm.format.length(kgt.ASK) + len("talks about") + 2 + 8
    for tokens in (16, least - 1):
        with pytest.raises(NoRoomError, match=rf"prompt_tokens = {tokens} must be >= {least} for the method kgt"):
            KnowledgeGraph(context(limited(tokens)))
    made = KnowledgeGraph(context(limited(least)))
    made.prepare(PEOPLE)
    assert len(made.graphs) == len(PEOPLE)


def test_triples_near_the_question_are_given() -> None:
    graph = [Triple("likes", word) for word in ("tea", "lentil soup", "rain", "soup")]
    assert [str(t) for t in kgt.nearest(graph, "hot soup in the rain")] == [
        "The user likes lentil soup.", "The user likes rain.", "The user likes soup.",
    ]  # fmt: skip


def test_pieces_are_picked_by_their_gates_and_mixed_by_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sharers, two picked: the cosines of their gates with the input are 1, 0.6 and −1."""
    monkeypatch.setattr(per_pcs, "PICKED", 2)
    small = lora_layout((AdaptedLayer("q", 2, 3),), rank=1, alpha=2.0)
    a, b = torch.randn(3, 1, 2), torch.randn(3, 3, 1)
    gates = torch.tensor([[-2.0, 0.0], [3.0, 4.0], [0.5, 0.0]])
    row = assembled(Pieces({"q": a}, {"q": b}, {"q": gates}), {"q": torch.tensor([7.0, 0.0])}, small)
    ((_, made_a, made_b),) = wide(small).split(row[None])
    first, second = torch.softmax(torch.tensor([1.0, 0.6]), 0)
    torch.testing.assert_close(made_b[0] @ made_a[0], first * b[2] @ a[2] + second * b[1] @ a[1])
    assert wide(small).scale == small.scale


def test_gates_learn_while_the_adapters_stay(lm: LanguageModel) -> None:
    made = Assembled(context(lm))
    made.learn(PEOPLE)
    assert all(g.abs().max() > 0 for g in made.pieces.gates.values())
    trained = Oppu(context(lm))
    trained.prepare(PEOPLE)
    trained.adapt(trained.examples())
    assert trained.adapters
    for name, a, b in made.layout.split(trained.adapters.rows):
        assert torch.equal(made.pieces.a[name], a) and torch.equal(made.pieces.b[name], b)


def test_gates_go_where_the_loss_falls_on_what_is_beneath(lm: LanguageModel) -> None:
    """Step by step: AdamW on the gradient by the gates alone, the task's adapter merged into the base."""
    task, rate = beneath_of(lm), 2e-2
    at = replace(context(lm, training={"epochs": 1, "batch_size": 2, "learning_rate": rate}), beneath=[task])
    made = Assembled(at)
    made.prepare(PEOPLE[:1])
    examples, layout = made.examples(), made.layout
    gated, row = replace(layout, gated=True), layout.start(3)[None] + 0.05
    found = made._gates(Adapters(layout, row), examples)
    encoded = lm.format.dialogues(examples[0])

    def with_gates(gates: torch.Tensor) -> Adapters:
        return Adapters(gated, torch.cat([row, gates], 1))

    gates = torch.zeros(1, gated.width - layout.width)
    moments = Moments.zeros(gates)
    with lm.engine.adaptable.merged([task]):
        for batch in schedule(4, 2, 1, derive_seed(0, "a", "gates")):
            chosen = [encoded[i] for i in batch]
            weights = [1 / sum(e.targets for e in chosen)] * 2
            gradient, _ = lm.engine.gradient(with_gates(gates), [], [chosen], [weights])
            adamw_(gates, gradient[:, layout.width :], moments, [0], [rate], 0.0)
        before, after = (
            sum(lm.engine.score(encoded, [0] * 4, [with_gates(g)])) for g in (torch.zeros_like(gates), found)
        )
    torch.testing.assert_close(found, gates, atol=1e-6, rtol=0)
    assert after < before - 0.1
    bare = Assembled(replace(at, beneath=[]))
    bare.prepare(PEOPLE[:1])
    assert (bare._gates(Adapters(layout, row), examples) - found).abs().max() > 1e-3


def test_pieces_are_picked_by_the_newest_items(lm: LanguageModel) -> None:
    """Of nine items eight are read: another first one changes nothing, another last one does."""
    texts, other = [(f"what of number {n}", f"it is {n}") for n in range(9)], ("who rows the red boat", "my brother")
    made, rows = Assembled(context(lm)), []
    made.learn(SHARERS)
    for own in (texts, [other, *texts[1:]], [*texts[:-1], other]):
        made.prepare([person("n", own)])
        made.adapt(made.examples())
        assert made.adapters
        rows.append(made.adapters.rows)
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_what_a_layer_reads_is_the_mean_over_tokens(lm: LanguageModel) -> None:
    """Of the first layer: the normed embeddings, which can be had without a pass."""
    at, small = context(lm), lm.lora_layout(AdapterConfig(rank=1, targets=("layers.0.self_attn.q_proj",)))
    examples = [p.example for p in PEOPLE[0].history]
    (found,) = per_pcs.mean_inputs(at, small, examples).values()
    ids = torch.tensor([i for e in lm.format.dialogues(examples) for i in (*e.prompt, *e.reply)])
    block = lm.engine.model.base_model.layers[0]
    with torch.inference_mode():
        expected = block.input_layernorm(lm.engine.embedding(ids[None]))[0].mean(0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# -- preferences --------------------------------------------------------------------------------------------------


def test_the_loss_of_pairs_and_its_slopes_are_those_of_autograd() -> None:
    chosen, rejected = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    pairs, beta = torch.tensor([[0.7, 0.3], [0.0, 1.0], [0.2, 0.8]]), 0.4
    margins = beta * pairs * (chosen[:, None] - rejected[None])
    expected = -torch.nn.functional.logsigmoid(margins)[pairs > 0].mean()
    by_chosen, by_rejected = torch.autograd.grad(expected, [chosen, rejected])
    value, up, down = value_and_weights(chosen.detach(), rejected.detach(), pairs, beta)
    assert value == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(up, -by_chosen)  # a reward is minus an NLL
    torch.testing.assert_close(down, -by_rejected)


def test_one_pair_is_dpo() -> None:
    value, *_ = value_and_weights(torch.tensor([2.0]), torch.tensor([-1.0]), torch.eye(1), 0.1)
    assert value == pytest.approx(math.log(1 + math.exp(-0.1 * 3)))


def test_near_prompts_weigh_more_and_rows_sum_to_one() -> None:
    found = nearness(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 5.0]]), 0.5)
    by_hand = math.e**2 / (2 * math.e**2 + 1)
    assert found[0].tolist() == pytest.approx([by_hand, by_hand, 1 - 2 * by_hand], rel=1e-5)
    assert found.sum(1).tolist() == pytest.approx([1, 1, 1])


def test_preferring_moves_what_is_chosen_above_what_is_rejected(lm: LanguageModel) -> None:
    layout = lm.lora_layout(AdapterConfig(rank=2, alpha=4))
    start = lm.adapters(layout, torch.stack([layout.start(0)] * 2))
    chosen = lm.format.dialogues([Dialogue("x", "which soup", "lentil soup")])
    rejected = lm.format.dialogues([Dialogue("x", "which soup", "no idea at all")])
    told = [[Preferences(chosen, rejected, torch.eye(1))] * 6, [Preferences(rejected, chosen, torch.eye(1))] * 6]
    after, losses = prefer(lm.engine, start, [], told, rate=1e-2, beta=0.1)
    assert losses[0][0] == pytest.approx(math.log(2), rel=1e-4) and losses[0][-1] < losses[0][0]

    def reward(k: int, examples: Any) -> float:
        return lm.score(examples, [0], [])[0].nll - lm.score(examples, [k], [after])[0].nll

    assert reward(0, chosen) > reward(0, rejected) and reward(1, chosen) < reward(1, rejected)
    alone, _ = prefer(lm.engine, Adapters(layout, start.rows[:1]), [], told[:1], rate=1e-2, beta=0.1)
    torch.testing.assert_close(alone.rows[0], after.rows[0], atol=1e-4, rtol=1e-3)


def test_the_likelihood_term_alone_makes_the_chosen_reply_likelier(lm: LanguageModel) -> None:
    """Pairs of weight 0 count nothing: the loss is the mean NLL of the chosen reply, and a step lowers it."""
    layout = lm.lora_layout(AdapterConfig(rank=2, alpha=4))
    start = lm.adapters(layout, layout.start(0))
    chosen = lm.format.dialogues([Dialogue("x", "which soup", "lentil soup")])
    rejected = lm.format.dialogues([Dialogue("x", "which soup", "no idea at all")])
    told = [[Preferences(chosen, rejected, torch.zeros(1, 1))] * 3]
    after, losses = prefer(lm.engine, start, [], told, rate=5e-3, nll_weight=1.0)
    (bare,) = lm.score(chosen, [0], [])
    assert losses[0][0] == pytest.approx(bare.nll / bare.tokens, rel=1e-4)
    assert losses[0][0] > losses[0][1] > losses[0][2]
    (now,) = lm.score(chosen, [0], [after])
    assert now.nll < bare.nll - 0.1
    unmoved, _ = prefer(lm.engine, start, [], told, rate=5e-3, nll_weight=0.0)
    assert torch.equal(unmoved.rows, start.rows)


def test_rpo_moves_a_persons_replies_above_the_models_with_its_own_settings(lm: LanguageModel, noted: Note) -> None:
    calls = noted(rpo, "prefer")
    preference = {"beta": 0.2, "nll_weight": 0.0}
    training = {"epochs": 3, "batch_size": 2, "learning_rate": 5e-3}
    made = Rpo(context(lm, name="rpo", preference=preference, training=training))
    made.prepare(PEOPLE[:1])
    (examples,) = made.examples()
    made.adapt([examples])
    (call,) = calls
    assert (call["rate"], call["beta"], call["nll_weight"]) == (5e-3, 0.2, 0.0) and len(call["told"][0]) == 6
    (said,) = made.replies_of_model([examples])
    own, theirs = (lm.format.dialogues([replace(e, response=r) for e, r in zip(examples, replies, strict=True)])
                   for replies in ([e.response for e in examples], said))  # fmt: skip
    assert made.adapters

    def rewards(replies: Any) -> torch.Tensor:
        bare, now = (lm.engine.score(replies, [0] * 4, arm) for arm in ([], [made.adapters]))
        return torch.tensor(bare) - torch.tensor(now)

    assert (rewards(own) > rewards(theirs)).all()


def test_rejected_is_what_the_model_says_on_top_of_what_it_is_for_the_task(lm: LanguageModel) -> None:
    task = beneath_of(lm)
    made = Rpo(replace(context(lm, name="rpo"), beneath=[task]))
    made.prepare(PEOPLE[:1])
    (said,) = made.replies_of_model(made.examples())
    sampling = SamplingConfig(max_new_tokens=lm.format.limits.reply_tokens)
    prompts = [p.example.prompt for p in PEOPLE[0].history]
    with_task, bare = (lm.generate(prompts, [0] * 4, on, sampling, range(4)) for on in ([task], []))
    assert said == with_task and said != bare


def test_rejected_is_what_the_model_says_and_chosen_what_the_person_did(lm: LanguageModel) -> None:
    made = Rpo(context(lm, name="rpo"))
    made.prepare(PEOPLE[:1])
    examples = made.examples()
    (said,) = made.replies_of_model(examples)
    told = made._preferences(examples[0], said, [0, 2])
    assert [e.reply for e in told.chosen] == [e.reply for e in lm.format.dialogues([examples[0][0], examples[0][2]])]
    assert {e.prompt for e in told.chosen} == {e.prompt for e in told.rejected}
    assert [e.reply for e in told.rejected] != [e.reply for e in told.chosen]


def test_a_weighted_gradient_is_that_of_the_weighted_losses(lm: LanguageModel) -> None:
    """With the weights of the mean it is a step of finetune; a negative one turns an example's part around."""
    layout = lm.lora_layout(AdapterConfig(rank=2, alpha=4))
    stack = lm.adapters(layout, torch.stack([layout.start(0), layout.start(1)]) + 0.01)
    examples = lm.format.dialogues([p.example for p in PEOPLE[0].history])
    one, value = lm.engine.gradient(stack, [], [examples[:2], examples[2:]], [[1.0, -2.0], [0.5, 0.0]])
    parts = {
        i: gradient
        for group, found, _ in lm.engine.row_gradients(stack, [], examples, [0, 0, 1, 1], [1.0] * 4)
        for i, gradient in zip(group, found, strict=True)
    }
    torch.testing.assert_close(one[0], parts[0] - 2 * parts[1], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(one[1], 0.5 * parts[2], atol=1e-4, rtol=1e-3)
    losses = [s.nll for s in lm.score(examples, [0, 0, 1, 1], [stack])]
    assert value.tolist() == pytest.approx([losses[0] - 2 * losses[1], 0.5 * losses[2]], rel=1e-4)
    assert TrainingSet(examples, [[0]]).tokens == examples[0].length
