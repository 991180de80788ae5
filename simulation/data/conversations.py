"""Readers of the data sets that the project knows by name, each as a stream of conversations.

A conversation is what was recorded: speakers in turn. What a device sees of it, pairs of a prompt and the
user's own reply, is made in `simulation.data.population`. Nothing is filtered or split here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

from florilegium.privacy.common.registry import UnexpectedError, calling, resolve
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.folder import Row, data_folder, json_lines

HALF_DAY_S = 43_200.0


@dataclass(frozen=True, slots=True)
class Turn:
    """What one speaker said before another took over, in seconds since the epoch; 0 where the data has no clock.

    `speaker` is empty where the data has no user ids.
    """

    speaker: str
    text: str
    time: float = 0.0


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in the order of time. `replies_by` limits who counts as a user: `None` is everybody."""

    id: str
    turns: tuple[Turn, ...]
    domain: str = ""
    replies_by: str | None = None


def merge_turns(turns: list[Turn]) -> tuple[Turn, ...]:
    """Joins consecutive messages of one speaker with line breaks and drops empty ones."""
    merged: list[Turn] = []
    for turn in turns:
        text = turn.text.strip()
        if not text:
            continue
        if merged and merged[-1].speaker == turn.speaker:
            last = merged[-1]
            merged[-1] = Turn(last.speaker, f"{last.text}\n{text}", last.time)
        else:
            merged.append(Turn(turn.speaker, text, turn.time))
    return tuple(merged)


def locate(name: str) -> Path:
    """The file of a data set of `READERS`; raises `DataError` with what to install or to set where it is missing."""
    if name == "chitchat":
        spec = find_spec("chitchat_dataset")
        if spec is None or spec.origin is None:
            raise DataError("data set 'chitchat': its package is missing; pip install chitchat-dataset")
        return Path(spec.origin).parent / "dataset.json"
    path = data_folder() / f"{name}.jsonl.xz"
    if not path.exists():
        raise DataError(f"data set {name!r}: {path} is missing; set FLORILEGIUM_DATA to the folder that holds it")
    return path


def _rows(name: str) -> Iterator[Row]:
    for _, row in json_lines(locate(name)):
        yield row


def _question(identity: str, prompt: str, response: str, domain: str = "") -> Conversation:
    """A conversation of two turns whose answer has no known author."""
    return Conversation(identity, (Turn("asker", prompt.strip()), Turn("", response.strip())), domain, replies_by="")


def read_chitchat() -> Iterator[Conversation]:
    """Real two-person chats of 1,315 people with times (the PyPI package `chitchat-dataset`, MIT)."""
    recorded = json.loads(locate("chitchat").read_text(encoding="utf-8"))
    for identity, chat in recorded.items():
        messages = [
            Turn(m["sender"], m["text"], datetime.fromisoformat(m["timestamp"]).timestamp())
            for group in chat["messages"]
            for m in group
        ]
        yield Conversation(identity, merge_turns(messages))


def read_self_dialogue() -> Iterator[Conversation]:
    """One worker writes both sides of a talk on a topic; both sides count as that worker's (BSD-3)."""
    for row in _rows("self_dialogue"):
        submitted = row["submitted"].replace(" PDT ", " -0700 ").replace(" PST ", " -0800 ")
        time = datetime.strptime(submitted, "%a %b %d %H:%M:%S %z %Y").timestamp()
        turns = tuple(Turn(row["user"], text, time + i) for i, text in enumerate(row["turns"]) if text.strip())
        yield Conversation(row["conv"], turns, row["topic"])


def read_ubuntu_irc() -> Iterator[Conversation]:
    """Help channels, disentangled by annotated links: each thread from its first line to a last reply (CC BY 4.0).

    The five files of "channel-two" are one log and cuts of it, so that its threads come up to three times.
    """
    channel: list[Row] = []
    for row in _rows("ubuntu_irc"):
        if channel and row["file"] != channel[-1]["file"]:
            yield from _threads(channel)
            channel = []
        channel.append(row)
    yield from _threads(channel)


def _threads(channel: list[Row]) -> Iterator[Conversation]:
    """Follows each line to the thread of the line it answers; a line that answers none opens a thread."""
    thread_of: dict[int, int] = {}
    threads: dict[int, list[Turn]] = {}
    for row, time in zip(channel, _times(channel), strict=True):
        answered = [line for line in row["reply_to"] if line in thread_of and line != row["line"]]
        root = thread_of[answered[0]] if answered else row["line"]
        thread_of[row["line"]] = root
        threads.setdefault(root, []).append(Turn(row["user"] or "", row["text"], time))
    for root, turns in threads.items():
        yield Conversation(f"{channel[0]['file']}:{root}", merge_turns(turns), "ubuntu")


