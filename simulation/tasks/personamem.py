"""PersonaMem, versions 1 and 2: the right reply of several after a long history, from the official files.

(Jiang et al., arXiv 2504.14225 and 2512.06688.) Forms are those that the authors' code reads
(github.com/bowen-upenn/PersonaMem, `inference_standalone_openai.py`, and PersonaMem-v2, `inference.py` and
`MemAgent/data/data_preprocess.py`), and of an early state of version 1's files; the data itself was not here.

Version 1 is `questions_{size}.csv` and `shared_contexts_{size}.jsonl`, a line of which is `{context: [{"role",
"content"}, …]}`. A question sees the first `end_index_in_shared_context` messages and no more, so that a person is
asked at several moments: each is a user of its own (`TaskUser.person`). Version 2 is `benchmark/text/{part}.csv` and
the file of a history that its `chat_history_{size}_link` names, all of which is before the question; where options
stand is drawn here (the authors draw it by Python's `hash`, which differs from process to process).

Questions of both are asked in the words of version 1. Not covered: messages of the system, which describe the person
and which the authors' prompts have; pictures; replies that are written freely; version 3.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from florilegium.privacy.seeds import derive_seed
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.folder import Row, json_lines
from florilegium.simulation.data.formats.tables import read_csv
from florilegium.simulation.tasks.official import literal_of, read_json, rows_of, text_of
from florilegium.simulation.tasks.task import Item, Query, Task, TaskUser, above

LETTERS = ("(a)", "(b)", "(c)", "(d)")
ASKED = (
    "Find the most appropriate model response and give your final answer (a), (b), (c), or (d) after the special token "
    "<final_answer>."
)
PARTS = {"train": "train", "dev": "val", "test": "benchmark"}  # of version 2
# An item has no label. It is completed, as OPPU (arXiv 2402.04401) completes a history without labels.
TASK = Task(
    "personamem",
    ("choice accuracy",),
    LETTERS,
    practice=("chat:", "{text}"),
    shown_as="{text}",
    joined=above,
    searched_with="",
    own="{title}",
    between="\n",
)


@dataclass
class _Exchange:
    """What the person said in one go, and the assistant's reply."""

    first: int  # of its messages
    said: list[str] = field(default_factory=list)
    replies: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join([f"User: {text}" for text in self.said] + [f"Assistant: {text}" for text in self.replies])


def load_version_1(folder: Path, size: str) -> list[TaskUser]:
    """The persons at the moments that they are asked at, by id. Raises `DataError`."""
    path, contexts_path = folder / f"questions_{size}.csv", folder / f"shared_contexts_{size}.jsonl"
    contexts = {key: rows_of(said, f"{where}, {key!r}") for where, key, said in _contexts(contexts_path)}
    asked: dict[tuple[str, str, int], list[Query]] = {}
    for where, row in read_csv(path):
        context = text_of(row, "shared_context_id", where)
        if context not in contexts:
            raise DataError(f"{where}: {contexts_path.name} has no context {context!r}; are both of the same size?")
        end = _end(row, len(contexts[context]), where)
        person = text_of(row, "persona_id", where) if "persona_id" in row else context
        asked.setdefault((person, context, end), []).append(_version_1(row, end, where))
    return [
        TaskUser(f"{person}:{context}:{end}", exchanges(contexts[context][:end], context), tuple(queries), person)
        for (person, context, end), queries in sorted(asked.items())
    ]


def load_version_2(folder: Path, size: str, file: str) -> list[TaskUser]:
    """The persons with their histories, by id. Raises `DataError`."""
    path, link = folder / "benchmark" / "text" / f"{PARTS[file]}.csv", f"chat_history_{size}_link"
    asked: dict[tuple[str, str], list[Query]] = {}
    for n, (where, row) in enumerate(read_csv(path)):
        person, history = text_of(row, "persona_id", where), text_of(row, link, where)
        asked.setdefault((person, history), []).append(_version_2(row, f"{person}:{n}", where))
    return [
        TaskUser(f"{person}:{history}", _history(folder, history), tuple(queries), person)
        for (person, history), queries in sorted(asked.items())
    ]


