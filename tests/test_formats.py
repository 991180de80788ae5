"""Other people's files: each format is recognised by its content, read whole, or refused with place and reason."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from email.message import EmailMessage
from pathlib import Path
from time import process_time
from typing import Any
from zipfile import ZipFile

import pytest

from florilegium.simulation.data.convert import convert
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.formats.media import LEFT_OUT
from florilegium.simulation.data.formats.opened import json_values
from florilegium.simulation.data.formats.reading import FieldNames, Reading, moment
from florilegium.simulation.data.formats.recognise import read_source
from florilegium.simulation.data.formats.tables import delimiter_of
from florilegium.simulation.data.population import DataConfig, collect

Said = list[tuple[str, str, str]]


def said(path: Path, reading: Reading | None = None, **settings: Any) -> Said:
    """User, prompt and reply of all that is read."""
    config = DataConfig(name=str(path), **settings)
    by_user = collect(config, reading).by_user
    return [(user, d.prompt, d.response) for user, replies in by_user.items() for d in replies]


def chat(role: str, content: str, *turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{role: who, content: what} for who, what in turns]


TEA = (("system", "Be kind."), ("user", "Tea?"), ("assistant", "Green."), ("user", "Sugar?"), ("assistant", "No."))
BOTH = [("", "Tea?", "Green."), ("", "Sugar?", "No.")]
OPENAI = {"messages": chat("role", "content", *TEA)}
HUMAN = [({"user": "human", "assistant": "gpt"}.get(who, who), what) for who, what in TEA]


def discord(number: str, content: str, author: str, **more: Any) -> dict[str, Any]:
    time = f"2024-05-01T09:0{number}:00+00:00"
    row = {"id": number, "type": "Default", "timestamp": time, "content": content, "author": {"id": author}}
    return row | more


DISCORD = {
    "guild": {},
    "channel": {"id": "7"},
    "messages": [
        discord("1", "Tea?", "a"),
        discord("2", "Hm", "b"),
        discord("3", "Green.", "c", type="Reply", reference={"messageId": "1"}),
        discord("4", "!", "d") | {"author": {"id": "d", "isBot": True}},
    ],
}
TELEGRAM = {
    "name": "n", "type": "personal_chat", "id": 7, "messages": [
        {"id": 1, "type": "message", "date": "2024-05-01T09:00:00", "from": "A", "from_id": "a", "text": "Tea?"},
        {"id": 2, "type": "service", "date": "2024-05-01T09:00:01", "text": ""},
        {"id": 3, "type": "message", "date_unixtime": "1714554060", "from": "B", "from_id": "b",
         "text": ["Gr", {"type": "bold", "text": "een."}]},
    ],
}  # fmt: skip
SLACK = [
    {"type": "message", "user": "a", "text": "Tea?", "ts": "1714554000.1"},
    {"type": "message", "subtype": "channel_join", "user": "b", "text": "joined", "ts": "1714554001.1"},
    {"type": "message", "user": "b", "text": "Green.", "ts": "1714554002.1"},
]
A_B = [("b", "Tea?", "Green.")]


@pytest.mark.parametrize(
    ("rows", "read_as", "expected", "left_out"),
    [
        ([OPENAI], "OpenAI messages", BOTH, {"turn of the role 'system'": 1}),
        ([{"conversations": chat("from", "value", *HUMAN)}], "ShareGPT", BOTH, {"turn of the role 'system'": 1}),
        ([{"instruction": "Add", "input": "1+1", "output": "2"}], "Alpaca", [("", "Add\n1+1", "2")], {}),
        ([{"prompt": "Tea?", "completion": "Green."}], "prompts and responses", BOTH[:1], {}),
        ([{"question": "Tea?", "answer": None}], "prompts and responses", [], {"row without reply": 1}),
        ([{"author": 7, "q": "Tea?", "a": "😀 שלום"}], "prompts and responses", [("7", "Tea?", "😀 שלום")], {}),
        ([{"prompt": "Tea?", "chosen": "Green.", "rejected": "X"}], "preference pairs", BOTH[:1], {}),
        ([{"chosen": chat("role", "content", *TEA[1:3]), "rejected": []}], "preference pairs", BOTH[:1], {}),
        ([DISCORD], "a Discord export", [("b", "Tea?", "Hm"), ("c", "Tea?", "Green.")],
         {"message of a bot": 1, "message that answers nobody": 1}),
        ([TELEGRAM], "a Telegram export", A_B, {"notice of the app": 1, "message that answers nobody": 1}),
        (SLACK, "a Slack export", A_B, {"notice of the app": 1, "message that answers nobody": 1}),
    ],
    ids=["openai", "sharegpt", "alpaca", "completion", "null", "synonyms", "preference", "preferred-chats", "discord",
         "telegram", "slack"],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["lines", "array", "pretty"])
def test_rows_are_known_by_what_they_hold(
    tmp_path: Path, rows: list[Any], read_as: str, expected: Said, left_out: dict[str, int], layout: str
) -> None:
    """As JSON Lines, as one list, and as a list over several lines; of another program's document, the document."""
    path, reading = tmp_path / "data.bin", Reading()
    whole = rows if "messages" not in rows[0] or len(rows[0]) == 1 else rows[0]
    texts = {
        "lines": "\r\n".join(map(json.dumps, rows)),
        "array": json.dumps(whole),
        "pretty": json.dumps(whole, indent=1),
    }
    path.write_text(texts[layout], encoding="utf-8-sig")
    assert said(path, reading) == expected
    assert (reading.read_as, dict(reading.left_out)) == (read_as, left_out)


def test_whose_replies_are_learned_is_told_and_can_be_chosen(tmp_path: Path) -> None:
    (path := tmp_path / "x").write_text(json.dumps(OPENAI))
    reading = Reading()
    said(path, reading)
    told = "read as OpenAI messages: 1 conversations, replies are the assistant's; data.replies=user for the human's"
    assert reading.told() == told
    assert said(path, replies="user") == [("", "Green.", "Sugar?")]


