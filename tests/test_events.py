"""The log of a run: each kind of event written and read, what is torn or broken, rewinding, following."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_report import RUN, device_round, finished_round, told_by_hand

from florilegium.simulation.config import load_config
from florilegium.simulation.reports.run_report import render_report
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.events import (
    KINDS,
    DeviceFailure,
    DeviceRound,
    Event,
    Outcome,
    RoundEnd,
    RunEnd,
    RunStart,
    ShownReply,
    WorldRound,
    append,
    follow,
    read,
    rewind,
)
from florilegium.simulation.runs.folder import RunFolder
from florilegium.simulation.runs.summary import read_summary, write_summary
from florilegium.simulation.settings import find_config

# One line of each kind as version 0.1.0 wrote it.
OLD = """
{"event": "run", "time": 1763800000.5, "name": "quickstart", "engine": "cohort", "seed": 0, "rounds": 1, "devices": 2, "model": {"name": "nano", "parameters": 2557632, "architecture": "LlamaForCausalLM", "dtype": "float32"}, "data": {"name": "chitchat", "split": "test", "people": 2}, "hardware": "2 cores, cpu", "versions": {"torch": "2.9.0"}, "privacy": {"mode": "example-local", "unit": "one dialogue", "adjacency": "replace-one", "trust": "nobody", "not_covered": "much", "epsilon_budget": 8.0, "delta": 1e-05, "noise_multiplier": 1.1, "clip_norm_l2": 1.0, "sampling_rate": 0.5, "steps_per_round": 1, "accountant": "PLD"}, "config": {"server": {"rule": "mean"}, "rounds": 1}}
{"event": "device_round", "time": 1763800001.5, "round": 1, "device": "device-00000", "tokens_trained": 0, "arrived": 4, "accepted": 3, "buffered": 3, "buffer_bytes": 900, "truncated": 0, "annotations": 3, "epsilon": 8.0, "upload_bytes": 100, "synthetic_kept": 0, "synthetic_rejected": 0, "synthetic_reasons": {}, "personal_loss_first": null, "personal_loss_last": null, "personal_examples": 0, "personal_steps": 0}
{"event": "device_round", "time": 1763800001.5, "round": 1, "device": "device-00001", "tokens_trained": 0, "arrived": 4, "accepted": 3, "buffered": 3, "buffer_bytes": 900, "truncated": 0, "annotations": 3, "epsilon": null, "refusal": "budget-spent", "upload_bytes": 0}
{"event": "world", "time": 1763800002.5, "round": 1, "starts_s": 0.0, "duration_s": 9.5, "fates": [{"device": "device-00000", "device_class": "phone", "outcome": "too-small", "arrives_s": null, "busy_s": 0.0, "energy_joules": 0.0, "down_bytes": 0, "up_bytes": 0}]}
{"event": "round", "time": 1763800002.5, "round": 1, "devices": 2, "releases": 1, "silent": 0, "refused": {"no-release": 1}, "averaging_error": null, "held_bytes": 0, "seconds": {"observe": 1.5}, "signal_to_noise": null, "change_norm_l2": 0.5, "shared_norm_l2": 0.25, "download_bytes": 200}
{"event": "evaluation", "time": 1763800003.5, "arm": "base", "metric": "nll", "mean_per_user": NaN, "mean_per_query": 4.0, "ci95": [NaN, Infinity], "round": 1, "final": true, "users": 2, "queries": 4}
{"event": "replies", "time": 1763800003.5, "device": "device-00000", "prompt": "half \\ud83d of it", "recorded": "a", "before": "b", "after": "c"}
{"event": "result", "time": 1763800003.5, "device": "device-00000", "arm": "base", "nll": 4.0, "queries": 2}
{"event": "comparison", "time": 1763800003.5, "metric": "nll", "better": "personal", "than": "base", "mean_difference": -0.5, "ci95": [-0.75, -0.25], "users": 2, "users_better": 2}
{"event": "newcomers", "time": 1763800003.5, "arm": "base", "metric": "nll", "users": 2, "mean_per_user": 4.0, "mean_per_query": 4.0, "ci95": [3.0, 5.0]}
{"event": "newcomers_comparison", "time": 1763800003.5, "metric": "nll", "better": "shared", "than": "base", "mean_difference": -0.5, "ci95": [-0.75, -0.25], "users": 2, "users_better": 2}
{"event": "fairness", "time": 1763800003.5, "wall_s": 9.5, "rounds": 1, "classes": {"phone": {"devices": 0, "asked": 1, "answered": 0, "outcomes": {"too-small": 1}, "share_of_answers": null, "seconds": 0.0, "bytes": 0, "joules": 0.0, "utility": {"mean": null, "ci95": null}}}, "fairness": {"utility_by_data_quartile": [{"least_data": 4.0, "most_data": 4.0, "devices": 1, "utility": {"mean": 0.5, "ci95": [0.5, 0.5]}}], "jain_participation": null, "worst_decile_utility": 0.5}}
{"event": "failure", "time": 1763800003.5, "round": 1, "device": "device-00001", "what": "release", "error": "OSError: full"}
{"event": "end", "time": 1763800004.5, "wall_s": 4.25, "peak_rss_bytes": 1000, "tokens_trained": 0, "devices_bytes": 2000, "interrupted": false}
""".lstrip()  # noqa: E501
LATER = {"person", "person_comparison", "person_result"}  # kinds that it did not know
FIRST = OLD.splitlines(keepends=True)[0]
OF_A_SERVER = '{"event": "round", "time": 1.5, "round": 1, "releases": 2, "silent": 0, "refused": {}, "change_norm_l2": 0.5, "signal_to_noise": NaN, "signal_to_noise_floor": NaN, "averaging_error": null, "held_bytes": 0, "failed_adoptions": 0}\n'  # noqa: E501


def log(folder: Path, text: str) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_log_of_an_older_version_reads_and_is_written_the_same(tmp_path: Path) -> None:
    """Byte by byte but for the time, and for fields that came later."""
    path = log(tmp_path, OLD)
    events = list(read(path))
    assert {e.kind for e in events} == KINDS.keys() - LATER
    assert [e.time for e in events][:2] == [1763800000.5, 1763800001.5]
    append(tmp_path / "again.jsonl", events)
    lines = zip(OLD.splitlines(), (tmp_path / "again.jsonl").read_text().splitlines(), events, strict=True)
    for old, new, event in lines:
        before, after = json.loads(old), json.loads(new)
        if event.kind in ("run", "round"):  # held_out, held_out_met, sources, failed_adoptions, signal_to_noise_floor
            after = {k: v for k, v in after.items() if k in before}
            after["data"] = before.get("data")
            before["data"] = before.get("data")
        assert list(before) == list(after) and str(before | {"time": 0}) == str(after | {"time": 0})


def test_what_an_old_log_says_is_read(tmp_path: Path) -> None:
    run, idle, failed, world, over, *_, end = read(log(tmp_path, OLD))
    assert isinstance(run, RunStart) and run.data.people == 2 and run.changed is None and run.sources == ""
    assert isinstance(idle, DeviceRound) and idle.personal_loss_first is None and idle.personal_examples == 0
    assert isinstance(failed, DeviceRound) and failed.refusal == "budget-spent" and failed.synthetic_kept is None
    assert isinstance(world, WorldRound) and world.fates == (Outcome("device-00000", "phone", "too-small"),)
    assert isinstance(over, RoundEnd) and over.signal_to_noise_floor is None and over.seconds == {"observe": 1.5}
    assert isinstance(end, RunEnd) and not end.interrupted
    (told,) = read(log(tmp_path, OF_A_SERVER))
    assert isinstance(told, RoundEnd) and told.releases == 2 and told.devices is told.seconds is None


def test_a_summary_of_an_old_log_is_read_back(tmp_path: Path) -> None:
    written = write_summary(RunFolder(log(tmp_path, OLD).parent))
    found = read_summary(tmp_path)
    assert str(found.nll) == str(written.nll) and list(found.nll) == ["base"]  # NaN is not what it is
    assert replace(found, nll={}) == replace(
        written,
        nll={},
        comparisons=tuple(replace(c, time=0.0) for c in written.comparisons),
        newcomers_comparisons=tuple(replace(c, time=0.0) for c in written.newcomers_comparisons),
        world=replace(written.world, time=0.0) if written.world else None,
    )
    with pytest.raises(RunError, match="has not been finished"):
        read_summary(tmp_path / "elsewhere")


NUMBERS = st.floats(allow_nan=False)  # which is not what it is


@given(st.lists(st.sampled_from(told_by_hand()), max_size=20), st.text(max_size=9), NUMBERS, st.integers(0, 2**62))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, events: list[Event], text: str, number: float, count: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    more = [
        ShownReply(device=text, prompt=text, recorded=text, before=text, after=text),
        replace(finished_round(count), change_norm_l2=number),
        DeviceFailure(round=count, device="d", what=text, error=text),
    ]
    append(path, [*events, *more])
    found = list(read(path))
    assert len({e.time for e in found}) == 1 and all(e.time > 0 for e in found)
    assert [replace(e, time=0.0) for e in found] == [replace(e, time=0.0) for e in [*events, *more]]


def test_only_a_last_line_without_an_end_is_passed_over(tmp_path: Path) -> None:
    whole = log(tmp_path, OLD)
    count = len(list(read(whole)))
    last = OLD.splitlines()[-1]
    for torn in ('{"event": "run", "na', "{", '{"event": "replies", "prompt": "\\ud83'):
        assert len(list(read(log(tmp_path, OLD + torn)))) == count
    assert len(list(read(log(tmp_path, OLD + last)))) == count + 1  # which is whole, but for its end
    with pytest.raises(RunError, match=rf"metrics\.jsonl, line {count + 1} is not JSON"):
        list(read(log(tmp_path, OLD + "{\n")))


BROKEN = {
    "no JSON": ("{", "line 2 is not JSON"),
    "an empty line": ("", "line 2 is not JSON"),
    "no object": ("[1]", "line 2: None is no kind of event"),
    "an unknown kind": ('{"event": "rounds"}', "line 2: 'rounds' is no kind of event of this version"),
    "a field too few": ('{"event": "failure", "round": 1, "device": "d", "what": "x"}', "line 2: 'error' of the event"),
    "another type": (
        '{"event": "failure", "round": "one", "device": "d", "what": "x", "error": "y"}',
        "line 2: 'round' of the event 'failure'",
    ),
    "an outcome that is none": (
        '{"event": "world", "round": 1, "starts_s": 0, "duration_s": 1, '
        '"fates": [{"device": "d", "device_class": "c", "outcome": "lost"}]}',
        r"line 2: 'fates\.0\.outcome' of the event 'world'",
    ),
}


def unchanged(event: Event, facts: dict[str, Any]) -> dict[str, Any]:
    return facts


READERS: dict[str, Callable[[Path], Any]] = {
    "reader": lambda path: list(read(path)),
    "run": lambda path: list(RunFolder(path.parent).events_of(RunEnd)),
    "report": lambda path: render_report(path.parent),
    "summary": lambda path: write_summary(RunFolder(path.parent)),
    "rewind": lambda path: rewind(path, unchanged),
    "resume": lambda path: RunFolder(path.parent).rewind(1),
    "follow": lambda path: list(follow(path, every_s=0, over=lambda: True)),
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("reader", READERS)
def test_a_broken_line_is_an_error_of_every_reader_with_its_number_and_is_kept(
    reader: str, broken: str, tmp_path: Path
) -> None:
    line, message = BROKEN[broken]
    config = load_config(find_config("quickstart"), ["rounds=1"])
    (tmp_path / "config.toml").write_text(f"rounds = {config.rounds}\n")
    start = json.loads(FIRST) | {"config": config.model_dump(mode="json"), "sources": ""}
    path = log(tmp_path, json.dumps(start) + "\n" + line + "\n" + OLD.splitlines(keepends=True)[-1])
    before = path.read_bytes()
    with pytest.raises(RunError, match=message):
        READERS[reader](path)
    assert path.read_bytes() == before


def test_what_another_version_adds_is_passed_over_and_stays(tmp_path: Path) -> None:
    line = json.dumps(json.loads(FIRST) | {"colour": "green"}) + "\n"
    path = log(tmp_path, line + OLD + '{"torn')
    assert next(iter(read(path))) == next(iter(read(log(tmp_path / ".", line))))
    rewind(log(tmp_path, line + OLD + '{"torn'), unchanged)
    assert path.read_text() == line + OLD


def test_rewinding_drops_and_changes_what_it_is_told_to(tmp_path: Path) -> None:
    path = log(tmp_path, OLD)
    rewind(path, lambda event, facts: facts | {"name": "other"} if isinstance(event, RunStart) else None)
    (event,) = read(path)
    assert isinstance(event, RunStart) and event.name == "other" and event.time == 1763800000.5


@pytest.mark.parametrize(("left", "kept"), [("", ""), ('{"event": "rou', ""), (FIRST.strip(), FIRST)])
def test_nothing_is_written_onto_a_torn_line(left: str, kept: str, tmp_path: Path) -> None:
    """As by a server that was killed and goes on with its log."""
    path = log(tmp_path, OF_A_SERVER + left)
    append(path, [finished_round(2)])
    assert path.read_text().startswith(OF_A_SERVER + kept + '{"event": "round", "time": ')
    assert len(list(read(path))) == 2 + bool(kept)
    append(log(tmp_path, left), [finished_round(2)])  # as its first line
    assert len(list(read(path))) == 1 + bool(kept)


def test_a_run_that_goes_on_is_followed_to_its_end(tmp_path: Path) -> None:
    """Before there is a log, over a line that is half written, and over one that is written anew; a step a look."""
    path, whole = tmp_path / "metrics.jsonl", OLD.splitlines(keepends=True)[1]
    end = RunEnd(wall_s=1, peak_rss_bytes=1, tokens_trained=1, interrupted=True)

    def write(text: str) -> None:
        with path.open("a") as stream:
            stream.write(text)

    steps = iter([
        lambda: None,
        lambda: append(path, [RUN]),
        lambda: write(whole[:30]),
        lambda: write(whole[30:]),
        lambda: rewind(path, lambda event, facts: facts if isinstance(event, RunStart) else None),
        lambda: append(path, [device_round(1), end]),
    ])  # fmt: skip

    def over() -> bool:
        next(steps)()
        return False

    seen = [e.kind for e in follow(path, every_s=0, over=over)]
    assert seen == ["run", "device_round", "run", "device_round", "end"]


def test_following_ends_when_it_is_told_to(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert list(follow(path, over=lambda: True)) == []
    append(path, [RUN])
    assert [e.kind for e in follow(path, over=lambda: True)] == ["run"]
