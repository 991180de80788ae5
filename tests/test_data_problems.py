"""What `data describe` says of a broken file: the commonest problems with their lines, soon, and without a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from florilegium.simulation.data.describe import describe
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.formats.reading import FieldNames, Reading
from florilegium.simulation.data.population import DataConfig
from florilegium.simulation.data.problems import problems_of

GOOD = json.dumps({"user": "ana", "prompt": "Tea?", "response": "Green."})


def written(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_the_five_commonest_are_told_with_their_lines(tmp_path: Path) -> None:
    lists = ['{"user": ["a"], "prompt": "p", "response": "r"}'] * 7
    six = ["nope", "nope", '{"user": "a", "prompt": "p"}', b"\xff", "[1]", '{"x": 1}', GOOD[:-1] + ', "time": 5}']
    path = written(tmp_path / "x.jsonl", GOOD, *lists, "", *six)
    assert problems_of(path, Reading()) == [
        "7 × user must be a text or an integer: lines 2, 3, 4, 5, 6 and 2 more",
        "2 × not JSON: lines 10, 11",
        "1 × 'response' is missing; every line needs user, prompt and response: line 12",
        "1 × not UTF-8: line 13",
        "1 × JSON, but no object: line 14",
    ]
    with pytest.raises(
        DataError, match=r"x\.jsonl, line 2: user = \['a'\] must be .*\n.* of its lines:\n7 × user must"
    ):
        describe(DataConfig(name=str(path)), seed=0)


def test_rows_of_other_formats_and_tables_are_tried_too(tmp_path: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": c}]} for c in ("Tea?", 3, 4)]
    path = written(tmp_path / "x", *map(json.dumps, chats), '{"messages": "x"}')
    assert problems_of(path, Reading()) == [
        "2 × content must be a text: lines 2, 3",
        "1 × messages must be a list of turns: line 4",
    ]
    path = written(tmp_path / "x.csv", "who,q,a", 'ana,"Tea?\nor milk?",Green.', "ana,Tea?", ",Tea?,Green.")
    assert problems_of(path, Reading(FieldNames(user="who"))) == [
        "1 × 2 fields where the header names 3: line 4",
        "1 × data.fields.user = 'who' is empty; name a user in every row: line 5",
    ]


@pytest.mark.parametrize(
    "content",
    ["", "[\n{}\n]", '{\n"a": 1\n}', "hello", GOOD, "user,prompt,response\ru,p,r\r", "wer,frage\na,b", '{"x": 1}'],
)
def test_what_has_no_rows_or_no_wrong_ones_has_no_list(tmp_path: Path, content: str) -> None:
    assert problems_of(written(tmp_path / "x", content), Reading()) == []


@pytest.mark.parametrize("content", [b"PK\x03\x04torn", b"31/02/2026, 20:10 - A: x\n31/02/2026, 20:11 - B: y\n"])
def test_what_was_taken_for_no_rows_has_no_list_either(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path / "x", content)
    with pytest.raises(DataError) as told:
        describe(DataConfig(name=str(path)), seed=0)
    assert "\n" not in str(told.value)


def test_a_column_that_is_not_there_is_one_problem_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "x", *['{"q": "Tea?", "a": "Green."}'] * 3)
    assert problems_of(path, Reading(FieldNames(user="who"))) == []
    with pytest.raises(DataError, match=r"data.fields.user = 'who' is none of its columns: q, a$"):
        describe(DataConfig(name=str(path), fields=FieldNames(user="who")), seed=0)


def test_of_a_file_that_is_read_the_lines_left_out_are_told(tmp_path: Path) -> None:
    path = written(tmp_path / "x.jsonl", GOOD, GOOD, GOOD, '{"user": "ben", "prompt": "", "response": "r"}')
    told = describe(DataConfig(name=str(path)), seed=0)
    assert told.problems == (
        "2 × line recorded before, first x.jsonl, line 2",
        "1 × line without prompt or response, first x.jsonl, line 4",
    )


def test_it_takes_under_two_seconds_and_loads_neither_models_nor_statistics(tmp_path: Path) -> None:
    """Of this processor's time: others may be at work on it."""
    path = written(tmp_path / "x.jsonl", GOOD, "nope", "nope")
    program = (
        "import sys, time\nsys.argv = ['florilegium', 'data', 'describe', sys.argv[1]]\n"
        "from florilegium.simulation.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code)\n"
        "heavy = {'torch', 'transformers', 'scipy', 'nltk', 'dp_accounting', 'plotly', 'pandas'}\n"
        "print(sorted(heavy & set(sys.modules)), time.process_time() < 2)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60, env=dict(os.environ)
    )
    assert done.stdout.splitlines() == ["2", "[] True"], done.stderr
    assert "2 × not JSON: lines 2, 3" in done.stderr
