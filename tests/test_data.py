"""Data: what is read, whose replies become whose stream, and what a reader is told when a file is wrong."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import subprocess
import sys
from datetime import date
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import SMALL
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console
from typer.testing import CliRunner

import florilegium
from florilegium.client.dialogue import Dialogue
from florilegium.simulation.cli.main import app
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.data import conversations, hub
from florilegium.simulation.data.conversations import READERS, Conversation, Turn, merge_turns, read_chitchat
from florilegium.simulation.data.describe import describe, names, quantiles, render
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.formats.reading import FieldNames, Reading
from florilegium.simulation.data.hub import HubFields, read_hub
from florilegium.simulation.data.jsonl import moment, read_jsonl, seconds
from florilegium.simulation.data.population import (
    DataConfig,
    Order,
    Replies,
    arrange,
    collect,
    draw,
    half_of,
    load_population,
    streams,
)
from florilegium.simulation.devices.people import UsersByDevice
from florilegium.simulation.recorder import people
from florilegium.simulation.settings import ConfigError, data_config

needs_folder = pytest.mark.skipif(
    not os.environ.get("FLORILEGIUM_DATA"), reason="FLORILEGIUM_DATA is unset; set it to the folder of .jsonl.xz files"
)
NO_FEWER = {"users": 1, "min_pairs": 2, "max_pairs": 100, "queries_per_user": 100}


def line(user: str, time: float | str | None, prompt: str, response: str, **more: str) -> str:
    row = {"user": user, "prompt": prompt, "response": response, **more}
    return json.dumps(row if time is None else {**row, "time": time})


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def replies_of(**said: int) -> Replies:
    """Users who said so many things, at times 0, 1, 2, …"""
    return Replies(
        {user: tuple(Dialogue(f"{user}:{i}:1", "hm?", f"{i}", float(i)) for i in range(n)) for user, n in said.items()},
        anonymous=False,
        empty=0,
        repeated=0,
    )


def nameless(conversations: int, pairs: int = 1) -> Replies:
    said = tuple(Dialogue(f"c{c}:{2 * i + 1}", f"{c}", f"{i}") for c in range(conversations) for i in range(pairs))
    return Replies({"": said}, anonymous=True, empty=0, repeated=0)


# The project's own schema


def test_a_line_becomes_a_prompt_and_the_users_reply(tmp_path: Path) -> None:
    path = write(tmp_path / "talks.jsonl", line("ana", 5, "Tea?", "Green, please.", domain="kitchen"))
    (talk,) = read_jsonl(path)
    assert talk == Conversation(
        "talks.jsonl:1", (Turn("", "Tea?", 5.0), Turn("ana", "Green, please.", 5.0)), "kitchen", replies_by=None
    )


@pytest.mark.parametrize(("ending", "opener"), [(".jsonl", open), (".jsonl.gz", gzip.open), (".jsonl.xz", lzma.open)])
def test_plain_and_compressed_files_read_alike(tmp_path: Path, ending: str, opener: Any) -> None:
    path = tmp_path / f"talks{ending}"
    with opener(path, "wt", encoding="utf-8") as out:
        out.write(line("ana", 1, "Tea?", "Grün 🍵") + "\n\n" + line("ana", 2, "More?", "No.") + "\n")
    assert [talk.turns[1].text for talk in read_jsonl(path)] == ["Grün 🍵", "No."]
    assert [talk.id for talk in read_jsonl(path)] == [f"talks{ending}:1", f"talks{ending}:3"]


def test_times_are_seconds_or_iso_8601() -> None:
    assert seconds(86_400) == 86_400.0
    assert seconds("1970-01-02") == 86_400.0
    assert seconds("1970-01-02T01:00:00+01:00") == 86_400.0
    assert seconds("1970-01-02T00:00:00Z") == 86_400.0
    for wrong in ("yesterday", None, True, float("nan"), float("inf")):
        with pytest.raises(ValueError):
            seconds(wrong)


def test_a_moment_is_a_number_or_a_day_as_it_is_written() -> None:
    assert moment(1_772_389_200_000, "") == moment("1772389200", "") == 1_772_389_200.0
    assert moment("20240501", "") == seconds("2024-05-01") and moment("20249901", "") == 20_249_901.0
    with pytest.raises(DataError, match="line 3: time = 'noon' must be seconds or milliseconds"):
        moment("noon", "line 3")


def test_without_times_the_order_of_the_lines_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", line("ana", None, "1", "b"), line("ana", None, "2", "a"))
    assert [reply.response for reply in collect(DataConfig(name=str(path))).by_user["ana"]] == ["b", "a"]


def test_lines_of_the_same_time_stay_in_the_order_of_the_file(tmp_path: Path) -> None:
    said = [f"{i}" for i in range(12)]
    for times in (["2024-05-01"] * 12, ["2024-05-01T09:00"] * 11 + ["2024-05-01T09:01"], [None] * 12):
        path = write(tmp_path / "x.jsonl", *(line("ana", t, "?", i) for t, i in zip(times, said, strict=True)))
        assert [r.response for r in collect(DataConfig(name=str(path))).by_user["ana"]] == said


def test_what_is_said_twice_without_times_counts_once(tmp_path: Path) -> None:
    lines = [line("ana", None, f"{i}?", "Yes.") for i in range(8)] + [line("bo", None, "0?", "Yes.")]
    path = write(tmp_path / "x.jsonl", *lines, *lines)
    replies = collect(DataConfig(name=str(path)))
    assert replies.repeated == 9
    assert [(r.prompt, r.time) for r in replies.by_user["ana"]] == [(f"{i}?", float(i)) for i in range(8)]
    assert len(replies.by_user["bo"]) == 1


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ('{"user": "ana", "prompt"', "expected one JSON object"),
        ('["ana", "Tea?"]', "expected one JSON object"),
        ('{"user": "ana", "prompt": "Tea?"}', "'response' is missing"),
        ('{"user": "ana", "prompt": "Tea?", "respnse": "Yes."}', "unknown key 'respnse'; did you mean 'response'?"),
        ('{"user": "ana", "prompt": "Tea?", "response": "Yes.", "zz": 1}', "known keys: user, time, prompt"),
        (
            '{"user": "", "prompt": "Tea?", "response": "Yes."}',
            "user = '' must be a text that is not empty, or",
        ),
        ('{"user": "ana", "prompt": 3, "response": "Yes."}', "prompt = 3 must be a text"),
        ('{"user": "ana", "time": "noon", "prompt": "Tea?", "response": "Yes."}', "time = 'noon' must be seconds"),
        ('{"user": "ana", "prompt": "Tea?", "response": "Yes."}', "has no time, but the lines before do"),
    ],
)
def test_a_broken_line_is_named_with_its_file_and_number(tmp_path: Path, broken: str, told: str) -> None:
    path = write(tmp_path / "talks.jsonl", line("ana", 1, "Tea?", "Yes."), line("ana", 2, "More?", "No."), broken)
    with pytest.raises(DataError) as raised:
        list(read_jsonl(path))
    assert "talks.jsonl, line 3: " in str(raised.value)
    assert told in str(raised.value)


def test_who_only_sent_pictures_is_left_out_and_counted(tmp_path: Path) -> None:
    picture = json.dumps({"user": "cy", "time": 4, "prompt": "Tea?", "response": None})
    lines = [line("ana", 1, "Tea?", "Yes."), line("bo", 2, "Tea?", " "), line("bo", 3, "", "No"), picture]
    path = write(tmp_path / "x.jsonl", *lines)
    replies = collect(DataConfig(name=str(path)))
    assert (list(replies.by_user), replies.empty, replies.silent) == (["ana"], 3, 2)
    assert "3 empty pairs (2 users have no others), 0 recorded twice" in shown(DataConfig(name=str(path)))


def test_half_a_character_leaves_a_dialogue_out_and_is_counted(tmp_path: Path) -> None:
    """In a prompt, a reply, a domain or a name: the others of the same user are kept."""
    half = {"user": "ana", "time": 1, "prompt": "Tea?", "response": "Yes.", "domain": "d"}
    lines = [json.dumps({**half, key: "a \ud83d"}) for key in ("user", "prompt", "response", "domain")]
    lines += [json.dumps({**half, "user": "bo", "response": "\udc00"}), json.dumps({**half, "prompt": "😀?"})]
    path = write(tmp_path / "x.jsonl", *lines)
    replies = collect(DataConfig(name=str(path)))
    assert [d.prompt for d in replies.by_user["ana"]] == ["😀?"] and list(replies.by_user) == ["ana"]
    assert (replies.broken, replies.silent, replies.empty) == (5, 2, 0)
    assert "0 recorded twice, 5 with half a character" in shown(DataConfig(name=str(path)))


# Other files


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "p", "completion": "r"}, "unknown key 'completion'; it is called 'response' here"),
        ({"user": "u", "question": "p", "answer": "r"}, "unknown key 'question'; it is called 'prompt' here"),
        ({"author": "u", "prompt": "p", "response": "r"}, "unknown key 'author'; it is called 'user' here"),
        ({"user": "u", "prompt": "p", "response": "r", "timestamp": 1}, "'timestamp'; it is called 'time' here"),
        ({"instruction": "i", "input": "", "output": "o"}, "Alpaca's instruction and input, one after the other"),
        (
            {"messages": [{"role": "user", "content": "p"}]},
            "'messages'; OpenAI's chats are read where",
        ),
        ({"id": 1, "prompt": "p", "response": "r"}, "unknown key 'id'; leave it out; known keys: user, time"),
        ({"id": 1, "conversations": []}, "'conversations'; ShareGPT's chats are read where"),
        ({"chosen": "a", "rejected": "b"}, "'chosen'; preferences are read where the first line has 'chosen' and"),
        ({"prompt": "p", "Response": "r"}, "unknown key 'Response'; it is called 'response' here"),
        ({"prompt": "p", "response": "r"}, "'user' is missing. .* give lines that are to be on one device the same"),
    ],
)
def test_what_other_formats_call_a_key_is_known(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=rf"x\.jsonl, line 1: .*{told}"):
        list(read_jsonl(write(tmp_path / "x.jsonl", json.dumps(row))))


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ('{"user": "u", "prompt": "p", "response": "r", "time": 1' + "0" * 400 + "}", "time = 10000.* must be seconds"),
        ('{"user": "u", "prompt": "p", "response": "r", "time": 1' + "0" * 5000 + "}", "expected one JSON object"),
        ('{"user": "u", "prompt": "p", "response": "r", "time": NaN}', "time = nan must be seconds"),
        ('{"user": "u", "prompt": "p", "response": "r", "time": 1e17}', "time = 1e.17 must be seconds or milliseconds"),
        ('{"user": "u", "response": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"user": "u", "prompt": "p", "response": [{"role": 1}]}', r"response = \[\{'role': 1\}\] must be a text"),
        ('{"user": ["u"], "prompt": "p", "response": "r"}', r"user = \['u'\] must be a text or an integer"),
        ("user,prompt,response", "found 'user,prompt,response'.* write one JSON object a line"),
        ("[", "a JSON array is not read: write one JSON object a line"),
        ("{", "JSON over several lines is not read: write one JSON object a line"),
    ],
    ids=range(10),
)  # fmt: skip
def test_whatever_stands_in_a_line_its_file_and_number_are_told(tmp_path: Path, broken: str, told: str) -> None:
    path = write(tmp_path / "x.jsonl", "", "", broken)
    with pytest.raises(DataError, match=rf"x\.jsonl, line 3: .*{told}") as raised:
        list(read_jsonl(path))
    assert len(str(raised.value)) < 400 + len(str(path))


@pytest.mark.parametrize(("encoding", "told"), [("latin-1", "line 2: byte 61 is not UTF-8"), ("utf-16", "in UTF-16")])
def test_other_encodings_are_told_with_their_line(tmp_path: Path, encoding: str, told: str) -> None:
    text = line("ana", 1, "Tea?", "Yes.") + '\r\n{"user": "ana", "time": 2, "prompt": "Tea?", "response": "Grün"}\r\n'
    path = tmp_path / "x.jsonl"
    path.write_bytes(text.encode("utf-8-sig"))
    assert [talk.turns[1].text for talk in read_jsonl(path)] == ["Yes.", "Grün"]
    path.write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match=told):
        list(read_jsonl(path))


def test_a_file_is_known_by_what_is_in_it_and_not_by_its_ending(tmp_path: Path) -> None:
    said = line("ana", 1, "Tea?", "Yes.")
    for name in ("X.JSONL", "x.ndjson", "x.json", "alpaca.json", "data"):
        found = collect(DataConfig(name=str(write(tmp_path / name, said))))
        assert [reply.response for reply in found.by_user["ana"]] == ["Yes."]
    (tmp_path / "export.json").write_bytes(gzip.compress(said.encode()))
    assert collect(DataConfig(name=str(tmp_path / "export.json"))).by_user.keys() == {"ana"}
    for start, told in ((b"PAR1rest", "pyarrow|as Parquet"), (b"PK\x03\x04", "as a zip archive")):
        (tmp_path / "table.parquet").write_bytes(start)
        with pytest.raises(DataError, match=rf"table\.parquet .*{told}"):
            collect(DataConfig(name=str(tmp_path / "table.parquet")))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("alpaca.json", "unknown data set 'alpaca.json'; there is no such file; name a file or a folder"),
        ("owner/talks", "unknown data set 'owner/talks'; there is no such file; .* or hub:owner/dataset"),
        ("Chitchat", r"did you mean 'chitchat'\?"),
        ("zzz", "known names: chitchat, self_dialogue"),
    ],
)
def test_a_name_that_is_no_data_set_is_told_what_it_lacks(name: str, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        DataConfig(name=name)


def test_files_that_are_missing_empty_or_cut_off_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl does not exist"):
        list(read_jsonl(tmp_path / "absent.jsonl"))
    with pytest.raises(DataError, match="holds no line"):
        list(read_jsonl(write(tmp_path / "empty.jsonl", "")))
    for name, compress in (("cut.jsonl.xz", lzma.compress), ("cut.jsonl.gz", gzip.compress)):
        (tmp_path / name).write_bytes(compress(line("ana", 1, "Tea?", "Yes.").encode())[:-9])
        with pytest.raises(DataError, match=rf"{name}, line \d cannot be read .* is the file whole"):
            list(read_jsonl(tmp_path / name))


# Conversations


def test_messages_of_one_speaker_are_joined_and_empty_ones_dropped() -> None:
    said = [Turn("a", "Hi", 1), Turn("a", " there ", 2), Turn("b", "  ", 3), Turn("a", "?", 4), Turn("b", "Hello", 5)]
    assert merge_turns(said) == (Turn("a", "Hi\nthere\n?", 1), Turn("b", "Hello", 5))


@given(st.lists(st.builds(Turn, st.sampled_from("ab"), st.text("x \n", max_size=3))))
def test_merging_alternates_speakers_and_merging_again_changes_nothing(said: list[Turn]) -> None:
    merged = merge_turns(said)
    assert all(a.speaker != b.speaker for a, b in pairwise(merged))
    assert all(turn.text.strip() for turn in merged)
    assert "".join(turn.text for turn in merged).count("x") == "".join(turn.text for turn in said).count("x")
    assert merge_turns(list(merged)) == merged


def known(monkeypatch: pytest.MonkeyPatch, *talks: Conversation) -> DataConfig:
    monkeypatch.setitem(READERS, "chitchat", lambda: iter(talks))
    return DataConfig(**NO_FEWER)


def test_every_reply_belongs_to_its_speaker(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Conversation("c", (Turn("ana", "Hi", 1), Turn("bo", "Hello", 2), Turn("ana", "Well?", 3)), "small")
    assert collect(known(monkeypatch, talk)).by_user == {
        "ana": (Dialogue("c:2", "Hello", "Well?", 3, "small"),),
        "bo": (Dialogue("c:1", "Hi", "Hello", 2, "small"),),
    }


def test_who_writes_both_sides_replies_to_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Conversation("c", (Turn("ana", "1"), Turn("ana", "2"), Turn("ana", "3")))
    assert [(r.prompt, r.response) for r in collect(known(monkeypatch, talk)).by_user["ana"]] == [
        ("1", "2"),
        ("2", "3"),
    ]


def test_only_the_speaker_that_replies_are_limited_to_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = (Turn("U", "Hi"), Turn("", "Hello"), Turn("U", "A table."), Turn("", "For two?"))
    replies = collect(known(monkeypatch, Conversation("c", turns, replies_by="")))
    assert replies.anonymous
    assert [r.id for r in replies.by_user[""]] == ["c:1", "c:3"]


def test_a_nameless_speaker_among_named_ones_is_no_user(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = collect(
        known(monkeypatch, Conversation("c", (Turn("ana", "Hi"), Turn("", "Hello"), Turn("ana", "Well?"))))
    )
    assert list(replies.by_user) == ["ana"]


def test_empty_replies_and_records_made_twice_are_counted(tmp_path: Path) -> None:
    lines = [line("ana", 1, "Tea?", "Yes."), line("ana", 1, "Tea?", "Yes."), line("ana", 2, "Tea?", "Yes.")]
    path = write(tmp_path / "x.jsonl", *lines, line("ana", 3, "Tea?", " "), line("ana", 4, "", "Hm."))
    replies = collect(DataConfig(name=str(path)))
    assert (replies.empty, replies.repeated) == (2, 1)
    assert [r.time for r in replies.by_user["ana"]] == [1, 2]


def test_replies_stand_in_time_order_and_ties_in_that_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    long = Conversation("b", tuple(Turn("ana", f"{i}", 7) for i in range(12)))
    early, tied = (Conversation(name, (Turn("bo", "?", 1), Turn("ana", "!", t))) for name, t in (("z", 3), ("a", 7)))
    said = collect(known(monkeypatch, long, early, tied)).by_user["ana"]
    assert [r.id for r in said] == ["z:1", *(f"b:{i}" for i in range(1, 12)), "a:1"]


def test_clocks_of_a_channel_run_forward_from_the_files_date() -> None:
    day = 1_118_016_000.0  # 2005-06-06T00:00:00Z
    channel = [{"file": "2005-06-06.train-c", "t": t} for t in ("11:58", "11:58", "01:02", "11:00", "00:05")]
    times = [time - day for time in conversations._times(channel)]
    assert times == [43_080, 43_080, 46_920, 82_800, 86_700]  # 11:58, 11:58, 13:02, 23:00, 24:05
    assert list(conversations._times([{"file": "channel-two.all", "t": "01:00"}])) == [3600]


# Populations


def test_the_last_quarter_of_each_user_is_held_out() -> None:
    user = next(f"u{i}" for i in range(9) if half_of(f"u{i}") == "test")
    (only,) = draw(replies_of(**{user: 12}), DataConfig(users=1, min_pairs=12, queries_per_user=2), seed=0)
    assert [r.time for r in only.stream] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert [r.time for r in only.held_out] == [9, 10]


def test_the_first_pairs_in_time_are_kept_and_short_users_left_out() -> None:
    ids = [f"u{i}" for i in range(40) if half_of(f"u{i}") == "test"][:3]
    replies = replies_of(**dict(zip(ids, (3, 4, 30), strict=True)))
    kept = streams(replies, DataConfig(min_pairs=4, max_pairs=10), seed=0)
    assert {user: [r.time for r in said] for user, said in kept.items()} == {
        ids[1]: [0, 1, 2, 3],
        ids[2]: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    }


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(1, 20))
def test_stream_and_held_out_part_are_never_empty_and_never_mix(n: int, share: float, queries: int) -> None:
    config = DataConfig(
        users=1, split=half_of("ana"), min_pairs=2, max_pairs=50, held_out_share=share, queries_per_user=queries
    )
    (user,) = draw(replies_of(ana=n), config, seed=0)
    assert user.stream
    assert 1 <= len(user.held_out) <= queries
    assert [r.time for r in user.stream + user.held_out] == list(range(len(user.stream) + len(user.held_out)))
    assert len(user.stream) + len(user.held_out) <= min(n, 50)


def test_the_half_of_a_user_is_fixed_for_ever() -> None:
    assert half_of("ana") == "development"  # printf half:ana | sha256sum begins with 0a, which is even
    assert half_of("eve") == "test"  # printf half:eve | sha256sum begins with 59, which is odd


@given(st.sets(st.text("abc", min_size=1, max_size=4), min_size=1), st.integers(0, 2**31), st.integers(0, 2**31))
def test_development_users_are_never_test_users(users: set[str], seed: int, other: int) -> None:
    replies = replies_of(**dict.fromkeys(users, 3))
    config = DataConfig(min_pairs=3, max_pairs=3)
    development = streams(replies, config.model_copy(update={"split": "development"}), seed)
    test = streams(replies, config, other)
    assert not set(development) & set(test)
    assert set(development) | set(test) == users


@given(st.integers(0, 2**31), st.integers(1, 10))
def test_a_smaller_draw_is_the_start_of_a_larger_one(seed: int, k: int) -> None:
    replies = replies_of(**{f"u{i}": 4 for i in range(60)})
    larger = draw(replies, DataConfig(users=10, min_pairs=4), seed)
    assert draw(replies, DataConfig(users=k, min_pairs=4), seed) == larger[:k]


def test_the_order_of_lines_does_not_matter_but_the_seed_does(tmp_path: Path) -> None:
    lines = [line(f"u{i}", t, "?", f"{t}") for i in range(30) for t in range(4)]
    forward, backward = tmp_path / "forward", tmp_path / "backward"
    drawn = []
    for folder, ordered in ((forward, lines), (backward, lines[::-1])):
        folder.mkdir()
        name = str(write(folder / "x.jsonl", *ordered))
        config = DataConfig(name=name, users=5, min_pairs=4)
        drawn.append([[(user.id, r.response) for r in user.stream] for user in load_population(config, seed=1)])
        assert {u.id for u in load_population(config, 1)} != {u.id for u in load_population(config, 2)}
    assert drawn[0] == drawn[1]


def test_too_few_users_are_counted_and_a_way_out_is_named() -> None:
    ids = [f"u{i}" for i in range(40) if half_of(f"u{i}") == "test"][:3]
    with pytest.raises(DataError) as raised:
        draw(replies_of(**dict.fromkeys(ids, 50)), DataConfig(users=4), seed=0)
    assert str(raised.value) == (
        "data.users = 4, but the test half of 'chitchat' has 3 users with min_pairs = 40 replies or more; "
        "set users <= 3, lower min_pairs, take a larger data set (3 users in both halves), or set bootstrap=true"
    )


def test_anonymous_replies_are_dealt_out_evenly_and_once() -> None:
    config = DataConfig(users=4, min_pairs=5)
    in_half = sum(half_of(f"c{c}") == "test" for c in range(50))
    dealt = streams(nameless(50), config, seed=3)
    assert list(dealt) == ["test-00000", "test-00001", "test-00002", "test-00003"]
    assert max(map(len, dealt.values())) - min(map(len, dealt.values())) <= 1
    ids = [r.id for said in dealt.values() for r in said]
    assert len(ids) == len(set(ids)) == in_half
    assert [r.time for r in dealt["test-00000"]] == list(range(len(dealt["test-00000"])))
    assert dealt != streams(nameless(50), config, seed=4)


def of_domains(**counts: int) -> list[Dialogue]:
    return [Dialogue(f"{d}:{i}", "p", "r", domain=d) for d, n in counts.items() for i in range(n)]


def changes(stream: tuple[Dialogue, ...]) -> int:
    return sum(a.domain != b.domain for a, b in pairwise(stream))


@given(st.sampled_from(["recorded", "iid", "blocked", "sticky"]), st.floats(0, 1), st.integers(0, 2**31))
def test_every_order_has_the_same_dialogues_and_depends_on_the_seed_alone(order: Order, stay: float, seed: int) -> None:
    stream = of_domains(a=7, b=3, c=1)
    arranged = arrange(stream, order, stay, seed)
    assert sorted(d.id for d in arranged) == sorted(d.id for d in stream)
    assert arranged == arrange(stream, order, stay, seed)


def test_temporal_correlation_is_what_it_is_called() -> None:
    stream = of_domains(a=300, b=300, c=300)
    assert arrange(stream, "recorded", 0.5, 1) == tuple(stream)
    assert changes(arrange(stream, "blocked", 0.5, 1)) == 2
    assert changes(arrange(stream, "iid", 0.5, 1)) / 899 == pytest.approx(2 / 3, abs=0.06)
    for stay in (0.0, 0.5, 0.9):  # one that does not stay draws anew, and may draw the same domain
        found = changes(arrange(stream, "sticky", stay, 1)[:450])  # while no domain has run out
        assert found / 449 == pytest.approx((1 - stay) * 2 / 3, abs=0.08), stay


def test_one_domain_has_no_blocks() -> None:
    with pytest.raises(DataError, match="several domains"):
        arrange(of_domains(a=4), "blocked", 0.9, 0)
    assert len(arrange(of_domains(a=4), "iid", 0.9, 0)) == 4


def test_a_prompt_holds_as_many_turns_as_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Conversation("c", tuple(Turn("ab"[i % 2], f"turn {i}") for i in range(5)))
    config = known(monkeypatch, talk)
    for turns, prompts in ((1, ["turn 0", "turn 2"]), (3, ["turn 0", "turn 0\nturn 1\nturn 2"])):
        replies = collect(config.model_copy(update={"context_turns": turns}))
        assert [r.prompt for r in replies.by_user["b"]] == prompts
        assert [r.response for r in replies.by_user["b"]] == ["turn 1", "turn 3"]


def test_an_anonymous_conversation_lies_in_one_half() -> None:
    config = DataConfig(users=2, min_pairs=2)
    halves = [
        {r.prompt for said in streams(nameless(40, pairs=3), c, seed).values() for r in said}
        for c, seed in ((config, 0), (config.model_copy(update={"split": "development"}), 1))
    ]
    assert not halves[0] & halves[1]
    assert len(halves[0] | halves[1]) == 40


def test_too_few_anonymous_replies_are_counted_in_devices() -> None:
    with pytest.raises(DataError, match=r"replies for 2 devices of min_pairs = 10; set users <= 2"):
        draw(nameless(50), DataConfig(users=9, min_pairs=10), seed=0)


def test_the_config_refuses_what_cannot_be_meant() -> None:
    with pytest.raises(ValidationError, match=r"unknown data set 'chitchatt'; did you mean 'chitchat'\?"):
        DataConfig(name="chitchatt")
    with pytest.raises(ValidationError, match="max_pairs = 20 must be >= min_pairs = 40"):
        DataConfig(max_pairs=20)
    with pytest.raises(ValidationError, match=r"did you mean 'users' or hub_fields.user or fields.user\?"):
        DataConfig.model_validate({"user": 3})
    for accepted in ("x.jsonl", "x.jsonl.gz", "a/b.jsonl.xz", "hub:owner/talks", "dolly"):
        assert DataConfig(name=accepted).name == accepted


# The hub


class FakeTable(list[dict[str, Any]]):
    """Rows with the names of their columns, as `datasets` gives them."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0])


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> FakeTable:
    rows = FakeTable(
        {"who": "ana", "at": "1970-01-02", "asked": f"{i}?", "said": None if i == 1 else f"{i}!"} for i in range(3)
    )
    monkeypatch.setattr(hub, "_load", lambda dataset, fields: rows)
    return rows