def exchanges(messages: Sequence[Row], where: str) -> tuple[Item, ...]:
    """The items of a history: what the person said in one go, and the reply to it. Their time counts messages."""
    found: list[_Exchange] = []
    for n, message in enumerate(messages):
        place = f"{where}, message {n + 1}"
        role, text = text_of(message, "role", place), text_of(message, "content", place)
        if role not in ("user", "assistant", "system"):
            raise DataError(f"{place}: role = {role!r} must be user, assistant or system")
        text = text.removeprefix(f"{role.title()}:").strip()
        if role == "system" or not text:
            continue
        if not found or (role == "user" and found[-1].replies):
            found.append(_Exchange(n))
        (found[-1].said if role == "user" else found[-1].replies).append(text)
    return tuple(Item(f"{where}:{e.first}", e.text, time=float(e.first), title="\n".join(e.said)) for e in found)


def _version_1(row: Row, end: int, where: str) -> Query:
    options, right = literal_of(row, "all_options", where), text_of(row, "correct_answer", where)
    texts = [_lettered(text, letter, where) for letter, text in zip(LETTERS, options, strict=False)]
    if right not in LETTERS[: len(texts)] or len(options) != len(texts):
        raise DataError(f"{where}: correct_answer = {right!r} must be one of all_options, which are (a) to (d)")
    question, written = text_of(row, "user_question_or_message", where), text_of(row, "all_options", where)
    identity = text_of(row, "question_id", where)
    return Query(identity, f"{question}\n\n{ASKED}\n\n{written}", right, question, tuple(texts), float(end))


def _lettered(option: Any, letter: str, where: str) -> str:
    if not isinstance(option, str) or not option.startswith(letter):
        raise DataError(f"{where}: all_options holds {option!r} where {letter} was expected")
    return option.removeprefix(letter).strip()


def _version_2(row: Row, identity: str, where: str) -> Query:
    query, right = literal_of(row, "user_query", where), text_of(row, "correct_answer", where)
    wrong = literal_of(row, "incorrect_answers", where)
    if not isinstance(query, dict) or not isinstance(wrong, list) or not 1 <= len(wrong) < len(LETTERS):
        raise DataError(
            f"{where}: expected user_query = {{'role', 'content'}} and incorrect_answers, a list of one to three texts"
        )
    options = [right, *(text_of({"incorrect_answers": text}, "incorrect_answers", where) for text in wrong)]
    order = sorted(range(len(options)), key=lambda i: derive_seed(0, "options", identity, i))
    written = "\n".join(f"{letter} {options[i]}" for letter, i in zip(LETTERS, order, strict=False))
    question, letter = text_of(query, "content", where), LETTERS[order.index(0)]
    return Query(
        identity,
        f"{question}\n\n{ASKED}\n\n{written}",
        letter,
        question,
        tuple(options[i] for i in order),
        float("inf"),
    )


def _history(folder: Path, link: str) -> tuple[Item, ...]:
    path = folder / link
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{folder}: the history {link!r} lies outside the folder")
    found = read_json(path)
    return exchanges(rows_of(found.get("chat_history") if isinstance(found, dict) else found, str(path)), link)


def _contexts(path: Path) -> Iterator[tuple[str, str, Any]]:
    for number, row in json_lines(path):
        for key, said in row.items():
            yield f"{path}, line {number}", key, said


def _end(row: Row, messages: int, where: str) -> int:
    written = text_of(row, "end_index_in_shared_context", where)
    if not re.fullmatch(r"\d+", written) or int(written) > messages:
        raise DataError(
            f"{where}: end_index_in_shared_context = {written!r} must be a whole number up to the {messages} messages"
        )
    return int(written)