def _times(channel: list[Row]) -> Iterator[float]:
    """The file's date and the line's minute. Clocks of 12 and of 24 hours occur: one that runs back has gone round."""
    try:
        day = datetime.fromisoformat(channel[0]["file"][:10]).replace(tzinfo=UTC).timestamp()
    except ValueError:
        day = 0.0  # "channel-two" has no date
    time = day
    for row in channel:
        hours, minutes = row["t"].split(":")
        clock = day + 3600.0 * int(hours) + 60.0 * int(minutes)
        while clock < time:
            clock += HALF_DAY_S
        time = clock
        yield time


def read_sgd() -> Iterator[Conversation]:
    """Task dialogues of a user with an assistant; no user ids (CC BY-SA 4.0)."""
    for row in _rows("sgd"):
        turns = tuple(Turn("U" if who == "U" else "", text) for who, text in row["turns"])
        yield Conversation(row["id"], turns, row["services"][0], replies_by="")


def read_topicalchat() -> Iterator[Conversation]:
    """Two crowd workers on a topic; no user ids over conversations (CDLA-Sharing)."""
    for row in _rows("topicalchat"):
        turns = [Turn("first" if who == "agent_1" else "", text) for who, _, text in row["turns"]]
        yield Conversation(row["id"], merge_turns(turns), replies_by="")


def read_empathetic() -> Iterator[Conversation]:
    """EmpatheticDialogues: a speaker tells a feeling, a listener answers; no user ids (CC BY-NC 4.0)."""
    for row in _rows("empathetic"):
        turns = [Turn("speaker" if who == "speaker" else "", text) for who, text in row["turns"]]
        yield Conversation(row["conv"], merge_turns(turns), row["emotion"], replies_by="")


def read_medical_dialog() -> Iterator[Conversation]:
    """A substitute for MedDialog from six sources, one of them synthetic; the source is the domain."""
    for i, row in enumerate(_rows("medical_dialog")):
        turns = [Turn("patient" if who == "patient" else "", text) for who, text in row["turns"]]
        yield Conversation(f"medical_dialog:{i}", merge_turns(turns), row["src"], replies_by="")


def read_dolly() -> Iterator[Conversation]:
    """databricks-dolly-15k; the category is the domain (CC BY-SA 3.0)."""
    for i, row in enumerate(_rows("dolly")):
        yield _question(f"dolly:{i}", f"{row['instruction']}\n{row['context']}", row["response"], row["category"])


def read_alpaca() -> Iterator[Conversation]:
    """The unbiased sample of Alpaca: only rows drawn at random from it (CC BY-NC 4.0)."""
    for i, row in enumerate(_rows("alpaca")):
        if "random_9k" in row["src"]:
            yield _question(f"alpaca:{i}", f"{row['instruction']}\n{row['input']}", row["output"])


def read_openorca() -> Iterator[Conversation]:
    """A probe of OpenOrca, 384 rows: far too small for a result (MIT)."""
    for i, row in enumerate(_rows("openorca")):
        domain = (row["id"] or "").partition(".")[0]
        yield _question(f"openorca:{i}", f"{row['system']}\n{row['question']}", row["response"], domain)


def read_diasafety() -> Iterator[Conversation]:
    """DiaSafety: replies labelled for safety; contains offensive text (Apache-2.0)."""
    for i, row in enumerate(_rows("diasafety")):
        yield _question(f"diasafety:{i}", row["context"], row["response"], row["category"])


def read_medquad() -> Iterator[Conversation]:
    """MedQuAD: medical questions with answers from public institutions (CC BY 4.0)."""
    for i, row in enumerate(_rows("medquad")):
        yield _question(f"medquad:{i}", row["q"], row["a"], row["src"])


READERS: dict[str, Callable[[], Iterator[Conversation]]] = {
    "chitchat": read_chitchat,
    "self_dialogue": read_self_dialogue,
    "ubuntu_irc": read_ubuntu_irc,
    "sgd": read_sgd,
    "topicalchat": read_topicalchat,
    "empathetic": read_empathetic,
    "medical_dialog": read_medical_dialog,
    "dolly": read_dolly,
    "alpaca": read_alpaca,
    "openorca": read_openorca,
    "diasafety": read_diasafety,
    "medquad": read_medquad,
}


def read(name: str) -> Iterator[Conversation]:
    """The conversations of a reader of `READERS`, or of one of the user's own. Raises `ExtensionError`."""
    with calling(name, "take nothing and yield Conversations"):
        for conversation in resolve(name, READERS, Callable)():
            if not isinstance(conversation, Conversation):
                raise UnexpectedError(f"yielded {type(conversation).__name__}")
            yield conversation