@pytest.mark.parametrize(
    "pack",
    [gzip.compress, lzma.compress, bz2.compress, lambda data: data.decode().encode("utf-16")],
    ids=["gz", "xz", "bz2", "utf-16"],
)
@pytest.mark.parametrize("rows", [[OPENAI], [{"user": "b", "prompt": "Tea?", "response": "Green."}]])
def test_packed_files_are_read(tmp_path: Path, pack: Callable[[bytes], bytes], rows: list[Any]) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    plain.write_text("\n".join(map(json.dumps, rows)))
    packed.write_bytes(pack(plain.read_bytes()))
    assert said(packed) == said(plain) != []
    with ZipFile(tmp_path / "z", "w") as archive:
        archive.write(packed, "inner/packed")
    assert said(tmp_path / "z") == said(plain)


def test_a_slack_export_has_a_folder_for_each_channel(tmp_path: Path) -> None:
    (tmp_path / "export" / "general").mkdir(parents=True)
    (tmp_path / "export" / "users.json").write_text("[]")
    (tmp_path / "export" / "general" / "2024-05-01.json").write_text(json.dumps(SLACK))
    assert said(tmp_path / "export") == A_B
    with ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.write(tmp_path / "export" / "users.json", "users.json")
        archive.write(tmp_path / "export" / "general" / "2024-05-01.json", "general/2024-05-01.json")
    assert said(tmp_path / "z.zip") == A_B


@pytest.mark.parametrize(
    ("first", "second", "time"),
    [
        ("5/13/24, 9:00 PM - a: Tea?", "5/13/24, 9:01\u202fPM - b: Green.", "2024-05-13T21:01"),
        ("13.05.24, 21:00 - a: Tea?", "13.05.24, 21:01 - b: Green.", "2024-05-13T21:01"),
        ("01/05/2024, 21:00 - a: Tea?", "01/05/2024, 21:01 - b: Green.", "2024-05-01T21:01"),
        ("[13.05.24, 21:00:00] a: Tea?", "\u200e[13.05.24, 21:01:00] b: Green.", "2024-05-13T21:01"),
        ("[5/1/24, 12:00:00 AM] a: Tea?", "[5/1/24, 12:01:00 AM] b: Green.", "2024-05-01T00:01"),
        ("13/05/2024 à 21:00 - a: Tea?", "13/05/2024 à 21:01 - b: Green.", "2024-05-13T21:01"),
        ("13.5.2024 klo 21.00 - a: Tea?", "13.5.2024 klo 21.01 - b: Green.", "2024-05-13T21:01"),
        ("13.05.24, 21:00 Uhr - a: Tea?", "13.05.24, 21:01 Uhr - b: Green.", "2024-05-13T21:01"),
        ("13.05.2024 г., 21:00 - a: Tea?", "13.05.2024 г., 21:01 - b: Green.", "2024-05-13T21:01"),
        ("2024. 05. 13. 21:00 - a: Tea?", "2024. 05. 13. 21:01 - b: Green.", "2024-05-13T21:01"),
        ("2024. 5. 13. 오후 9:00 - a: Tea?", "2024. 5. 13. 오후 9:01 - b: Green.", "2024-05-13T21:01"),
        ("2024/5/3 下午9:00 - a: Tea?", "2024/5/3 下午9:01 - b: Green.", "2024-05-03T21:01"),
        ("2024. 5. 3. 오전 9:00 - a: Tea?", "2024. 5. 3. 오전 9:01 - b: Green.", "2024-05-03T09:01"),
        ("2024/5/13 下午9:00 - a: Tea?", "2024/5/13 下午9:01 - b: Green.", "2024-05-13T21:01"),
        ("[2024/5/13 上午9:00:00] a: Tea?", "[2024/5/13 上午9:01:00] b: Green.", "2024-05-13T09:01"),
    ],
    ids=[
        "us", "german", "british", "ios", "ios-us", "french", "finnish", "uhr", "bulgarian", "hungarian", "korean",
        "chinese-early", "korean-early", "chinese", "ios-chinese",
    ],
)  # fmt: skip
def test_whatsapp_of_several_locales(tmp_path: Path, first: str, second: str, time: str) -> None:
    (path := tmp_path / "chat.txt").write_text(
        f"{first}\n{second}\nWith lemon.\n{second[: second.index(': ')]}: <Media omitted>\n"
        f"{second[: second.index('b: ')]}c joined\n",
        encoding="utf-8",
    )
    reading = Reading()
    assert said(path, reading) == [("b", "Tea?", "Green.\nWith lemon.")]
    (talk,) = read_source(path, Reading())
    assert talk.turns[-1].time == moment(time, "")
    assert reading.left_out["notice of the app"] == 1
    assert reading.first["media left out of the export, or a deleted message"] == f"{path}, line 4"


def test_dates_in_two_orders_are_refused(tmp_path: Path) -> None:
    (path := tmp_path / "chat.txt").write_text("13/05/24, 21:00 - a: x\n05/14/24, 21:00 - b: y\n")
    with pytest.raises(DataError, match="lines 1 and 2: dates in two orders"):
        said(path)


def test_mail_without_quotes_and_signatures(tmp_path: Path) -> None:
    date = "Date: Wed, 1 May 2024 09:0{}:00 +0000"
    (path := tmp_path / "box").write_text(
        f"From a@x Wed May  1 09:00:00 2024\nFrom: A <a@x>\nMessage-ID: <1>\n{date.format(0)}\n\nTea?\n\n"
        f"From b@x Wed May  1 09:01:00 2024\nFrom: B <b@x>\nMessage-ID: <2>\nIn-Reply-To: <1>\n{date.format(1)}\n\n"
        "On Wed, 1 May 2024, A wrote:\n> Tea?\nGreen.\n-- \nB\n\n"
    )
    assert said(path) == [("b@x", "Tea?", "Green.")]


def log(path: Path, *rows: tuple[object, ...], columns: str = "author,when,message,thread,id,reply_to") -> Path:
    with path.open("w", newline="") as out:
        csv.writer(out).writerows([columns.split(","), *rows])
    return path


