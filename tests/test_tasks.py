"""Tasks: what is asked in which words, how it is measured, and that no history holds what is asked after it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from florilegium.client.dialogue import Dialogue
from florilegium.simulation.data.conversations import READERS, Conversation
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.population import DataConfig, User, half_of
from florilegium.simulation.tasks.config import TaskConfig, _with_held_out, load_task
from florilegium.simulation.tasks.lamp import OFFICIAL, load_lamp
from florilegium.simulation.tasks.makers import by_length, of_options
from florilegium.simulation.tasks.metrics import macro_f1, measure, normal, rmse, slot_accuracy
from florilegium.simulation.tasks.official import split_users
from florilegium.simulation.tasks.populations import MAX_WORDS, bounded, dealt, people, plain
from florilegium.simulation.tasks.slots import matches, said_before
from florilegium.simulation.tasks.stand_ins import EMOTIONS, STAND_INS, TOPIC_LABELS
from florilegium.simulation.tasks.task import Item, Query, Task, TaskUser

needs_folder = pytest.mark.skipif(
    not os.environ.get("FLORILEGIUM_DATA"), reason="FLORILEGIUM_DATA is unset; set it to the folder of .jsonl.xz files"
)
NEEDS = {name: () if stand_in.source == "chitchat" else needs_folder for name, stand_in in STAND_INS.items()}
EVERY = [pytest.param(name, marks=NEEDS[name]) for name in STAND_INS]
FEW = {"users": 6, "pool_users": 8, "max_history": 24, "queries_per_user": 4}


# Metrics


def test_accuracy_by_query_by_user_and_over_all_queries() -> None:
    """Two of the first user's three are right, none of the second's one: 2/3 and 0, mean 1/3; over queries 2/4."""
    found = measure("accuracy", [[("a", "a"), (" b ", "b"), ("A", "a")], [("", "a")]], ("a", "b"))
    assert found.by_query == (1, 1, 0, 0)
    assert found.by_user == (pytest.approx(2 / 3), 0)
    assert found.mean_per_user == pytest.approx(1 / 3)
    assert found.pooled == 0.5


def test_macro_f1_counts_labels_that_never_came_up_and_no_label_for_what_is_none() -> None:
    """a: 1 hit, predicted once, right twice: 2/3. b: 1 hit, predicted twice, right once: 2/3. c: never: 0. Mean 4/9.

    "nonsense" is a prediction of no label: it costs a, whose target it missed, and nothing else.
    """
    answers = [("a", "a"), ("nonsense", "a"), ("b", "b"), ("b", "c")]
    assert macro_f1(answers, ("a", "b", "d")) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert macro_f1(answers, ("a", "b", "c")) == pytest.approx(4 / 9)
    assert measure("f1", [answers], ("a", "b", "c")).by_user == ()
    assert math.isnan(measure("f1", [answers], ("a", "b", "c")).mean_per_user)


def test_ratings_that_cannot_be_read_count_as_the_farther_end() -> None:
    """Off by 1 and 0; unreadable for 4 is 1 (off by 3), for 2 is 5 (3), for 3, the middle, 5 (2): MAE 9/5.

    RMSE √((1 + 0 + 9 + 9 + 4)/5) = √4.6.
    """
    answers = [("3", "4"), (" 2.0", "2"), ("four", "4"), ("", "2"), ("nan", "3")]
    assert measure("mae", [answers]).by_query == (1, 0, 3, 3, 2)
    assert measure("mae", [answers]).pooled == pytest.approx(9 / 5)
    assert measure("rmse", [answers]).pooled == pytest.approx(math.sqrt(4.6))
    assert measure("rmse", [answers[:1], answers[2:3]]).by_user == (1, 3)
    assert rmse(answers[2:3]) == 3


def test_rouge_is_f1_without_stems() -> None:
    """the cat sat / the sat cat runs: three words shared of 3 and 4, 2·3/7 = 6/7; in order two, 2·2/7 = 4/7.

    cat and cats have one stem and are two words.
    """
    assert measure("rouge-1", [[("the sat cat runs", "The cat sat")]]).pooled == pytest.approx(6 / 7)
    assert measure("rouge-L", [[("the sat cat runs", "The cat sat")]]).pooled == pytest.approx(4 / 7)
    assert measure("rouge-1", [[("cats", "cat")]]).pooled == 0


def test_slot_values_are_compared_after_normalisation() -> None:
    assert slot_accuracy("six pm", "6:00 p.m.") == slot_accuracy("$1,310", "1310") == 1
    assert slot_accuracy("6:30 pm", "6 pm") == slot_accuracy("San Jose", "San Diego") == 0


@given(st.text(max_size=20))
def test_a_normal_value_stays(text: str) -> None:
    assert normal(normal(text)) == normal(text)


@given(st.lists(st.lists(st.sampled_from("12345"), min_size=1), min_size=1))
def test_right_answers_are_the_best_there_are(targets: list[list[str]]) -> None:
    right = [[(target, target) for target in of_user] for of_user in targets]
    assert measure("accuracy", right).pooled == measure("accuracy", right).mean_per_user == 1
    assert measure("mae", right).pooled == measure("rmse", right).pooled == 0


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one answer"):
        measure("accuracy", [[("a", "a")], []])
    with pytest.raises(ValueError, match="unknown metric 'bleu'; known: accuracy, mae, rouge-1"):
        measure("bleu", [[("a", "a")]])


# LaMP's words


@pytest.mark.parametrize(
    ("number", "shown", "prompt", "document"),
    [
        ("1", ['"Sun"', '"Moon"'], 'with the title, and "Sun", and "Moon" "Earth"', "title text"),
        ("2N", ['the category for the article: "text" is "target" '], "{0}. with the title", "title text"),
        ("2M", ['the tag for the movie: "text" is "target" '], "{0}. with the title", "text"),
        ("3", ['target is the score for "text" '], "{0}. with the title", "text"),
        ("4", ['"target" is the title for "text" '], "{0}. with the title", "target text"),
        ("5", ['"target" is a title for "text" '], "{0}. Following the given patterns with", "target text"),
        ("7", ['"text" '], "{0} are written by a person. Following the given patterns with", "text"),
    ],
)
def test_items_stand_in_a_prompt_in_the_words_of_lamp(
    number: str, shown: list[str], prompt: str, document: str
) -> None:
    task, item = OFFICIAL[number].task, Item("i", "text", "target", title="title")
    if number != "1":
        assert task.shown(item) == shown[0]
    assert task.with_items('with the title "Earth"', shown).startswith(prompt.format(shown[0]))
    assert task.with_items("with the title", []) == "with the title"
    assert task.document(item) == document


def test_a_history_item_is_practised_as_a_query_is_asked() -> None:
    item = Item("i", "A {brace} of ducks", "comedy", 3.0)
    example = OFFICIAL["2M"].task.example(item)
    query = OFFICIAL["2M"].task.ask(item)
    assert example.prompt == query.input and example.prompt.endswith("description: A {brace} of ducks")
    assert (example.response, example.time, query.search) == ("comedy", 3.0, "A {brace} of ducks")
    assert OFFICIAL["2M"].task.question(query) == example


def test_items_without_a_label_are_completed() -> None:
    paper = OFFICIAL["1"].task.example(Item("i", "We show …", title="Sun"))
    assert (paper.prompt, paper.response) == ("paper title: Sun abstract:", "We show …")
    assert OFFICIAL["7"].task.example(Item("i", "so hot")) == Dialogue("i", "tweet:", "so hot")


# LaMP's files


def official(folder: Path, questions: Any, golds: Any, task: str = "LaMP_2") -> Path:
    """Files in the form of the official ones."""
    (folder / "dev_questions.json").write_text(json.dumps(questions))
    (folder / "dev_outputs.json").write_text(json.dumps({"task": task, "golds": golds}))
    return folder


def movie(identity: str, *items: str, user: str | None = None) -> dict[str, Any]:
    profile = [{"id": i, "description": f"film {i}", "tag": "comedy", "date": f"2020-01-0{i}"} for i in items]
    asked = {"id": identity, "input": f"Which tag … tags: […] description: plot {identity}", "profile": profile}
    return asked if user is None else {**asked, "user_id": user}


def gold(*identities: str, output: str = "classic") -> list[dict[str, str]]:
    return [{"id": identity, "output": output} for identity in identities]


def test_questions_of_one_user_are_joined_and_the_history_is_what_all_of_them_know(tmp_path: Path) -> None:
    """Item 3 is in the profile of the later question alone: it could be later than the first."""
    questions = [movie("q2", "2", "1", "3", user="ana"), movie("q1", "1", "2", user="ana"), movie("q3", "4", user="bo")]
    ana, bo = load_lamp(official(tmp_path, questions, gold("q1", "q2", "q3")), "2M", "dev")
    assert [item.id for item in ana.history] == ["1", "2"]
    assert [query.id for query in ana.queries] == ["q1", "q2"]
    assert ana.history[0] == Item("1", "film 1", "comedy", 1577836800.0)  # 2020-01-01, UTC
    assert (bo.queries[0].search, bo.queries[0].target) == ("plot q3", "classic")


def test_without_user_ids_each_question_is_a_user(tmp_path: Path) -> None:
    users = load_lamp(official(tmp_path, [movie("q2", "1"), movie("q1", "2")], gold("q1", "q2")), "2M", "dev")
    assert [user.id for user in users] == ["q1", "q2"]


FIELDS: dict[str, tuple[str, dict[str, str], str, Item]] = {
    "1": (
        'For an author who has written the paper with the title "A "B" C", which reference is related? Just answer '
        'with [1] or [2] without explanation. [1]: "Sun" [2]: "Moon"',
        {"title": "T", "abstract": "A"},
        "[2]",
        Item("9", "A", title="T"),
    ),
    "2N": (
        "… article: x",
        {"text": "A", "title": "T", "category": "travel"},
        "crime",
        Item("9", "A", "travel", title="T"),
    ),
    "2M": ("… description: x", {"description": "A", "tag": "action"}, "classic", Item("9", "A", "action")),
    "3": ("… review: x", {"text": "A", "score": "4"}, "5", Item("9", "A", "4")),
    "4": ("Generate a headline for the following article: x", {"text": "A", "title": "T"}, "H", Item("9", "A", "T")),
    "5": ("… abstract of a paper: x", {"abstract": "A", "title": "T"}, "H", Item("9", "A", "T")),
    "7": ("Paraphrase …: x", {"text": "A"}, "H", Item("9", "A")),
}


@pytest.mark.parametrize("number", OFFICIAL)
def test_all_seven_tasks_are_read_from_their_own_fields(number: str, tmp_path: Path) -> None:
    prompt, fields, output, item = FIELDS[number]
    questions = [{"id": 7, "input": prompt, "profile": [{"id": 9, **fields}]}]
    official(tmp_path, questions, gold("7", output=output), OFFICIAL[number].file_names[0])
    (user,) = load_lamp(tmp_path, number, "dev")
    assert user.history == (item,)
    search, options = ("Sun Moon", ("Sun", "Moon")) if number == "1" else ("x", ())
    assert user.queries == (Query("7", prompt, output, search, options),)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda q, g: g.clear(), "question 'q1': dev_outputs.json has no gold for it"),
        (lambda q, g: q[0].pop("input"), "question 'q1': input = None must be a text"),
        (lambda q, g: q[0].update(input="Paraphrase this"), "question 'q1': input lacks 'description:'"),
        (lambda q, g: q[0].update(profile="none"), "question 'q1', profile: expected a list of objects"),
        (lambda q, g: q[0]["profile"][0].pop("tag"), "question 'q1', item '1': tag = None must be a text"),
        (lambda q, g: q[0]["profile"][0].update(date="May"), "item '1': date = 'May' must be a year"),
        (lambda q, g: q[0]["profile"][0].pop("date"), "question 'q1': some items of its profile have a date"),
        (lambda q, g: g[0].update(output="travel"), "gold 'q1': output = 'travel' is no label of lamp:2M"),
    ],
)
def test_a_broken_file_is_named_with_its_question(
    spoil: Callable[[list[dict[str, Any]], list[dict[str, Any]]], object], told: str, tmp_path: Path
) -> None:
    questions, golds = [movie("q1", "1", "2")], gold("q1")
    spoil(questions, golds)
    with pytest.raises(DataError) as raised:
        load_lamp(official(tmp_path, questions, golds), "2M", "dev")
    assert str(tmp_path) in str(raised.value) and told in str(raised.value)


def test_a_missing_file_another_task_and_no_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dev_outputs\.json does not exist"):
        load_lamp(tmp_path, "3", "dev")
    with pytest.raises(DataError, match=r"dev_outputs\.json: task = 'LaMP_2' must be LaMP_3 for lamp:3"):
        load_lamp(official(tmp_path, [], []), "3", "dev")
    (tmp_path / "dev_questions.json").write_text('[{"id":')
    with pytest.raises(DataError, match=r"dev_questions\.json is not JSON"):
        load_lamp(tmp_path, "2M", "dev")


def test_the_longest_histories_are_tested_on_and_everybody_else_is_the_pool() -> None:
    users = [TaskUser(f"u{n}", (Item("i", "x"),) * n, ()) for n in (3, 1, 4, 2)]
    pool, test = split_users(users, 2)
    assert [user.id for user in test] == ["u4", "u3"] and [user.id for user in pool] == ["u2", "u1"]


def test_a_config_of_lamp_keeps_development_test_and_pool_apart(tmp_path: Path) -> None:
    sizes = {f"q{n}": [str(i) for i in range(1, n + 1)] for n in range(2, 22)}
    official(tmp_path, [movie(q, *items, user=f"user of {q}") for q, items in sizes.items()], gold(*sizes))
    config = TaskConfig(
        name="lamp:2M", folder=str(tmp_path), users=2, pool_users=3, min_history=3, max_history=4, queries_per_user=1
    )
    _, pool, test = load_task(config, 0)
    _, others, development = load_task(config.model_copy(update={"split": "development"}), 0)
    by_half = {
        half: [f"user of q{n}" for n in range(21, 2, -1) if half_of(f"user of q{n}") == half]
        for half in ("test", "development")
    }
    assert [user.id for user in test] == by_half["test"][:2]
    assert [user.id for user in development] == by_half["development"][:2]
    assert {user.id for user in pool} <= set(by_half["test"][2:]) and len(pool) == 3
    assert {user.id for user in others} <= set(by_half["development"][2:])
    assert [len(user.history) for user in test] == [4, 4] and test[0].history[-1].id == test[0].id.partition("q")[2]
    _, _, whole = load_task(config.model_copy(update={"split": "all"}), 0)
    assert [user.id for user in whole] == ["user of q21", "user of q20"]  # as OPPU tests
    with pytest.raises(DataError, match="users = 20, but of the 20 users of"):
        load_task(config.model_copy(update={"users": 20}), 0)


# Settings


def test_a_wrong_name_or_folder_is_told_with_what_is_right() -> None:
    for values, told in (
        ({"name": "chat-replies"}, "did you mean 'chat-reply'?"),
        ({"name": "lamp:6"}, "did you mean 'lamp:"),
        ({"name": "lamp:3"}, "needs folder = the folder of its official files"),
        ({"name": "feeling", "folder": "x"}, "has no folder"),
        ({"min_history": 9, "max_history": 8}, "max_history = 8 must be >= min_history = 9"),
        ({"user": 3}, "did you mean 'users'?"),
    ):
        with pytest.raises(ValidationError) as raised:
            TaskConfig(**values)  # type: ignore[arg-type]
        assert told in str(raised.value)


@given(st.integers(1, 500))
def test_a_history_has_as_many_items_as_were_asked_for(history: int) -> None:
    for up, bound in ((True, history.__le__), (False, history.__ge__)):
        items = _with_held_out(history, up=up)
        assert bound(items - min(items - 1, max(1, round(0.25 * items)))) or history < 2


def test_tasks_load_no_model_library() -> None:
    probe = "import sys, florilegium.simulation.tasks.config\n"
    probe += "print(sorted({'torch', 'flwr', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# What is made of populations


def test_stand_ins_say_what_nano_has_seen() -> None:
    seen = {name for name, stand_in in STAND_INS.items() if stand_in.seen_by_nano}
    assert seen == {"talk-topic", "talk-rest", "help-reply", "slots"}
    assert not any(name.startswith("lamp") for name in STAND_INS)


@pytest.fixture(scope="module")
def loaded() -> Iterator[Callable[[str], tuple[Task, list[TaskUser], list[TaskUser]]]]:
    """Tasks of half of the conversations; each is made once."""
    with pytest.MonkeyPatch.context() as patch:
        for source in {stand_in.source for stand_in in STAND_INS.values()} & set(READERS):
            patch.setitem(READERS, source, cache(partial(some, READERS[source], 2)))
        yield cache(lambda name: load_task(TaskConfig(name=name, **FEW), 0))


def some(read: Callable[[], Iterable[Conversation]], of: int) -> list[Conversation]:
    """One in so many conversations."""
    return [talk for talk in read() if sum(map(ord, talk.id)) % of == 0]


@pytest.mark.parametrize("name", EVERY)
def test_no_history_holds_anything_of_a_query_or_later_than_one(name: str, loaded: Any) -> None:
    task, pool, users = loaded(name)
    assert len(users) == 6 and 1 <= len(pool) <= 8
    assert not {user.id for user in pool} & {user.id for user in users}
    for user in (*pool, *users):
        assert 1 <= len(user.history) <= 24 and 1 <= len(user.queries) <= 4
        assert list(user.history) == sorted(user.history, key=lambda item: item.time)
        assert user.history[-1].time <= min(query.time for query in user.queries)
        assert not {item.id for item in user.history} & {query.id for query in user.queries}
        texts = {plain(item.text) for item in user.history}
        for query in user.queries:
            if query.options:
                assert plain(query.options[task.labels.index(query.target)]) not in texts
            elif task.labels or name == "slots":
                assert plain(query.search) not in texts
            else:
                assert plain(query.target) not in {plain(item.target) for item in user.history}


@pytest.mark.parametrize("name", EVERY)
def test_every_reply_is_of_the_closed_set_and_every_prompt_is_complete(name: str, loaded: Any) -> None:
    task, _, users = loaded(name)
    for user in users:
        for query in user.queries:
            assert query.target and (not task.labels or query.target in task.labels)
            assert task.question(query).prompt == query.input and query.search
        for item in user.history:
            assert task.example(item).prompt.strip() and task.example(item).response.strip()
            assert item.text in task.shown(item) and item.text in task.document(item)


@pytest.mark.parametrize("name", EVERY)
def test_nobody_in_the_pool_holds_a_conversation_of_those_who_are_reported_on(name: str, loaded: Any) -> None:
    _, pool, users = loaded(name)
    of = [{x.id.rpartition(":")[0] for u in group for x in (*u.history, *u.queries)} for group in (pool, users)]
    assert not of[0] & of[1]


@pytest.mark.parametrize("name", ["which-reply", "reply-length", pytest.param("feeling", marks=needs_folder)])
def test_the_order_of_a_file_does_not_matter_and_the_seed_does(
    name: str, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, source = TaskConfig(name=name, **FEW), STAND_INS[name].source
    backwards = READERS[source]()[::-1]  # type: ignore[index]
    monkeypatch.setitem(READERS, source, lambda: backwards)
    assert load_task(config, 0) == loaded(name)
    assert load_task(config, 1)[2] != loaded(name)[2]


def talker(identity: str, *replies: tuple[str, str]) -> User:
    """The last exchange is held out."""
    said = [Dialogue(f"{identity}{n}:1", prompt, reply, float(n)) for n, (prompt, reply) in enumerate(replies)]
    return User(identity, tuple(said[:-1]), tuple(said[-1:]))


def test_the_other_reply_is_of_somebody_else_to_a_prompt_of_the_same_kind() -> None:
    ana = talker("ana", ("Hi", "Hello!"), ("How are you?", "Splendid."))
    pool = [
        talker("bo", ("Where?", "Here"), ("How old?", "Ten"), ("Hm", "x")),
        talker("cy", ("So.", "Yes"), ("A", "b")),
    ]
    _, (user,) = of_options(STAND_INS["which-reply"].task, pool, [ana], 0)
    (query,) = user.queries
    assert set(query.options) == {"Splendid.", "Ten"}  # "How …?"
    assert query.options[int(query.target[1]) - 1] == "Splendid."
    assert f'[1]: "{query.options[0]}" [2]: "{query.options[1]}"' in query.input and '"How are you?"' in query.input
    assert user.history[0] == Item("ana0:1", "Hello!", time=0.0, title="Hi")


def test_no_two_of_four_replies_have_the_same_words() -> None:
    """Bo's "ten" to the question of its kind comes first, then replies to others, of which "TEN" counts no more."""
    ana = talker("ana", ("Hi", "Hello!"), ("How are you?", "Splendid."))
    pool = [talker("bo", ("How old?", "ten"), ("So.", "TEN"), ("Hm.", "no"), ("Ah.", "well"), ("!", "x"))]
    _, (user,) = of_options(STAND_INS["which-of-4"].task, pool, [ana], 0)
    (query,) = user.queries
    assert sorted(query.options) == ["Splendid.", "no", "ten", "well"]
    assert query.options["abcd".index(query.target[1])] == "Splendid." and f'(d): "{query.options[3]}"' in query.input
    with pytest.raises(DataError, match="a choice of 4 replies needs those of others in the pool; raise pool_users"):
        of_options(STAND_INS["which-of-4"].task, [talker("bo", ("Hm", "no"), ("!", "x"))], [ana], 0)


