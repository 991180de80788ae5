"""Benchmarks by files of the form of the official ones: what is read, what a question sees, what is refused."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.population import half_of
from florilegium.simulation.tasks.benchmarks import BENCHMARKS
from florilegium.simulation.tasks.config import TaskConfig, load_task
from florilegium.simulation.tasks.longlamp import KINDS, load_longlamp
from florilegium.simulation.tasks.metrics import measure
from florilegium.simulation.tasks.official import split_users
from florilegium.simulation.tasks.peft_u import load_peft_u
from florilegium.simulation.tasks.personamem import ASKED, TASK, load_version_1, load_version_2
from florilegium.simulation.tasks.task import Item, TaskUser

Rows = list[dict[str, Any]]


def table(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def only_these(name: str, told: str, **values: Any) -> None:
    """The settings are refused with these words."""
    with pytest.raises(ValidationError) as raised:
        TaskConfig(name=name, **values)
    assert told in str(raised.value)


# PersonaMem

CHAT = [
    {"role": "system", "content": "Current user persona: Ana paints."},
    {"role": "user", "content": "User: I paint."},
    {"role": "user", "content": "User: Since May."},
    {"role": "assistant", "content": "Assistant: Lovely."},
    {"role": "user", "content": "User: I gave up painting."},
    {"role": "assistant", "content": "Assistant: Oh no."},
]


def question(identity: str, end: int, right: str = "(b)", person: str = "7", context: str = "c1") -> dict[str, Any]:
    options = ['(a) It\'s "yes"', "(b) No"]
    return {
        "persona_id": person,
        "question_id": identity,
        "user_question_or_message": "Do I paint?",
        "correct_answer": right,
        "all_options": repr(options),
        "shared_context_id": context,
        "end_index_in_shared_context": end,
    }


def version_1(folder: Path, questions: Rows, contexts: dict[str, Any] | None = None) -> Path:
    table(folder / "questions_32k.csv", questions)
    lines = [json.dumps({key: said}) for key, said in (contexts or {"c1": CHAT}).items()]
    (folder / "shared_contexts_32k.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_each_question_sees_only_the_messages_before_it(tmp_path: Path) -> None:
    """Two questions after the first four messages, one after all six; after five, what is said has no reply yet."""
    asked = [question("q3", 6), question("q1", 4), question("q2", 4), question("q4", 5)]
    early, middle, late = load_version_1(version_1(tmp_path, asked), "32k")
    painting = Item(
        "c1:1", "User: I paint.\nUser: Since May.\nAssistant: Lovely.", time=1.0, title="I paint.\nSince May."
    )
    assert early.history == (painting,) and [q.id for q in early.queries] == ["q1", "q2"]
    assert [item.text for item in middle.history] == [painting.text, "User: I gave up painting."]
    assert [item.title for item in late.history] == ["I paint.\nSince May.", "I gave up painting."]
    assert late.history[1].text.endswith("Assistant: Oh no.") and "persona" not in str(late.history)
    assert (early.id, early.person, late.person) == ("7:c1:4", "7", "7")
    assert all(
        item.time < query.time for user in (early, middle, late) for item in user.history for query in user.queries
    )


def test_a_question_stands_in_the_words_of_its_authors(tmp_path: Path) -> None:
    (user,) = load_version_1(version_1(tmp_path, [question("q1", 4)]), "32k")
    (query,) = user.queries
    assert query.input == f"Do I paint?\n\n{ASKED}\n\n" + repr(['(a) It\'s "yes"', "(b) No"])
    assert (query.target, query.search, query.options) == ("(b)", "Do I paint?", ('It\'s "yes"', "No"))
    shown = [TASK.shown(item) for item in user.history * 2]
    assert TASK.with_items("Do I paint?", shown) == f"{shown[0]}\n{shown[0]}\n\nDo I paint?"
    assert TASK.example(user.history[0]).response == TASK.document(user.history[0]) == user.history[0].text
    assert TASK.written(user.history[0]) == "I paint.\nSince May." and not TASK.search(user.history[0])


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("(b)", 1),
        ("I think (a), no: <final_answer> (b)", 1),
        ("<final_answer>B</final_answer>", 1),
        ("(b) or (c)", 0),
        ("<final_answer>(a)", 0),
        ("The answer: b.", 1),
        ("A dog, b", 0),  # two letters that stand alone
        ("(b) a", 1),  # letters in brackets come first
        ("", 0),
    ],
)
def test_a_choice_is_read_as_the_authors_read_it(reply: str, right: int) -> None:
    assert measure("choice accuracy", [[(reply, "(b)")]]).pooled == right


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"end_index_in_shared_context": 7},
            "line 2: end_index_in_shared_context = '7' must be a whole number up to the 6",
        ),
        ({"end_index_in_shared_context": "-1"}, "'-1' must be a whole number"),
        ({"shared_context_id": "c2"}, "shared_contexts_32k.jsonl has no context 'c2'"),
        ({"correct_answer": "(c)"}, "correct_answer = '(c)' must be one of all_options"),
        ({"all_options": "(a) x"}, "all_options = '(a) x' must be a list"),
        ({"all_options": "['x', 'y']"}, "all_options holds 'x' where (a) was expected"),
        (
            {"all_options": "['(a) 1', '(b) 2', '(c) 3', '(d) 4', '(e) 5']"},
            "must be one of all_options, which are (a) to",
        ),
    ],
)
def test_a_broken_table_of_questions_is_named_with_its_line(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    version_1(tmp_path, [question("q1", 4) | change])
    with pytest.raises(DataError) as raised:
        load_version_1(tmp_path, "32k")
    assert told in str(raised.value) and "questions_32k.csv" in str(raised.value)


def test_an_unknown_role_is_told(tmp_path: Path) -> None:
    version_1(tmp_path, [question("q1", 1)], {"c1": [{"role": "tool", "content": "x"}]})
    with pytest.raises(DataError, match="c1, message 1: role = 'tool' must be user, assistant or system"):
        load_version_1(tmp_path, "32k")


def version_2(folder: Path, **change: Any) -> Path:
    row = {
        "persona_id": "7",
        "chat_history_32k_link": "data/chat_history_32k/seven.json",
        "user_query": "{'role': 'user', 'content': \"What's next?\"}",
        "correct_answer": "Paint.",
        "incorrect_answers": json.dumps(["Run.", "Sing.", "Cook."]),
    }
    table(folder / "benchmark" / "text" / "benchmark.csv", [row | change] * 8)
    history = folder / "data" / "chat_history_32k" / "seven.json"
    history.parent.mkdir(parents=True, exist_ok=True)
    history.write_text(json.dumps({"metadata": {}, "chat_history": CHAT}))
    return folder


def test_version_2_has_a_history_for_each_person_and_options_in_a_drawn_order(tmp_path: Path) -> None:
    (user,) = load_version_2(version_2(tmp_path), "32k", "test")
    assert user.person == "7" and len(user.history) == 2 and len(user.queries) == 8
    for query in user.queries:
        assert query.options[TASK.labels.index(query.target)] == "Paint." and len(set(query.options)) == 4
        assert query.input.startswith(f"What's next?\n\n{ASKED}\n\n(a) {query.options[0]}\n(b) ")
        assert query.search == "What's next?"
    assert len({query.target for query in user.queries}) > 1
    assert load_version_2(tmp_path, "32k", "test") == [user]  # the same order each time


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"incorrect_answers": "[]"}, "incorrect_answers, a list of one to three texts"),
        ({"user_query": "[]"}, "expected user_query = {'role', 'content'}"),
        ({"chat_history_32k_link": "../seven.json"}, "the history '../seven.json' lies outside the folder"),
        ({"chat_history_32k_link": "data/eight.json"}, "eight.json does not exist"),
    ],
)
def test_what_is_broken_in_version_2_is_told(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        load_version_2(version_2(tmp_path, **change), "32k", "test")
    assert told in str(raised.value)


def test_a_history_of_another_form_is_told(tmp_path: Path) -> None:
    version_2(tmp_path)
    (tmp_path / "data" / "chat_history_32k" / "seven.json").write_text('{"metadata": {}}')
    with pytest.raises(DataError, match=r"seven\.json: expected a list of objects"):
        load_version_2(tmp_path, "32k", "test")


def test_moments_of_one_person_are_all_tested_on_or_all_in_the_pool(tmp_path: Path) -> None:
    """Ana's longest history is the longest, so that both of hers are tested on; the third place is Bo's longer one.

    Bo's other moment is then in the pool for nobody.
    """

    def moment(person: str, items: int) -> TaskUser:
        return TaskUser(f"{person}:{items}", (Item("i", "x"),) * items, (), person)

    users = [moment("bo", 3), moment("ana", 9), moment("cy", 1), moment("ana", 1), moment("bo", 2)]
    pool, tested = split_users(users, 3)
    assert [user.id for user in tested] == ["ana:9", "ana:1", "bo:3"] and [user.id for user in pool] == ["cy:1"]

    persons = [person for person in map(str, range(30)) if half_of(person) == "test"][:3]
    asked = [question(f"{p}{end}", end, person=p, context=p) for p in persons for end in (4, 6)]
    version_1(tmp_path, asked, dict.fromkeys(persons, CHAT))
    config = TaskConfig(
        name="personamem:32k", folder=str(tmp_path), file="test", users=4, pool_users=9, min_history=1, max_history=1
    )
    task, others, found = load_task(config, 0)
    assert task.name == "personamem:32k" and [user.person for user in found] == [persons[0]] * 2 + [persons[1]] * 2
    assert {user.owner for user in others} == {persons[2]} and [len(user.history) for user in found] == [1] * 4


# PEFT-U


def labelled(*samples: str) -> dict[str, Any]:
    """Samples as "id:label" or "id:label+label"."""
    parts = (sample.partition(":") for sample in samples)
    return {identity: {"text": f"text {identity}", "label": labels.split("+")} for identity, _, labels in parts}


def person(train: Any, val: Any = None, test: Any = None) -> dict[str, Any]:
    return {"train": train, "val": val or {}, "test": test or {}}


def peft_u(folder: Path, **people: Any) -> Path:
    (folder / "user_data_no_leak.json").write_text(json.dumps(people))
    return folder


def test_a_person_has_labels_of_their_own_and_is_asked_of_the_part_that_was_named(tmp_path: Path) -> None:
    """Bo has no test part, cy no training part: they are left out there."""
    ana = person(labelled("1:yes", "2:no"), labelled("3:no"), labelled("4:yes"))
    peft_u(tmp_path, ana=ana, bo=person(labelled("1:no"), labelled("3:yes")), cy=person({}, None, labelled("4:no")))
    task, users = load_peft_u(tmp_path, "test")
    (user,) = users
    assert user.history == (Item("1", "text 1", "yes", 0.0), Item("2", "text 2", "no", 1.0))
    assert [(q.id, q.target, q.search, q.time) for q in user.queries] == [("4", "yes", "text 4", 2.0)]
    assert user.queries[0].input == task.asked.format(text="text 4") and task.labels == ("no", "yes")
    assert task.metrics == ("accuracy", "f1") and task.example(user.history[0]).response == "yes"
    assert [user.id for user in load_peft_u(tmp_path, "dev")[1]] == ["ana", "bo"]


def test_of_several_labels_one_that_is_right_will_do(tmp_path: Path) -> None:
    peft_u(tmp_path, ana=person(labelled("1:joy+fear"), None, labelled("2:fear")))
    task, (user,) = load_peft_u(tmp_path, "test")
    assert task.metrics == ("label accuracy",) and user.history[0].target == "joy, fear" and task.labels == ()
    replies = [("fear, anger", "joy, fear"), ("anger", "joy, fear"), ("", "joy"), ("joy", "joy, fear")]
    assert measure("label accuracy", [replies]).by_query == (1, 0, 0, 1)


@pytest.mark.parametrize(
    ("people", "told"),
    [
        ({"ana": person(labelled("1:a")), "bo": person({}, {}, labelled("1:b"))}, "text '1' is asked about and stands"),
        ({"ana": person({"1": {"text": "x", "label": "a"}})}, "user 'ana', train, '1': label = 'a' must be a list"),
        ({"ana": person({"1": {"label": ["a"]}})}, "user 'ana', train, '1': text = None must be a text"),
        ({"ana": person([])}, "user 'ana', train: expected an object, found []"),
        ({"ana": []}, "user 'ana': expected an object, found []"),
    ],
)
def test_what_is_broken_in_peft_u_is_told(people: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        load_peft_u(peft_u(tmp_path, **people), "test")
    assert told in str(raised.value) and "user_data_no_leak.json" in str(raised.value)


# LongLaMP

PROFILES: dict[str, tuple[str, dict[str, Any], Item, str, str]] = {
    "abstract": (
        "name",
        {"id": "9", "title": "T", "abstract": "A", "year": 2014},
        Item("9", "T", "A", 1388534400.0),
        '"A" is the abstract for the title "T". Use the above abstracts as context to understand the style and '
        "language of the user and, Q",
        'Generate an abstract for the title "T"',
    ),
    "review": (
        "reviewerId",
        {"overall": "5.0", "description": "D {x}", "summary": "S", "reviewText": "R"},
        Item("", '"5.0" is a rating for the product with description "D {x}"', "R", title="S"),
        '"5.0" is a rating for the product with description "D {x}". "S" is summary for "R" . Following the given '
        "patterns Q",
        'Generate the review text: "5.0" is a rating for the product with description "D {x}". The summary of the '
        'review text is "S".',
    ),
    "topic": (
        "author",
        {"id": "9", "summary": "S", "content": "C", "author": "ana"},
        Item("9", "S", "C"),
        '"S" is a summary for "C" . Following the given patterns Q',
        "Generate the content for a reddit post S",
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_task_of_longlamp_is_read_from_its_own_fields(name: str, tmp_path: Path) -> None:
    whose, fields, expected, prompt, practised = PROFILES[name]
    row = {whose: "ana", "input": "Write using the following items: 1. x", "output": "O", "profile": [fields]}
    (tmp_path / "val.jsonl").write_text(json.dumps(row))
    (user,) = load_longlamp(tmp_path, name, "dev")
    (item,) = user.history
    task = KINDS[name].task
    assert (user.id, item) == ("ana", replace(expected, id=item.id)) and expected.id in ("", item.id)
    assert task.with_items("Q", [task.shown(item)]) == prompt
    assert (task.example(item).prompt, task.example(item).response) == (practised, expected.target)
    (query,) = user.queries
    assert (query.id, query.input, query.target) == ("val:0", row["input"], "O")
    assert query.search == ("1. x" if name == "abstract" else row["input"])
    assert expected.target in task.document(item) and expected.target not in task.search(item)


def topics(folder: Path, *rows: tuple[str, str, list[str]]) -> Path:
    """Rows of who, what is to be written, and what was written before."""
    parquet = pytest.importorskip("pyarrow.parquet")
    for n, (who, output, before) in enumerate(rows):
        profile = [{"author": who, "id": text, "summary": "s", "content": text} for text in before]
        found = [{"author": who, "input": "Write", "output": output, "profile": profile}]
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(found), folder / f"test-{n:05d}.parquet")
    return folder


def test_a_history_is_what_all_questions_know_and_nothing_that_one_of_them_asks_for(tmp_path: Path) -> None:
    """Ana's second question knows the answer to her first, and "later", which may be later than the first."""
    topics(
        tmp_path, ("ana", "First!", ["a", "b"]), ("bo", "x", ["c"]), ("ana", "second", ["a", "b", "first!", "later"])
    )
    ana, bo = load_longlamp(tmp_path, "topic", "test")
    assert [item.target for item in ana.history] == ["a", "b"] and [item.target for item in bo.history] == ["c"]
    assert [query.id for query in ana.queries] == ["test:0", "test:2"]
    (tmp_path / "again").mkdir()
    (user,) = load_longlamp(topics(tmp_path / "again", ("cy", "First!", ["a", "first!"])), "topic", "test")
    assert [item.target for item in user.history] == ["a"]