def test_a_log_is_paired_by_what_a_message_names_else_by_the_last_of_somebody_else(tmp_path: Path) -> None:
    path = log(
        tmp_path / "log",
        ("a", 1714554000, "Tea?", "t", 1, ""), ("b", 1714554060_000, "Green,", "t", 2, ""),
        ("b", "2024-05-01T09:02:00Z", "please.", "t", 3, ""), ("c", "2024-05-01T12:00", "Late", "t", 4, ""),
        ("d", "2024-05-01T12:01", "Milk", "t", 5, 1), ("e", "2024-05-01T09:00", "Else", "u", 6, ""),
        ("", "2024-05-01T09:00", "Who?", "u", 7, ""),
    )  # fmt: skip
    reading, fields = Reading(), {"time": "when"}
    reading.fields = FieldNames(time="when")
    assert said(path, reading) == [("b", "Tea?", "Green,\nplease."), ("d", "Tea?", "Milk")]
    assert dict(reading.left_out) == {
        "message of nobody": 1,
        "message that answers nobody": 2,
        "message that comes later than data.reply_within_s": 1,
    }
    assert reading.first["message of nobody"] == f"{path}, line 8"
    assert ("c", "Green,\nplease.", "Late") in said(path, reply_within_s=1e5, fields=fields)


def test_an_id_that_occurs_twice_names_the_message_of_its_own_conversation(tmp_path: Path) -> None:
    rows = [("a", "Tea?", "t", 1, ""), ("b", "Green.", "t", 2, 1), ("a", "Milk?", "u", 1, ""), ("b", "No.", "u", 2, 1)]
    path = log(tmp_path / "log", *rows, ("c", "What?", "v", 3, 1), columns="user,text,conversation,id,reply_to")
    assert said(path) == [("b", "Tea?", "Green."), ("b", "Milk?", "No.")]


def test_every_field_may_be_called_otherwise(tmp_path: Path) -> None:
    """Of a pair and of a log; nothing of either is called by a usual name."""
    pair = {"k1": "b", "k2": 60, "k3": "Tea?", "k4": "Green.", "k5": "kitchen"}
    (path := tmp_path / "pairs").write_text(json.dumps(pair))
    names = dict(zip(("user", "time", "prompt", "response", "domain"), pair, strict=True))
    (reply,) = collect(DataConfig.model_validate({"name": str(path), "fields": names})).by_user["b"]
    assert (reply.prompt, reply.response, reply.time, reply.domain) == ("Tea?", "Green.", 60.0, "kitchen")
    log(path, ("a", "Tea?", "t", 1, ""), ("c", "Hm", "u", 2, ""), ("b", "Green.", "u", 3, 1), columns="k1,k2,k3,k4,k5")
    names = dict(zip(("user", "text", "conversation", "id", "reply_to"), pair, strict=True))
    assert said(path, fields=names) == A_B
    (talk,) = read_source(path, Reading(FieldNames.model_validate(names)))
    assert talk.domain == "u"


def test_what_is_imported_gives_the_same_people(tmp_path: Path) -> None:
    path = log(tmp_path / "log", *((f"u{i % 3}", 1714554000 + 60 * i, f"m{i}", "t", i, "") for i in range(30)))
    config = DataConfig(name=str(path), fields=FieldNames(time="when"))
    out = tmp_path / "out.jsonl"
    convert(config, out)
    known = [{u: [(d.prompt, d.response, d.time, d.domain) for d in said] for u, said in collect(c).by_user.items()}
             for c in (config, DataConfig(name=str(out)))]  # fmt: skip
    assert known[0] == known[1] and len(known[0]) == 3
    with pytest.raises(DataError, match="exists; name a new file"):
        convert(config, out)
    (path := tmp_path / "x").write_text(json.dumps(OPENAI))
    with pytest.raises(DataError, match="--as zzz must be one of jsonl, openai"):
        convert(DataConfig(name=str(path)), tmp_path / "other", "zzz")
    nameless, other = DataConfig(name=str(path)), tmp_path / "other"
    assert "it names no users, and so do the lines" in convert(nameless, other).told()
    before, after = ([(d.prompt, d.response) for d in collect(c).by_user[""]]
                     for c in (nameless, DataConfig(name=str(other))))  # fmt: skip
    assert before == after != [] and collect(DataConfig(name=str(other))).anonymous


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"user;prompt;response\nu;p\n", "line 2: 2 fields where the header names 3"),
        (b"colour,size\nred,3\n", r"line 2: no known format has the keys \['colour', 'size'\]"),
        (b'{"messages": [{"role": "user", "content": 3}]}', "line 1, turn 1: content = 3 must be a text"),
        (b'{"messages": "x"}', "line 1: messages = 'x' must be a list"),
        (b'{"messages": []}\n[1]\n', "line 2: expected one JSON object|row 1"),
        (b'{"messages": []}\n{"messa', "line 2: expected one JSON object"),
        (b'[{"prompt": "p",\n"completion": "r"},\n', "line 2: not JSON"),
        (b'{"q": "p", "a": "r", "user": "u"}\n{"q": "p", "a": "r"}', "line 2: a user is named in some rows only"),
        (b'{"q": "p", "a": ["r"]}', r"line 1: a = \['r'\] must be a text"),
        (b'{"q": "p", "a": "r", "ts": "noon"}', "line 1: time = 'noon' must be seconds or milliseconds"),
        (b"user,text\nu,a\0b\n", "line 2: holds a NUL"),
        (b"user,text\nu,\xff\n", "line 2: byte 3 is not UTF-8"),
        (b"user,text\nu,\"a\n", "line 3: unexpected end|line 2: unexpected end"),
        (gzip.compress(b'{"q": "p", "a": "r"}')[:-9], "cannot be read .* is the file whole"),
        (b"\x28\xb5\x2f\xfd\0\0", "zstd|cannot be read"),
    ],
    ids=range(15),
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path: Path, content: bytes, told: str) -> None:
    (path := tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError, match=told):
        said(path)


def test_an_existing_file_wins_over_a_known_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dolly").write_text(json.dumps(OPENAI))
    assert said(Path("dolly")) == BOTH