def test_cuts_of_lengths_are_of_the_pools_histories_alone() -> None:
    """The pool's replies have 1 … 6 words, the fifths' ends 2, 3, 4, 5: six words are in the fifth fifth."""
    pool = [talker("bo", *[("?", "w " * n) for n in (1, 2, 3, 4, 5, 6)], ("?", "w " * 99))]
    for held_out, fifth in ((1, "1"), (2, "2"), (3, "3"), (4, "4"), (7, "5")):
        ana = talker("ana", ("?", "w"), ("?", "w " * held_out))
        _, (user,) = by_length(STAND_INS["reply-length"].task, pool, [ana], 0)
        assert user.queries[0].target == fifth


@given(st.integers(0, 50))
def test_dealt_users_hold_no_card_twice_and_like_some_domains_more(seed: int) -> None:
    cards = [Dialogue(f"c{n}:0", f"{n}", "x", domain="abcdef"[n % 6]) for n in range(600)]
    hands, data = dealt(cards, DataConfig(users=5, min_pairs=2, max_pairs=30), seed)
    held = [card.id for hand in hands.values() for card in hand]
    assert len(held) == len(set(held)) == 150 and data.split == "all"
    assert all(half_of(identity.rpartition(":")[0]) == "test" for identity in held)
    assert dealt(reversed(cards), DataConfig(users=5, min_pairs=2, max_pairs=30), seed)[0] == hands