def test_what_is_broken_in_longlamp_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds neither val-\*\.parquet nor val\.jsonl"):
        load_longlamp(tmp_path, "topic", "dev")
    item = {"title": "T", "abstract": "A"}
    row = {"name": "ana", "input": "x", "output": "y", "profile": [item, {**item, "year": 2000}]}
    (tmp_path / "val.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"val\.jsonl, line 1: some items of its profile have a year"):
        load_longlamp(tmp_path, "abstract", "dev")
    (tmp_path / "val.jsonl").write_text(json.dumps({**row, "reviewerId": "ana", "profile": [item]}))
    with pytest.raises(DataError, match="line 1, item 1: overall = None must be a text or a number"):
        load_longlamp(tmp_path, "review", "dev")


def test_a_benchmark_needs_a_folder_and_a_file_that_it_has() -> None:
    assert {name.partition(":")[0] for name in BENCHMARKS} == {
        "lamp",
        "longlamp",
        "peft-u",
        "personamem",
        "personamem-v2",
    }
    only_these("personamem:32k", "has no file = 'dev'; set it to test", folder="x")
    only_these("personamem:32k", "needs folder", file="test")
    only_these("peft-u", "has no file = 'train'; set it to dev or test", folder="x", file="train")
    only_these("personamem:64k", "did you mean 'personamem:")