def test_parquet_and_what_datasets_saves(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed; pip install 'florilegium[tables]'")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.Table.from_pylist([OPENAI])
    (split := tmp_path / "saved" / "train").mkdir(parents=True)
    parquet.write_table(table, tmp_path / "x.parquet")
    with pa.ipc.new_stream(split / "part.arrow", table.schema) as out:
        out.write_table(table)
    (split / "state.json").write_text(json.dumps({"_data_files": [{"filename": "part.arrow"}]}))
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    for path in (tmp_path / "x.parquet", split, split / "part.arrow", tmp_path / "saved"):
        assert said(path) == BOTH


def test_the_mark_of_a_table_is_the_commonest_of_its_header() -> None:
    assert [delimiter_of(line) for line in ("a\tb", "a;b;c,d", "a,b", "words")] == ["\t", ";", ",", ""]


LOG = "user,time,text\nana,100,hi\nben,{},yo\n"
WHATSAPP = """[03/04/24, 09:15:00] Tea: \u200eMessages and calls are end-to-end encrypted.
[03/04/24, 09:15:05] Ana: Tea?
[03/04/24, 09:16:00] Ben: \u200eMissed voice call
[03/04/24, 09:16:05] Ben: a.pdf (file attached)
[03/04/24, 09:16:09] Ben changed the subject from "Trip" to "Trip: Rome"
[13/04/24, 09:17:00] Ben: Green. \u200e<This message was edited>
"""
MBOX = """From a@x.org Wed May  1 09:00:00 2024
From: =?utf-8?q?Doe=2C_Ana?= <ana@x.org>
Date: Wed, 1 May 2024 09:00:00 +0000
Message-ID: <1@x>

Tea?

From b@x.org Wed May  1 09:05:00 2024
From: =?nope-1?q?Ben?= <ben@x.org>
Date: Wed, 1 May 2024 09:05:00 +0000
Message-ID: <2@x>
In-Reply-To: <1@x>

Green.

On Wed, 1 May 2024 at 09:00, Doe, Ana <ana@x.org>
wrote:

> Tea?

From c@x.org Wed May  1 09:06:00 2024
From: cy@x.org
Date: Wed, 1 May 2024 09:06:00 +0000
Message-ID: <3@x>
In-Reply-To: <2@x>

Black.

From: Ben
Sent: Wednesday
To: Ana

Green.
"""


@pytest.mark.parametrize(
    ("content", "settings", "told"),
    [
        (LOG.format(""), {}, "line 3: some rows have a time and others none"),
        (LOG.format(200), {"fields": {"user": "autor"}}, "data.fields.user = 'autor' is none of its columns: user"),
        (LOG.format(200), {"fields": {"conversation": "rom"}}, "data.fields.conversation = 'rom' is none"),
        ('{"user": "ana", "prompt": "Tea?", "text": "Green"}', {}, "unknown key 'text'"),
        ('{"chats": {}}', {}, "line 1"),
        (json.dumps(TELEGRAM) + "\n5", {}, "5 is no export of Telegram"),
        (json.dumps(DISCORD | {"channel": "general"}), {}, "is no export of Discord"),
        ("user,text\ruser,text\n", {}, "bare carriage return"),
        ("user,text,text\na,b,c\n", {}, "two columns are called 'text'"),
        ('{"id": 1, "turns": [{"speaker": "A", "text": "hi"}]}\n{"id": 2, "turns": []}', {}, "unknown key"),
        ('{"user_id": "ana", "history": [{"prompt": "Tea?", "response": "Green"}]}', {}, "unknown key"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(
    tmp_path: Path, content: str, settings: dict[str, Any], told: str
) -> None:
    path = tmp_path / "data"
    path.write_text(content, newline="")
    with pytest.raises(DataError, match=told):
        said(path, **settings)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (WHATSAPP, [("Ben", "Tea?", "Green.")]),
        (MBOX, [("ben@x.org", "Tea?", "Green."), ("cy@x.org", "Green.", "Black.")]),
        (json.dumps(TELEGRAM | {"messages": [
            TELEGRAM["messages"][0],
            TELEGRAM["messages"][2] | {"id": 2, "forwarded_from": "News", "text": "BREAKING"},
            TELEGRAM["messages"][2],
        ]}), A_B),
        (json.dumps({"prompt": "Tea?", "chosen": chat("role", "content", TEA[2]), "rejected": []}), BOTH[:1]),
        (json.dumps({"prompt": "Tea?", "chosen": chat("role", "content", *TEA[1:3]), "rejected": []}), BOTH[:1]),
        (",prompt,response\n0,Tea?,Green.\n1,Sugar?,No.\n", BOTH),
        (json.dumps({"version": 1, "tags": ["a"], "data": [{"prompt": "Tea?", "response": "Green."}]}), BOTH[:1]),
    ],
    ids=["whatsapp", "mbox", "telegram", "preference", "preferred-chat", "index", "wrapped"],
)  # fmt: skip
def test_only_a_persons_own_words_are_theirs(tmp_path: Path, content: str, expected: Said) -> None:
    path = tmp_path / "data"
    path.write_text(content)
    assert said(path, reply_within_s=1e6) == expected


# What a file holds twice, beside its data, or in a program's own marks


def test_a_message_that_is_recorded_twice_counts_once(tmp_path: Path) -> None:
    columns = "user,time,text,conversation,id,reply_to"
    rows = [("a", 100, "Tea?", "t", 1, ""), ("a", 100, "Tea?", "t", 1, ""), ("b", 160, "Green.", "t", 2, 1)]
    reading = Reading()
    assert said(log(tmp_path / "log", *rows, columns=columns), reading) == A_B
    assert reading.left_out["message recorded twice"] == 1
    other_ids = [rows[0], ("a", 100, "Tea?", "t", 7, ""), ("c", 150, "Hm", "t", 3, ""), ("b", 160, "Green.", "t", 2, 7)]
    assert ("b", "Tea?", "Green.") in said(log(tmp_path / "log", *other_ids, columns=columns))  # names what is left out
    elsewhere = [("a", 100, "Tea?", "t"), ("a", 100, "Tea?", "u"), ("b", 160, "Green.", "t"), ("b", 160, "No.", "u")]
    assert len(said(log(tmp_path / "log", *elsewhere, columns="user,time,text,conversation"))) == 2


def test_without_times_only_what_follows_itself_is_recorded_twice(tmp_path: Path) -> None:
    rows = [("a", "Tea?"), ("b", "Ok"), ("b", "Ok"), ("a", "Milk?"), ("b", "Ok")]
    assert said(log(tmp_path / "log", *rows, columns="user,text")) == [
        ("a", "Ok", "Milk?"), ("b", "Tea?", "Ok"), ("b", "Milk?", "Ok"),
    ]  # fmt: skip


def whatsapp(path: Path, *dates: str, mark: str = "21:00 -") -> Path:
    path.write_text("".join(f"{date}, {mark} {'ab'[i % 2]}: m{i}\n" for i, date in enumerate(dates)))
    return path


def days(path: Path, **settings: Any) -> tuple[list[str], str]:
    """Month and day of each reply, and what is told."""
    reading = Reading(reply_within_s=1e9, **settings)
    times = [datetime.fromtimestamp(talk.turns[-1].time, UTC) for talk in read_source(path, reading)]
    return [f"{time:%m-%d}" for time in times], reading.told()


def test_the_whole_file_decides_whether_day_or_month_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "chat.txt"
    unsure = "nothing says whether day or month comes first"
    assert days(whatsapp(path, "01/05/24", "02/05/24", "03/05/24", "13/05/24"))[0] == ["05-02", "05-03", "05-13"]
    found, told = days(whatsapp(path, "11/05/24", "12/05/24", "01/06/24"))  # else it would run back
    assert found == ["05-12", "06-01"] and unsure not in told
    found, told = days(whatsapp(path, "5/11/24", "5/12/24", "6/1/24", mark="9:00 PM -"))
    assert found == ["05-12", "06-01"] and unsure not in told
    found, told = days(whatsapp(path, "01/05/24", "02/06/24"))
    assert found == ["06-02"] and told.endswith("taken are days; data.dates=month-first else") and unsure in told
    assert days(path, dates="month-first")[0] == ["02-06"]
    found, told = days(whatsapp(path, "1/5/24", "2/6/24", mark="9:00 PM -"))
    assert found == ["02-06"] and told.endswith("taken are months; data.dates=day-first else")
    assert days(path, dates="day-first")[0] == ["06-02"]
    assert unsure not in days(whatsapp(path, "05/05/24", "06/06/24"))[1]
    with pytest.raises(DataError, match="line 2: no such date"):
        days(whatsapp(path, "01/05/24", "01/13/24"), dates="day-first")


def test_an_archive_with_pictures_is_read_without_them(tmp_path: Path) -> None:
    media, beside = "file that is a picture, a recording or a document", "__MACOSX/._00000001-PHOTO.jpg"
    with ZipFile(tmp_path / "chat.zip", "w") as archive:
        archive.writestr("_chat.txt", "[13.05.24, 21:00:00] a: Tea?\n[13.05.24, 21:01:00] b: Green.\n")
        for name in ("00000001-PHOTO.jpg", "00000002-AUDIO.opus", "note.pdf", "unknown", beside):
            archive.writestr(name, b"\x89\0\1\2")
    reading = Reading()
    assert said(tmp_path / "chat.zip", reading) == A_B
    assert reading.left_out[media] == 4
    assert reading.first[media].endswith("chat.zip/00000001-PHOTO.jpg")
    with ZipFile(tmp_path / "none.zip", "w") as archive:
        archive.writestr("a.png", b"\0")
    with pytest.raises(DataError, match=r"none\.zip holds no file that is a text"):
        said(tmp_path / "none.zip")


def test_a_slack_archive_may_have_a_folder_around_all_others(tmp_path: Path) -> None:
    with ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("export/channels.json", '[{"id": "C1"}]')
        archive.writestr("export/users.json", "[]")
        archive.writestr("export/general/2024-04-30.json", "[]")
        archive.writestr("export/general/2024-05-01.json", json.dumps(SLACK))
        archive.writestr("export/random/2024-05-01.json", json.dumps([SLACK[0] | {"text": "Hm"}]))
    reading = Reading()
    assert said(tmp_path / "z.zip", reading) == A_B and reading.read_as == "a Slack export"
    assert {talk.domain for talk in read_source(tmp_path / "z.zip", Reading())} == {"general"}


def test_slacks_marks_are_shown_as_a_reader_sees_them(tmp_path: Path) -> None:
    marked = (
        "<@U1> &lt;b&gt; R&amp;D &amp;lt; <http://x.org/a?b=1&amp;c=2|the page> <http://y.org> <#C1|tea> <!here> "
        "<!subteam^S1|@team> <mailto:a@b|a@b>"
    )
    (path := tmp_path / "x").write_text(json.dumps([SLACK[0], SLACK[2] | {"text": marked}]))
    assert said(path) == [("b", "Tea?", "@U1 <b> R&D &lt; the page http://y.org #tea @here @team a@b")]


def test_a_line_of_mail_that_begins_with_from_is_the_persons_own(tmp_path: Path) -> None:
    """Programs write a mark before it; a quoted one has two marks then, and stays a quotation."""
    body = "\n>From China.\n>>From you?\n> From me?\n\nOn"
    (path := tmp_path / "box").write_text(MBOX.replace("\nGreen.\n\nOn", body))
    assert said(path)[0] == ("ben@x.org", "Tea?", "From China.")


HH = "\n\nHuman: Tea?\n\nAssistant: Green.\n\nHuman: Sugar?\n\nAssistant: "


def test_a_preference_between_two_talks_has_the_chosen_ones_replies(tmp_path: Path) -> None:
    (path := tmp_path / "x").write_text(json.dumps({"chosen": HH + "No.", "rejected": HH + "Two\n\nspoons."}))
    reading = Reading()
    assert said(path, reading) == BOTH and reading.read_as == "preference pairs" and reading.by_role
    assert said(path, replies="user") == [("", "Green.", "Sugar?")]
    path.write_text(json.dumps({"prompt": "Tea?", "chosen": HH + "No.", "rejected": HH}))
    assert said(path) == BOTH  # the question stands before and in the talk, and counts once
    path.write_text(json.dumps({"prompt": "Say Human: or not", "chosen": "Human: is a word.", "rejected": ""}))
    assert said(path) == [("", "Say Human: or not", "Human: is a word.")]


@pytest.mark.parametrize(
    ("content", "read_as"),
    [
        ('{"q": "Tea?", "a": "Green."}', "prompts and responses has none: leave it out, or swap"),
        ('{"prompt": "Tea?", "chosen": "Green.", "rejected": "X"}', "preference pairs has none"),
        ('{"instruction": "Tea?", "output": "Green."}', "Alpaca has none"),
        ('{"user": "b", "prompt": "Tea?", "response": "Green."}', "JSON Lines of user, prompt and response has none"),
        (json.dumps(SLACK), "a Slack export has none"),
        (WHATSAPP, "a WhatsApp chat has none"),
    ],
)
def test_the_humans_replies_are_refused_where_nothing_says_who_that_is(
    tmp_path: Path, content: str, read_as: str
) -> None:
    (path := tmp_path / "x").write_text(content)
    with pytest.raises(DataError, match=f"data.replies = 'user' is of chats whose turns have roles; {read_as}"):
        said(path, replies="user", reply_within_s=1e6)


@pytest.mark.parametrize(
    ("content", "fields", "told"),
    [
        ('{"author": "b", "q": "?", "a": "!"}', {"user": "autor"}, "line 1: data.fields.user = 'autor' is none of"),
        ('{"author": null, "q": "?", "a": "!"}', {"user": "author"}, "line 1: data.fields.user = 'author' is empty"),
        (json.dumps(OPENAI), {"user": "autor"}, "line 1: data.fields.user = 'autor' is none of its columns: messages"),
        (json.dumps([{"q": "Tea?", "a": "Green."}]), {"user": "autor"}, "data.fields.user = 'autor' is none of"),
        ("q,a\nTea?,Green.\n", {"user": "autor"}, "line 2: data.fields.user = 'autor' is none of its columns: q, a"),
        (json.dumps(SLACK), {"user": "autor"}, "data.fields.user = 'autor': a Slack export has no columns"),
        (WHATSAPP, {"user": "autor"}, "data.fields.user = 'autor': a WhatsApp chat has no columns"),
        (MBOX, {"domain": "list"}, "data.fields.domain = 'list': mail in mbox has no columns"),
    ],
    ids=range(8),
)
def test_a_column_that_is_not_there_never_makes_people_nameless(
    tmp_path: Path, content: str, fields: dict[str, str], told: str
) -> None:
    (path := tmp_path / "x").write_text(content)
    with pytest.raises(DataError, match=told):
        said(path, fields=fields)


def test_a_known_data_set_has_no_columns_and_no_roles() -> None:
    with pytest.raises(DataError, match=r"data\.fields\.user = 'who': the data set dolly has no columns"):
        collect(DataConfig(name="dolly", fields=FieldNames(user="who")))
    with pytest.raises(DataError, match="the data set dolly has none"):
        collect(DataConfig(name="dolly", replies="user"))


def seconds_to_read(path: Path) -> float:
    """Of this process, the least of three."""

    def once() -> float:
        began = process_time()
        assert sum(1 for _ in json_values(path)) > 0
        return process_time() - began

    return min(once() for _ in range(3))


def test_ten_times_the_documents_take_ten_times_as_long(tmp_path: Path) -> None:
    """Of documents over several lines, one after the other; twice that is allowed, and a square would be a hundred."""
    one = json.dumps({"prompt": "Tea?", "response": "Green."}, indent=1) + "\n"
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_text(one * 4_000)
    large.write_text(one * 40_000)
    assert seconds_to_read(large) < 20 * seconds_to_read(small)
    assert [where for where, _ in json_values(small)][1] == f"{small}, line 5"


def test_a_file_in_zstd_is_read_whole_or_refused(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed; pip install 'florilegium[tables]'")
    rows = "".join(json.dumps({"user": "b", "prompt": f"{i}?", "response": "Green."}) + "\n" for i in range(20_000))
    packed = pa.Codec("zstd").compress(rows.encode(), asbytes=True)
    (path := tmp_path / "x.jsonl.zst").write_bytes(packed)
    assert len(said(path)) == 20_000
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"cannot be read .* is the file whole"):
        said(path)


def test_without_a_reader_of_zstd_it_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyarrow", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    (path := tmp_path / "x").write_bytes(b"\x28\xb5\x2f\xfd\0\0")
    with pytest.raises(DataError, match=r"compressed with zstd: pip install 'florilegium\[tables\]'"):
        said(path)


# Signal


def item(number: int, author: str, body: str, **quote: str) -> dict[str, Any]:
    text = {"text": {"body": body}} | ({"quote": quote} if quote else {})
    return {
        "chatItem": {"chatId": "1", "authorId": author, "dateSent": f"171455400000{number}", "standardMessage": text}
    }


SIGNAL = [
    {"version": "1", "backupTimeMs": "1714554999000"},
    {"account": {"givenName": "A"}},
    {"recipient": {"id": "2", "self": {}}},
    {"recipient": {"id": "3", "contact": {"profileGivenName": "B"}}},
    {"chat": {"id": "1", "recipientId": "3"}},
    item(1, "2", "Tea?"),
    item(2, "4", "Hm"),
    {"chatItem": {"chatId": "1", "authorId": "3", "dateSent": "1714554000003", "updateMessage": {"simpleUpdate": {}}}},
    item(4, "3", "Green.", authorId="2", targetSentTimestamp="1714554000001"),
]


@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_what_signal_exports_itself(tmp_path: Path, skipped: int) -> None:
    """Among the media that it lays beside; a quote says which message is answered."""
    (tmp_path / "export" / "files" / "ab").mkdir(parents=True)
    (tmp_path / "export" / "files" / "ab" / "note.txt").write_text("an attachment")
    (tmp_path / "export" / "metadata.json").write_text('{"version": 1}')
    (path := tmp_path / "export" / "main.jsonl").write_text("\n".join(map(json.dumps, SIGNAL[skipped:])))
    for source in (path, tmp_path / "export"):
        reading = Reading()
        assert said(source, reading) == [("3", "Tea?", "Green."), ("4", "Tea?", "Hm")]
        assert reading.read_as == "Signal's own export"
        assert reading.left_out["notice of the app, or a sticker, call or deleted message"] == 1


def sent(time: str, sender: str, body: str, **more: Any) -> dict[str, Any]:
    row = {"date": f"2024-05-01T09:{time}", "sender": sender, "body": f"{body}  ", "quote": "", "sticker": None}
    return {**row, "reactions": [], "attachments": [], "deleted": False, "call": False, **more}


CHAT_MD = """[2024-05-01 09:00:00] Me: Tea?

[2024-05-01 09:01:00] Ben: \n\n> Tea?\n\nGreen.
With lemon: yes.  ![a.jpg](./media/a.jpg)  
(- Me: 👍 -)

[2024-05-01 09:02:00] Me: (This message was deleted)

[2024-05-01 09:03:00] Ben:   
(( 🍵 ))

"""


def test_what_signal_export_writes(tmp_path: Path) -> None:
    """JSON, Markdown and a page of a chat say the same: the first is read, the Markdown where it has no JSON beside."""
    rows = [
        sent("00", "Me", "Tea?"), sent("01", "Ben", "Green.\nWith lemon: yes.", quote="\n\n> Tea?\n\n"),
        sent("02", "Me", "gone", deleted=True), sent("03", "Ben", "", sticker={"emoji": "🍵"}),
    ]  # fmt: skip
    (chat := tmp_path / "export" / "Ben").mkdir(parents=True)
    (chat / "index.html").write_text("<html>")
    (chat / "chat.md").write_text(CHAT_MD)
    expected = [("Ben", "Tea?", "Green.\nWith lemon: yes.")]
    for source, written in ((tmp_path / "export", False), (tmp_path / "export", True), (chat / "data.json", True)):
        if written:
            (chat / "data.json").write_text("\n".join(map(json.dumps, rows)))
        reading = Reading()
        assert said(source, reading) == expected and reading.read_as == "chats of signal-export"
        assert reading.left_out["call or deleted message"] == reading.left_out["message without text"] == 1
    assert {talk.domain for talk in read_source(tmp_path / "export", Reading())} == {"Ben"}
    assert said(chat / "chat.md") == expected


# -- whose words they are, and nothing by half ------------------------------------------------------------------------


def test_a_log_has_the_labels_that_the_settings_name(tmp_path: Path) -> None:
    """Else what is written is of its conversation."""
    path = tmp_path / "log.csv"
    path.write_text("user,time,conversation,text,topic\nann,1,k,hi,red\nbob,2,k,hello,blue\nann,3,k,yo,red\n")
    domains = {}
    for fields in (FieldNames(), FieldNames(domain="topic")):
        by_user = collect(DataConfig(name=str(path), fields=fields)).by_user
        domains[fields.domain] = {user: [d.domain for d in said] for user, said in by_user.items()}
    assert domains == {"": {"ann": ["k"], "bob": ["k"]}, "topic": {"ann": ["red"], "bob": ["blue"]}}


def test_a_mail_that_is_attached_is_not_the_senders_own(tmp_path: Path) -> None:
    """Two texts of bob's with a picture between them, and carol's mail beside: bob wrote the two texts."""
    asked, reply = EmailMessage(), EmailMessage()
    for mail, sender, number in ((asked, "ann@x", "1"), (reply, "bob@x", "2")):
        mail["From"], mail["Message-ID"] = sender, f"<{number}@x>"
        mail["Date"] = f"Sun, 01 Mar 2026 18:2{number}:00 +0000"
    asked.set_content("Question?")
    reply["In-Reply-To"] = "<1@x>"
    reply.set_content("First half.")
    reply.add_attachment(b"\x89PNG", maintype="image", subtype="png", disposition="inline")
    reply.add_attachment("Second half.", disposition="inline")
    carols = EmailMessage()
    carols["From"] = "carol@x"
    carols.set_content("A secret of Carol's.")
    reply.add_attachment(carols)
    path = tmp_path / "mail.mbox"
    path.write_bytes(b"".join(b"From x Sun Mar  1 18:20:00 2026\n" + bytes(m) + b"\n" for m in (asked, reply)))
    assert said(path) == [("bob@x", "Question?", "First half.\n\nSecond half.")]


@pytest.mark.parametrize(
    "quoted",
    [
        "-------- Weitergeleitete Nachricht --------\nBetreff: Tee\nDatum: heute\nVon: Carol <c@x>\n\nGeheim.",
        "Betreff: Tee\nDatum: heute\nVon: Carol <c@x>\n\nGeheim.",
        "---------- Message transféré ----------\nSecret.",
    ],
)
def test_what_is_forwarded_is_not_the_senders_own(tmp_path: Path, quoted: str) -> None:
    heads = "From x Sun Mar  1 18:2{0}:00 2026\nFrom: {1}@x\nDate: Sun, 01 Mar 2026 18:2{0}:00 +0000\n"
    heads += "Message-ID: <{0}@x>\nIn-Reply-To: <1@x>\nContent-Type: text/plain; charset=utf-8\n\n"
    path = tmp_path / "mail.mbox"
    path.write_text(f"{heads.format(1, 'ann')}Und?\n\n{heads.format(2, 'bob')}Siehe unten.\n\n{quoted}\n\n")
    assert said(path) == [("bob@x", "Und?", "Siehe unten.")]


def test_a_role_that_may_be_a_name_is_told_to_nobody(tmp_path: Path) -> None:
    turns = chat("from", "value", ("human", "Tea?"), ("gpt", "Green."), ("Alice Smith", "Hm"))
    reading, path = Reading(), tmp_path / "x.json"
    path.write_text(json.dumps({"conversations": turns}))
    assert said(path, reading) == BOTH[:1] and dict(reading.left_out) == {"turn of another role": 1}


def test_ids_that_two_conversations_have_name_nothing_across_them(tmp_path: Path) -> None:
    """B's message answers one that was deleted, of whose id A has one: not A's words are its prompt."""
    columns = "user,time,text,conversation,id,reply_to"
    rows = [("ann", 1, "hi", "A", 1, ""), ("ann", 2, "of A", "A", 7, ""), ("cat", 3, "hm", "B", 1, "")]
    path = log(tmp_path / "x.csv", *rows, ("dan", 4, "to what is gone", "B", 9, 7), columns=columns)
    assert said(path) == [("dan", "hm", "to what is gone")]
    apart = log(tmp_path / "y.csv", *rows[:2], ("dan", 4, "as I said", "B", 9, 7), columns=columns)
    assert said(apart) == [("dan", "of A", "as I said")]  # ids are of the whole file


def test_what_telegram_forwards_from_an_account_that_is_gone_is_nobodys(tmp_path: Path) -> None:
    first, _, third = TELEGRAM["messages"]  # type: ignore[misc]
    path = tmp_path / "result.json"
    path.write_text(json.dumps(TELEGRAM | {"messages": [first, {**third, "forwarded_from": None}]}))  # type: ignore[dict-item]
    assert said(path) == []


def test_a_pasted_line_does_not_turn_a_chats_dates_round(tmp_path: Path) -> None:
    path = tmp_path / "chat.txt"
    path.write_text("13/02/24, 21:00 - Ann: Tea?\n13/02/24, 21:01 - Bob: See:\n2024-05-01, 10:00 - Eve: pasted\n")
    (reply,) = collect(DataConfig(name=str(path))).by_user["Bob"]
    assert reply.response == "See:\n2024-05-01, 10:00 - Eve: pasted"
    assert datetime.fromtimestamp(reply.time, UTC) == datetime(2024, 2, 13, 21, 1, tzinfo=UTC)


def test_of_a_folder_nothing_is_passed_over_untold(tmp_path: Path) -> None:
    """Slack's channels of one name in two workspaces are two; a file beside is counted, one called README… is read."""
    for workspace, text in (("w1", "one"), ("w2", "two")):
        day = tmp_path / "slack" / workspace / "general" / "2024-01-01.json"
        day.parent.mkdir(parents=True)
        day.write_text(json.dumps([SLACK[0], {**SLACK[2], "text": text, "user": workspace}]))
    (tmp_path / "slack" / "own.jsonl").write_text("{}\n")
    reading = Reading()
    assert said(tmp_path / "slack", reading) == [("w1", "Tea?", "one"), ("w2", "Tea?", "two")]
    assert reading.left_out["file beside those of the export"] == 1
    rows = tmp_path / "rows"
    (rows / ".git").mkdir(parents=True)
    (rows / ".git" / "config.txt").write_text("not data")
    (rows / "README.md").write_text("not data")
    (rows / "README_chat.jsonl").write_text(json.dumps({"prompt": "Tea?", "completion": "Green."}))
    reading = Reading()
    assert said(rows, reading) == BOTH[:1] and dict(reading.left_out) == {LEFT_OUT: 1}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('\n\nprompt,response\nTea?,"Green."\nhm\n', "line 5: 1 fields where the header names 2"),
        (
            json.dumps(DISCORD | {"messages": [discord("1", "x", "a", reference="x")]}),
            "reference = 'x' must be an object",
        ),
        ('{"user": "ann", "user": "bob", "prompt": "Tea?", "response": "Green."}', "the key 'user' occurs twice"),
    ],
)
def test_what_is_broken_is_refused_and_never_a_fault_of_ours(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "x"
    path.write_text(content)
    with pytest.raises(DataError, match=re.escape(told)):
        said(path)


def test_a_prompt_that_differs_from_its_talk_by_a_space_is_not_doubled(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    talk = chat("role", "content", ("user", "Tea?"), ("assistant", "Green."))
    path.write_text(json.dumps([{"prompt": "Tea? ", "chosen": talk, "rejected": []}]))
    assert said(path) == BOTH[:1]
    with pytest.raises(DataError, match=r"data.fields.response = 'chosen': of preference pairs"):
        said(path, fields=FieldNames(response="chosen"))


def test_a_file_without_a_reply_becomes_none(tmp_path: Path) -> None:
    path, out = tmp_path / "x.json", tmp_path / "out.jsonl"
    path.write_text(json.dumps({"user": "ann", "messages": chat("role", "content", *TEA[:3])}))
    with pytest.raises(
        DataError, match=r"holds no reply to learn \(read as OpenAI messages: 1 conv.*; 1 × turn of the"
    ):
        convert(DataConfig(name=str(path), replies="user"), out)
    assert not out.exists()


@pytest.mark.parametrize(
    "notice",
    [
        "<Mídia oculta>", "<Media weggelaten>", "<Без медиафайлов>", "<사진 생략>", "Mensagem apagada",
        "Ce message a été supprimé", "Вы удалили данное сообщение.", "IMG-1.jpg (arquivo anexado)",
    ],
)  # fmt: skip
def test_what_whatsapp_writes_in_place_of_a_message_is_nobodys_word(tmp_path: Path, notice: str) -> None:
    (path := tmp_path / "x").write_text(
        "\n".join(f"13/05/2024, 21:0{n} - {said}" for n, said in enumerate(["a: Tea?", f"b: {notice}", "b: Green."])),
        encoding="utf-8",
    )
    reading = Reading()
    (talk,) = read_source(path, reading)
    assert [turn.text for turn in talk.turns] == ["Tea?", "Green."]
    assert reading.left_out["media left out of the export, or a deleted message"] == 1


def test_a_chat_of_a_form_that_is_not_known_is_named(tmp_path: Path) -> None:
    (path := tmp_path / "x").write_text("٣١/٠٣/٢٠٢٦، ٨:١٠ م - A: Tea?\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"x, line 1: looks like a chat of WhatsApp's with dates of a form"):
        list(read_source(path, Reading()))


def test_columns_of_others_beside_ours_are_passed_over_and_told(tmp_path: Path) -> None:
    """A key that could be one of ours, misspelt or under another name, is refused as ever."""
    row = {"user": "u", "time": 1714555800000, "prompt": "Tea?", "response": "Green."}
    (path := tmp_path / "x").write_text(json.dumps({"id": 1, "tme_zone_offset": 0, **row}))
    reading = Reading()
    (talk,) = read_source(path, reading)
    assert [t.text for t in talk.turns] == ["Tea?", "Green."] and talk.turns[1].time == 1714555800.0
    assert "passed over: id, tme_zone_offset" in reading.told()
    for other in ("timestamp", "respnse", "messages"):
        path.write_text(json.dumps({other: 1, **row}))
        with pytest.raises(DataError, match=f"unknown key '{other}'"):
            list(read_source(path, Reading()))