def test_tastes_differ_between_hands() -> None:
    """Even tastes would give the commonest of six domains about 9 of 30 cards; here the mean is above 14."""
    cards = [Dialogue(f"c{n}:0", f"{n}", "x", domain="abcdef"[n % 6]) for n in range(6000)]
    hands, _ = dealt(cards, DataConfig(users=20, min_pairs=2, max_pairs=30), 0)
    most = [Counter(card.domain for card in hand).most_common(1)[0][1] for hand in hands.values()]
    assert sum(most) / len(most) > 14


def test_too_few_cards_or_people_are_told() -> None:
    cards = [Dialogue(f"c{n}:0", f"{n}", "x", domain="a") for n in range(30)]
    with pytest.raises(DataError, match=r"half of 'chitchat' gives each \d items, fewer than the 14"):
        dealt(cards, DataConfig(users=5, min_pairs=14), 0)
    with pytest.raises(DataError, match=r"users \+ pool_users = 3, but 0 users of the test half of 'chitchat' have 14"):
        people({"ana": tuple(cards[:13])}, DataConfig(users=3, min_pairs=14), 0, unique="prompt")


@given(st.lists(st.lists(st.text("ab", min_size=1, max_size=3), max_size=40), max_size=5))
def test_a_bounded_text_is_a_beginning_of_so_many_words(lines: list[list[str]]) -> None:
    text = "\n".join(" ".join(line) for line in lines)
    assert bounded(text).split() == text.split()[:MAX_WORDS]