def test_hub_rows_are_read_by_the_columns_named(table: FakeTable) -> None:
    fields = HubFields(user="who", time="at", prompt="asked", response="said")
    replies = collect(DataConfig(name="hub:owner/talks", hub_fields=fields))
    assert replies.by_user == {"ana": tuple(Dialogue(f"owner/talks:{i}:1", f"{i}?", f"{i}!", 86_400.0) for i in (0, 2))}
    assert (replies.anonymous, replies.empty) == (False, 1)


def test_a_hub_row_has_its_domain_and_comes_of_the_part_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the hub, and of the library that reads its files."""
    asked: list[Any] = []

    def load(*given: Any, **named: Any) -> FakeTable:
        asked.append((given, named))
        return FakeTable([{"prompt": "?", "response": "!", "topic": "films"}])

    def info(_: Any, dataset: str, **named: Any) -> None:
        asked.append((dataset, named["revision"]))

    offline = SimpleNamespace(OfflineModeIsEnabled=KeyError)
    modules = {
        "datasets": SimpleNamespace(load_dataset=load),
        "huggingface_hub": SimpleNamespace(HfApi=type("HfApi", (), {"dataset_info": info}), errors=offline),
    }
    monkeypatch.setattr(hub, "import_module", modules.__getitem__)
    (talk,) = read_hub("owner/talks", HubFields(domain="topic", subset="small", part="test", revision="v2"))
    assert talk.domain == "films"
    assert asked == [("owner/talks", "v2"), (("owner/talks", "small"), {"split": "test", "revision": "v2"})]


def test_a_hub_data_set_without_users_is_anonymous(table: FakeTable) -> None:
    replies = collect(DataConfig(name="hub:owner/talks", hub_fields=HubFields(prompt="asked", response="said")))
    assert replies.anonymous
    assert [(r.id, r.time) for r in replies.by_user[""]] == [("owner/talks:0:1", 0), ("owner/talks:2:1", 1)]


def test_many_rows_of_one_time_are_dealt_in_the_order_of_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = FakeTable({"at": "2024-05-01", "who": "ana", "asked": "?", "said": f"{i}"} for i in range(12))
    monkeypatch.setattr(hub, "_load", lambda dataset, fields: rows)
    fields = HubFields(user="who", time="at", prompt="asked", response="said")
    said = collect(DataConfig(name="hub:owner/talks", hub_fields=fields)).by_user["ana"]
    assert [r.response for r in said] == [f"{i}" for i in range(12)]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([{"role": "user", "content": "?"}], "a list"),
        ({"text": "?"}, "a group of text"),
        (b"?", "b'\\?', of the type bytes"),
        (float("nan"), "nan, of the type float"),
        (True, "True, of the type bool"),
    ],
)
@pytest.mark.parametrize("role", ["user", "prompt", "response", "domain"])
def test_a_column_that_holds_no_texts_is_named(
    monkeypatch: pytest.MonkeyPatch, role: str, value: Any, told: str
) -> None:
    row = {"user": "ana", "prompt": "?", "response": "!", "domain": "d"}
    monkeypatch.setattr(hub, "_load", lambda dataset, fields: FakeTable([row, row | {role: value}]))
    with pytest.raises(DataError, match=rf"row 1: column '{role}' \(hub_fields.{role}\) holds {told}"):
        list(read_hub("owner/talks", HubFields(user="user", domain="domain")))


def test_numbers_and_dates_of_a_column_are_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"id": 7, "prompt": date(2024, 5, 1), "response": 4.5, "day": date(1970, 1, 2)}
    monkeypatch.setattr(hub, "_load", lambda dataset, fields: FakeTable([row]))
    (talk,) = read_hub("owner/talks", HubFields(user="id", time="day"))
    assert talk.turns == (Turn("asker", "2024-05-01", 86_400.0), Turn("7", "4.5", 86_400.0))


def test_a_column_is_looked_for_by_what_other_data_sets_call_it(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"prompt": "?", "completion": "!", "kind": "k"}
    monkeypatch.setattr(hub, "_load", lambda dataset, fields: FakeTable([row]))
    with pytest.raises(DataError, match=r"no column 'response'; did you mean 'completion'\? set hub_fields.response"):
        list(read_hub("owner/talks", HubFields(domain="kind")))
    assert [talk.turns[1].text for talk in read_hub("owner/talks", HubFields())] == ["!"]


TURNS = [("user", "Tea?"), ("assistant", "Green."), ("user", "Sugar?"), ("assistant", "No.")]


@pytest.mark.parametrize(
    ("row", "read_as"),
    [
        ({"messages": [{"role": who, "content": what} for who, what in TURNS], "id": 3}, "OpenAI messages"),
        ({"conversations": [{"from": who, "value": what} for who, what in TURNS]}, "ShareGPT"),
        ({"chosen": [{"role": who, "content": what} for who, what in TURNS], "rejected": []}, "preference pairs"),
    ],
)
def test_rows_of_the_hub_are_recognised_as_those_of_files_are(
    monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], read_as: str
) -> None:
    monkeypatch.setattr(hub, "_load", lambda dataset, fields: FakeTable([row, row]))
    reading = Reading()
    replies = collect(DataConfig(name="hub:owner/talks"), reading)
    assert replies.anonymous and replies.repeated == 2
    assert [(r.id, r.prompt, r.response) for r in replies.by_user[""]] == [
        ("owner/talks:0:1", "Tea?", "Green."), ("owner/talks:0:3", "Sugar?", "No."),
    ]  # fmt: skip
    told = "replies are the assistant's; data.replies=user for the human's"
    assert reading.told() == f"read as {read_as}: 2 conversations, {told}"
    only = collect(DataConfig(name="hub:owner/talks", replies="user"))
    assert [r.response for r in only.by_user[""]] == ["Sugar?"]


def test_columns_of_the_hub_are_named_in_one_section(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"prompt": "Tea?", "response": "Green.", "author": "ana", "kind": "k"}
    monkeypatch.setattr(hub, "_load", lambda dataset, fields: FakeTable([row]))
    reading = Reading()
    assert collect(DataConfig(name="hub:a/b"), reading).anonymous
    assert reading.told().endswith("its column 'author' may name users; data.hub_fields.user=author for that")
    named = DataConfig(name="hub:a/b", fields=FieldNames(user="author"))
    assert list(collect(named).by_user) == ["ana"]
    for fields in ({"user": "autor"}, {"prompt": "q"}):
        with pytest.raises(DataError, match=rf"data.fields.{next(iter(fields))} = .* is none of its columns"):
            collect(DataConfig(name="hub:a/b", fields=FieldNames(**fields)))
    with pytest.raises(DataError, match=r"data.fields.user = 'author' beside data.hub_fields.domain"):
        collect(named.model_copy(update={"hub_fields": HubFields(domain="kind")}))


def test_what_a_file_was_taken_for_is_told_by_a_run_and_kept_in_its_folder(tmp_path: Path) -> None:
    """Ten chats, each of a system's turn, which is left out, and two replies of the assistant's."""
    turns = [{"from": who, "value": what} for who, what in [("system", "Be kind."), *TURNS]]
    chats = [{"conversations": [t | {"value": f"{t['value']} {n}"} for t in turns]} for n in range(10)]
    data = write(tmp_path / "chats.json", *map(json.dumps, chats))
    words = [f"data.name={data}", "data.split=all", "data.min_pairs=4", "data.users=3", "rounds=1", "name=run"]
    asked = [*SMALL, "evaluation.rouge_queries_per_user=0", *words]
    done = CliRunner().invoke(app, ["run", "quickstart", *asked, "--runs", str(tmp_path)])
    told = "read as ShareGPT: 10 conversations, replies are the assistant's; data.replies=user for the human's"
    left_out = f"10 × turn of the role 'system', first {data}, line 1, turn 1"
    assert f"data: {told}" in done.output.splitlines() and left_out in done.output
    assert json.loads((tmp_path / "run" / "inputs.json").read_text())["read"] == [told, left_out.partition(",")[0]]


def test_a_missing_hub_column_is_named(table: FakeTable) -> None:
    with pytest.raises(DataError, match=r"no column 'prompt'; it has who, at, asked, said; set hub_fields.prompt"):
        list(read_hub("owner/talks", HubFields()))
    with pytest.raises(DataError, match=r"no column 'aske'; did you mean 'asked'\?"):
        list(read_hub("owner/talks", HubFields(prompt="aske", response="said")))


def test_without_the_package_an_alternative_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'florilegium\[hub\]', or name a .jsonl file"):
        list(read_hub("owner/talks", HubFields()))


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    class Unreachable:
        def dataset_info(self, dataset: str, revision: str, timeout: float) -> None:
            asked.append(timeout)
            raise ConnectionError("no route to host")

    errors = SimpleNamespace(OfflineModeIsEnabled=type("OfflineModeIsEnabled", (ConnectionError,), {}))
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=Unreachable, errors=errors))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace())
    with pytest.raises(DataError, match=r"cannot be reached \(no route to host\).* name a .jsonl file"):
        list(read_hub("owner/talks", HubFields()))
    assert asked == [hub.ANSWER_WITHIN_S]


def test_offline_it_fails_at_once(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed; pip install 'florilegium[hub]'")
    program = (
        "from florilegium.simulation.data.hub import *\ntry:\n    list(read_hub('owner/talks', HubFields()))\n"
        "except DataError as error:\n    print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=Path(florilegium.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert "hub data set 'owner/talks' cannot be loaded" in ended.stdout, ended.stderr
    assert "name a .jsonl file" in ended.stdout


# Descriptions


def test_a_description_counts_what_can_be_counted_by_hand(tmp_path: Path) -> None:
    user = next(f"u{i}" for i in range(9) if half_of(f"u{i}") == "test")
    lines = [line(user, t, "one two", "three " * (t + 1), domain="odd" if t % 2 else "even") for t in range(5)]
    path = write(tmp_path / "x.jsonl", *lines)
    told = describe(DataConfig(name=str(path), min_pairs=5), seed=0)
    assert (told.users_found, told.users_eligible, told.pairs) == (1, 1, 5)
    assert told.pairs_per_user == (5, 5, 5, 5, 5)
    assert told.words_per_prompt == (2, 2, 2, 2, 2)
    assert told.words_per_response == (1, 2, 3, 4, 5)
    assert told.domains == (("even", 3), ("odd", 2))
    assert told.example is not None


def test_a_description_takes_the_settings_that_its_errors_ask_for(tmp_path: Path) -> None:
    path = str(write(tmp_path / "x.jsonl", *(line(user, t, "?", f"{t}") for user in "abcdef" for t in range(3))))
    for settings in (["min_pairs=3", "split=all"], ["data.min_pairs=3", "data.split=all"]):
        assert describe(data_config(path, settings), seed=0).users_eligible == 6
    assert describe(data_config(path), seed=0).users_eligible == 0
    assert data_config("hub:a/b", ["hub_fields.user=author", "data.hub_fields.part=test"]).hub_fields == HubFields(
        user="author", part="test"
    )
    with pytest.raises(ConfigError, match=r"x\.jsonl: .*unknown key 'min_pair'; did you mean 'min_pairs'\?"):
        data_config(path, ["min_pair=3"])


def test_what_is_held_out_and_stands_in_the_stream_is_told(tmp_path: Path) -> None:
    user = next(f"u{i}" for i in range(9) if half_of(f"u{i}") == "test")
    path = write(tmp_path / "x.jsonl", *(line(user, t, f"{t % 7}?", "Yes.") for t in range(12)))
    config = DataConfig(name=str(path), min_pairs=12, held_out_share=0.5, queries_per_user=5)
    told = describe(config, seed=0)  # the stream has 0 to 5; held out are 6, 0, 1, 2, 3, and 4 is not asked
    assert (told.held_out, told.held_out_met) == (5, 4)
    assert "5 pairs; 4 of them (80%) stand word for word in the same user's stream" in shown(config)
    only = load_population(config.model_copy(update={"users": 1}), seed=0)
    told_of = people(ExperimentConfig(data=config), UsersByDevice(only))
    assert (told_of.people, told_of.held_out, told_of.held_out_met) == (1, 5, 4)


def test_quantiles_are_counts_that_occur() -> None:
    assert quantiles([10, 30, 20]) == (10, 10, 20, 30, 30)
    assert quantiles([]) == ()


def test_a_description_without_users_says_what_to_change(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", line("ana", 1, "[red]Tea?", "Yes."))
    assert "lower data.min_pairs" in shown(DataConfig(name=str(path)))


def test_texts_are_shown_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *(line("ana", i, "[red]Tea?[/red]", "Yes.") for i in range(2)))
    assert "[red]Tea?[/red]" in shown(DataConfig(name=str(path), split=half_of("ana"), min_pairs=2))


def test_a_long_example_is_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *(line("ana", i, "word " * 1000, "Yes.") for i in range(2)))
    text = shown(DataConfig(name=str(path), split=half_of("ana"), min_pairs=2))
    assert text.count("word") < 125
    assert "word …" in text


def shown(config: DataConfig) -> str:
    plain = Console(width=120, no_color=True)
    with plain.capture() as captured:
        plain.print(render(describe(config, seed=0)))
    return captured.get()


def test_what_cannot_be_read_is_listed_as_such(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLORILEGIUM_DATA", str(tmp_path))
    (tmp_path / "dolly.jsonl.xz").touch()
    listed = {entry.name: entry for entry in names()}
    assert list(listed) == list(READERS)
    assert [name for name in listed if listed[name].available] == ["chitchat", "dolly"]
    assert listed["dolly"].about == "databricks-dolly-15k; the category is the domain (CC BY-SA 3.0)."


@pytest.mark.parametrize("value", [None, "nowhere/at/all"])
def test_a_folder_that_is_not_set_or_not_there_is_named(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv("FLORILEGIUM_DATA", raising=False)
    else:
        monkeypatch.setenv("FLORILEGIUM_DATA", value)
    with pytest.raises(DataError, match="FLORILEGIUM_DATA"):
        list(READERS["dolly"]())


def test_folders_of_the_environment_are_those_of_where_the_program_began(tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    program = (
        "import os\nfrom florilegium.client.lm import places\n"
        "from florilegium.simulation.data.folder import data_folder\n"
        "os.chdir('/')\nprint(data_folder(), places.cache_folder(), places.constants.HF_HOME)"
    )
    named = {"FLORILEGIUM_DATA": "sets", "FLORILEGIUM_CACHE": "models", "HF_HOME": "hf"}
    known = {"PYTHONPATH": str(Path(florilegium.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **named, **known},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(tmp_path / name) for name in ("sets", "models", "hf")], done.stderr


# Real data


@pytest.fixture(scope="module")
def chats() -> list[Conversation]:
    return list(read_chitchat())


@pytest.fixture(scope="module")
def chitchat(chats: list[Conversation]) -> Replies:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(READERS, "chitchat", lambda: iter(chats))
        return collect(DataConfig())


def test_chitchat_is_whole(chats: list[Conversation], chitchat: Replies) -> None:
    assert len(chats) == 7_168
    assert len({turn.speaker for chat in chats for turn in chat.turns}) == 1_315
    assert sum(len(said) for said in chitchat.by_user.values()) == 131_548
    assert len(chitchat.by_user) == 1_113
    ids = [r.id for said in chitchat.by_user.values() for r in said]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("split", "min_pairs", "users"),
    [("development", 40, 172), ("test", 40, 165), ("development", 50, 154), ("test", 50, 145)],
)
def test_chitchat_has_users_enough(chitchat: Replies, split: Any, min_pairs: int, users: int) -> None:
    assert len(streams(chitchat, DataConfig(split=split, min_pairs=min_pairs), seed=0)) == users


def test_a_population_of_chitchat_as_configured_by_default(chitchat: Replies) -> None:
    population = draw(chitchat, DataConfig(), seed=0)
    assert len({user.id for user in population}) == 64
    for user in population:
        assert half_of(user.id) == "test"
        assert 30 <= len(user.stream) <= 120
        assert len(user.held_out) == 8
        times = [r.time for r in user.stream + user.held_out]
        assert times == sorted(times)
        assert all(r.prompt and r.response for r in user.stream + user.held_out)


@needs_folder
@pytest.mark.parametrize(
    ("name", "pairs"),
    [("dolly", 14_996), ("empathetic", 51_233), ("alpaca", 9_225), ("openorca", 384), ("diasafety", 11_197)],
)
def test_files_of_the_folder_hold_what_is_known(name: str, pairs: int) -> None:
    replies = collect(DataConfig.model_validate({"name": name}))
    assert replies.anonymous
    assert len(replies.by_user[""]) == pairs


@needs_folder
@pytest.mark.parametrize("name", [name for name in READERS if name != "chitchat"])
def test_every_file_of_the_folder_begins_with_a_conversation(name: str) -> None:
    first = next(iter(READERS[name]()))
    assert first.turns
    assert all(isinstance(turn.text, str) for turn in first.turns)


@needs_folder
def test_channels_are_ordered_by_date_and_their_copies_dropped() -> None:
    replies = collect(DataConfig(name="ubuntu_irc"))
    assert (len(replies.by_user), replies.repeated) == (4_910, 1_936)
    dated = [r for said in replies.by_user.values() for r in said if not r.id.startswith("channel-two")]
    assert all(r.time > 1_000_000_000 for r in dated)  # after 2001
    busiest = max(replies.by_user.values(), key=len)
    dates = [r.id[:10] for r in busiest if not r.id.startswith("channel-two")]
    assert dates == sorted(dates)