def test_labels_are_those_of_the_data() -> None:
    assert len(EMOTIONS) == 32 and len(TOPIC_LABELS) == 17


def test_a_confirmation_gives_the_values_that_it_repeats() -> None:
    turns = [
        ["U", "A table in San Jose, for four, please."],
        ["S", "Your table is confirmed."],
        ["S", "Please confirm: a table for 4 people at Sino in San Jose at 6 pm today."],
        ["U", "No, at 7 pm."],
        ["S", "Please confirm: a table for 4 people at Sino in San Jose at 7 pm today."],
    ]
    found = {slot.slot: slot for slot in matches({"id": "d", "services": ["Restaurants_1"], "turns": turns})}
    assert {slot: found[slot].value for slot in found} == {
        "time": "6 pm",
        "date": "today",
        "number of people": "4",
        "city": "San Jose",
    }
    assert {slot for slot in found if said_before(found[slot])} == {"number of people", "city"}
    assert found["city"].context == "A table in San Jose, for four, please.\nYour table is confirmed."
    assert matches({"id": "d", "services": ["Weather_1"], "turns": turns}) == []
    twice = replace_turn(turns, "Please confirm: a table at 6 pm or 7 pm in San Jose.")
    assert [slot.slot for slot in matches({"id": "d", "services": ["Restaurants_1"], "turns": twice})] == ["city"]


def replace_turn(turns: list[list[str]], said: str) -> list[list[str]]:
    return [turns[0], ["S", said]]


def test_what_a_task_is_told_as_is_the_same_in_every_process() -> None:
    """A study that goes on compares whom it is about by it: no address of memory is in it."""
    assert " at 0x" not in repr([made.task for made in STAND_INS.values()])
