"""A study: its cells, what they share, going on after a stop, the tests by hand, the report."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console

from florilegium.client.calibration import release_noise
from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.config import ModelConfig, SamplingConfig
from florilegium.client.lm.model import LanguageModel
from florilegium.client.selection.lexicons import LexiconError
from florilegium.simulation.cli.main import main
from florilegium.simulation.config import load_config
from florilegium.simulation.data.population import DataConfig, Replies
from florilegium.simulation.data.troubles import TroublesConfig
from florilegium.simulation.evaluation.caching_model import CachingModel
from florilegium.simulation.evaluation.metrics import Comparison
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.settings import ConfigError, config_folder, find_config
from florilegium.simulation.studies.cell import SharedResources
from florilegium.simulation.studies.config import Study, TableConfig, load_study
from florilegium.simulation.studies.difference_map import difference_maps
from florilegium.simulation.studies.figures import _within
from florilegium.simulation.studies.preflight import ready
from florilegium.simulation.studies.privacy_utility import outcomes, reaches
from florilegium.simulation.studies.published import PUBLISHED
from florilegium.simulation.studies.runner import run_study
from florilegium.simulation.studies.selection_cell import SelectionCell
from florilegium.simulation.studies.statistics import Contrast, contrasts, corrected, entries, entry
from florilegium.simulation.studies.statistics import contrast as contrast_of
from florilegium.simulation.studies.study_report import read_report

SMALL = """
rounds = 2
model = { dtype = "float32", limits = { prompt_tokens = 16, reply_tokens = 16 } }
data = { name = "chitchat", users = 2, split = "development", max_pairs = 40, queries_per_user = 3 }
selection = { bins = 4 }
synthesis = { per_dialogue = 1, instruction = "Rewrite: ", sampling = { max_new_tokens = 8, temperature = 0.5 } }
personal = { steps = 2, batch_size = 4 }
evaluation = { sampling = { max_new_tokens = 6 }, rouge_queries_per_user = 2 }

[study]
seeds = 2

[study.tables.policies]
title = "Policies"
rows = { "selection.policy" = ["none", "fifo", "quality", "oasis"] }
against = ["selection.policy=random"]
published = "policy"

[study.tables.bins]
rows = { "selection.policy" = ["fifo"] }
columns = { "selection.bins" = [2, 4] }
"""


def written(folder: Path, text: str = SMALL) -> Path:
    path = folder / "small.toml"
    path.write_text(text, encoding="utf-8")
    return path


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """What cells found, without what a clock said of it."""
    found = {}
    for path in sorted(folder.glob("cells/*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        result.pop("finished")
        for line in result["rounds"]:
            line.pop("seconds"), line.pop("spared_s")
        found[path.parent.name] = result
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    folder = tmp_path_factory.mktemp("study")
    study = load_study(written(folder), ["study.workers=2"])
    run_study(study, folder / "small", lambda phase: None)
    return study, folder / "small"


def test_what_has_a_name_is_read_once_for_all_that_is_drawn_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def collected(config: DataConfig) -> Replies:
        read.append(config.name)
        said = tuple(Dialogue(f"u:{k}:1", f"what of {k}?", f"reply {k}", float(k)) for k in range(40))
        return Replies({f"u{k}": said for k in range(8)}, anonymous=False, empty=0, repeated=0)

    monkeypatch.setattr("florilegium.simulation.studies.cell.collect", collected)
    bench, config = SharedResources(frozenset()), DataConfig(users=2, split="all")
    clean = bench.people(config, 2, 0)
    bursts = bench.people(config.model_copy(update={"troubles": TroublesConfig(kind="junk", share=0.5)}), 2, 0)
    assert read == ["chitchat"] and list(clean) == list(bursts) == ["seed0-000", "seed0-001", "seed1-000", "seed1-001"]
    assert clean["seed0-000"].stream != bursts["seed0-000"].stream
    bench.people(config.model_copy(update={"context_turns": 2}), 2, 0)
    assert read == ["chitchat"] * 2


# -- settings -----------------------------------------------------------------------------------------------------


def test_the_same_settings_are_one_cell_in_every_table(tmp_path: Path) -> None:
    study = load_study(written(tmp_path))
    policies = [(c.config.selection.policy, c.config.selection.bins) for c in study.cells.values()]
    assert policies == [("none", 4), ("random", 4), ("fifo", 4), ("quality", 4), ("oasis", 4), ("fifo", 2)]
    assert all(c.config.shared.pool_capacity == 0 for c in study.cells.values())


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"quality"', '"qality"', r"small.toml, cell \{'selection.policy': 'qality'\}: selection.policy"),
        ("seeds = 2", "seeds = 0", "study: seeds"),
        ("[study.tables.bins]", "[study.tabels.bins]", "did you mean 'tables'"),
        ('against = ["selection.policy=random"]', 'against = ["random"]', "must be key=value"),
        ('published = "policy"', 'published = "poliy"', "must be one of policy, synthesis"),
        (
            'columns = { "selection.bins" = [2, 4] }',
            'columns = { "selection.bins" = [] }',
            "selection.bins has no values",
        ),
        ('against = ["selection.policy=random"]', 'against = ["data.users=1"]', "other people: no pairs"),
        ("[study.tables.bins]", '[study.tables.bins]\nfixed = { "privacy.epsilon" = 3 }', "cannot be varied"),
    ],
)
def test_what_is_wrong_in_any_cell_is_told_before_anything_runs(tmp_path: Path, old: str, new: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_study(written(tmp_path, SMALL.replace(old, new)))


def test_a_run_and_a_study_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="florilegium study"):
        load_config(written(tmp_path))
    with pytest.raises(ConfigError, match=r"no \[study\]"):
        load_study(find_config("quickstart"))


def test_a_value_of_a_table_is_not_changed_by_a_cell(tmp_path: Path) -> None:
    nested = SMALL.replace("[study.tables.bins]", "[study.tables.bins]\nfixed = { personal = { steps = 7 } }")
    study = load_study(written(tmp_path, nested.replace("[study.tables.policies]", "[study.tables.first]")))
    table = study.config.tables["bins"].model_copy(update={"against": ("personal.steps=1",)})
    label = table.labels()[0][0]
    assert study.cell(table, label, "personal.steps=1").config.personal.steps == 1
    assert study.cell(table, label).config.personal.steps == 7


def test_what_a_study_lacks_is_told_before_it_begins(tmp_path: Path) -> None:
    missing = SMALL.replace("bins = 4 }", f'bins = 4, lexicons = ["{tmp_path}/none.toml"] }}')
    told: list[str] = []
    with pytest.raises(LexiconError, match="No such file"):
        run_study(load_study(written(tmp_path, missing)), tmp_path / "s", told.append)
    assert told == []


@pytest.mark.parametrize("path", sorted((config_folder() / "selection").glob("*.toml")), ids=lambda p: p.stem)
def test_the_bundled_studies_can_be_read_and_say_how_to_launch_them(path: Path) -> None:
    name = f"selection/{path.stem}"
    assert path.read_text(encoding="utf-8").startswith(f"# florilegium study configs/{name}.toml\n")
    assert find_config(name) == find_config(f"configs/{name}.toml") or find_config(name).samefile(path)
    assert load_study(path).cells


# -- cells --------------------------------------------------------------------------------------------------------


def test_nobody_is_in_two_seeds_and_every_cell_has_the_same_people() -> None:
    config = DataConfig(users=3, split="development", max_pairs=40)
    people = SharedResources(frozenset()).people(config, seeds=2, seed=0)
    assert list(people) == ["seed0-000", "seed0-001", "seed0-002", "seed1-000", "seed1-001", "seed1-002"]
    assert len({user.id for user in people.values()}) == 6
    assert SharedResources(frozenset()).people(config, seeds=2, seed=0) == people


def test_equal_cost_is_equal(finished: tuple[Study, Path]) -> None:
    """Everything but the bounds: as many bins and steps; each line states what was asked of the user."""
    study, folder = finished
    table = study.config.tables["policies"]
    none, *others = [row[0] for row in entries(study, folder, table)]
    assert (none.cost.bins, none.cost.steps, none.cost.annotations) == (0, 0, 0)
    for e in others:
        assert (e.cost.bins, e.cost.steps) == (4, 4)  # two rounds of two steps
        rounds = e.result["rounds"]
        assert e.cost.annotations >= 4 and e.cost.failed == 0
        assert sum(r["arrived"] for r in rounds) == sum(30 for _ in e.result["devices"])
        assert rounds[-1]["buffer_bytes"] <= 4 * 4 * 22 * 1024


def test_nothing_learned_is_the_base_model(finished: tuple[Study, Path], lm: LanguageModel) -> None:
    study, folder = finished
    table = study.config.tables["policies"]
    none = entries(study, folder, table)[0][0]
    config = study.cell(table, none.label).config
    plain = LanguageModel.load(config.model)
    users = SharedResources(frozenset()).people(config.data, 2, config.seed)
    for user, found in zip(users.values(), none.nll.by_user, strict=True):
        scores = plain.score(plain.format.dialogues(user.held_out), [0] * 3, [])
        assert sum(s.nll for s in scores) / sum(s.tokens for s in scores) == pytest.approx(found, rel=1e-5)
    assert none.nll == none.shuffled


def test_a_study_that_was_stopped_goes_on_as_if_it_had_not_been(finished: tuple[Study, Path], tmp_path: Path) -> None:
    """Stopped at each kind of place, again and again; the results are bit for bit those of one go, by two processes."""
    folder = finished[1]
    study = load_study(written(tmp_path), ["study.workers=1"])
    stops = iter(
        ("cell 2 of 6: annotate", "cell 2 of 6: evaluate", "cell 3 of 6: learn_personal", "cell 5 of 6: reply")
    )
    stop: str | None = next(stops)

    def listen(phase: str) -> None:
        if phase == stop:
            raise KeyboardInterrupt

    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            run_study(study, tmp_path, listen)
        stop = next(stops, None)
    run_study(study, tmp_path, listen)
    assert results(tmp_path) == results(folder)
    assert not list(tmp_path.glob("cells/*/devices"))


def test_a_torn_line_is_cut_off(finished: tuple[Study, Path], tmp_path: Path) -> None:
    study, _ = finished
    cell = next(iter(study.cells.values()))
    run = SelectionCell(cell, tmp_path, SharedResources(frozenset()), lambda phase: None)
    (tmp_path / "rounds.jsonl").write_text('{"round": 1}\n{"round": 2, "nl')
    assert run._finished() == [{"round": 1}]
    assert (tmp_path / "rounds.jsonl").read_text() == '{"round": 1}\n'


@pytest.mark.slow
def test_a_study_that_was_killed_goes_on(tmp_path: Path) -> None:
    """kill -9 at times that fall anywhere; in the end the same results as in one go."""
    config = written(tmp_path)
    command = [sys.executable, "-m", "florilegium", "study", str(config), "--studies"]
    subprocess.run([*command, str(tmp_path / "one")], check=True, capture_output=True)
    kills = 0
    for delay in (6.0, 7.0, 8.0, 9.0, 10.0, 60.0, 300.0):
        process = subprocess.Popen(
            [*command, str(tmp_path / "other")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        began = time.monotonic()
        while process.poll() is None and time.monotonic() - began < delay:
            time.sleep(0.05)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.returncode == 0 and kills >= 2
    assert results(tmp_path / "one" / "small") == results(tmp_path / "other" / "small")


# -- processes ----------------------------------------------------------------------------------------------------


TWO_CELLS = """
rounds = 1
model = { dtype = "float32", limits = { prompt_tokens = 16, reply_tokens = 16 } }
data = { name = "chitchat", users = 3, split = "development", max_pairs = 40, queries_per_user = 2 }
selection = { bins = 4 }
synthesis = { per_dialogue = 0 }
shared = { pool_capacity = 8, adapter = { targets = ["v_proj"] } }
evaluation = { rouge_queries_per_user = 0 }

[study]
kind = "federated"
seeds = 3

[study.tables.budget]
rows = { "privacy.epsilon" = [2.0, 8.0] }
"""


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children())


@pytest.fixture
def before() -> set[psutil.Process]:
    """Processes that other tests have left."""
    return _children()


def found_in(folder: Path) -> dict[str, str]:
    """All that a study has written, but for clocks and reports."""
    clocks = ("seconds", "seconds_by_phase", "finished", "hardware")

    def plain(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {k: plain(v) for k, v in tree.items() if k not in clocks}
        return [plain(v) for v in tree] if isinstance(tree, list) else tree

    return {
        str(p.relative_to(folder)): json.dumps(plain(json.loads(p.read_text(encoding="utf-8"))))
        for p in sorted(folder.rglob("*.json"))
    }


@pytest.mark.slow
def test_two_processes_find_what_one_finds_to_the_bit(tmp_path: Path, before: set[psutil.Process]) -> None:
    """Seeds of two cells; the second study is stopped after the first seed, and goes on with another number."""
    path, said = written(tmp_path, TWO_CELLS), list[str]()
    one, two, three = (load_study(path, [f"study.workers={n}"]) for n in (1, 2, 3))
    run_study(one, tmp_path / "one", said.append)
    assert {s.partition(": ")[0] for s in said} == {"cell 1 of 2", "cell 2 of 2"}

    def stop(phase: str) -> None:
        said.append(phase)
        if "parts done" in phase and not phase.startswith("0 of 6"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(two, tmp_path / "two", stop)
    assert not _children() - before
    assert 1 <= len(list((tmp_path / "two").glob("cells/*/seed*.json"))) < 6
    run_study(three, tmp_path / "two", said.append)
    assert found_in(tmp_path / "one") == found_in(tmp_path / "two")
    assert len(found_in(tmp_path / "one")) == 2 * (3 + 1) + 2  # seeds and results, study.json and people.json
    assert not _children() - before


@pytest.mark.slow
def test_a_process_that_is_lost_is_replaced_and_its_part_done_again(
    finished: tuple[Study, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: set[psutil.Process]
) -> None:
    """One process dies in a cell, once: nothing is missing. One that dies each time ends the study."""
    study, folder = finished
    run, killed = SelectionCell.run, tmp_path / "killed"

    def dying(cell: SelectionCell) -> Any:
        if cell.config.selection.policy == "quality" and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return run(cell)

    monkeypatch.setattr(SelectionCell, "run", dying)
    run_study(study, tmp_path / "study", lambda phase: None)
    assert killed.exists() and results(tmp_path / "study") == results(folder)

    def always(cell: SelectionCell) -> Any:
        os.kill(os.getpid(), signal.SIGKILL) if cell.config.selection.policy == "quality" else run(cell)

    monkeypatch.setattr(SelectionCell, "run", always)
    with pytest.raises(RunError, match="processes were lost"):
        run_study(study, tmp_path / "other", lambda phase: None)
    assert not _children() - before


def test_an_error_in_a_cell_ends_the_study_and_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: set[psutil.Process]
) -> None:
    """At once: another cell, which would take a minute, is not waited for."""
    study = load_study(written(tmp_path), ["study.workers=2"])

    def broken(cell: SelectionCell) -> Any:
        if cell.config.selection.policy == "random":
            raise RunError("a disk is full")
        time.sleep(60)

    monkeypatch.setattr(SelectionCell, "run", broken)
    began = time.monotonic()
    with pytest.raises(RunError, match="a disk is full") as raised:
        run_study(study, tmp_path / "study", lambda phase: None)
    assert time.monotonic() - began < 30 and not _children() - before
    assert str(tmp_path / "study" / "cells") in raised.value.__notes__[0]


def test_the_number_of_processes_of_a_single_run_is_refused_in_a_study(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"workers = 2 is of a single run; a study's are study\.workers"):
        load_study(written(tmp_path), ["workers=2"])


# -- what is remembered -------------------------------------------------------------------------------------------


def test_a_remembered_answer_is_the_answer(lm: LanguageModel) -> None:
    config = ModelConfig(dtype="float32")
    remembering = CachingModel.load(config)
    assert isinstance(remembering, CachingModel)
    remembering.readings = ("mean", "gradient")
    texts, sampling = (
        ["do you like films", "no", "do you like films"],
        SamplingConfig(max_new_tokens=6, temperature=1.0),
    )
    first, again = remembering.embed(texts), remembering.embed(texts[:1])
    assert remembering.cached_seconds > 0
    assert again[0] is first[0] is first[2]
    plain = lm.embed(texts)
    assert all(
        torch.allclose(f.readings["mean"].vector, p.readings["mean"].vector, atol=1e-5)
        for f, p in zip(first, plain, strict=True)
    )
    prompts, seeds = ["hello", "hello", "hello"], [1, 2, 1]
    assert remembering.generate(prompts, [0] * 3, [], sampling, seeds) == lm.generate(
        prompts, [0] * 3, [], sampling, seeds
    )
    layout = lm.layout(load_config(find_config("quickstart")).personal.adapter)
    row = torch.randn(layout.width) * 0.5
    on = [remembering.adapters(layout, row)]
    assert remembering.generate(["hello"], [0], on, sampling, [1]) == lm.generate(["hello"], [0], on, sampling, [1])
    assert remembering.generate(["hello"], [0], [], sampling, [1]) != remembering.generate(
        ["hello"], [0], on, sampling, [1]
    )


# -- tables -------------------------------------------------------------------------------------------------------


def contrast(p: float, *, equal: bool = True, difference: float = -0.1) -> Contrast:
    return Contrast("a", "b", "nll", Comparison(difference, (0, 0), 4, 3), 2, 2, p, equal)


def test_holm_by_hand() -> None:
    """p = .01, .02, .03 of three: 3 · .01, 2 · .02, 1 · .03, none below one before it."""
    family = [contrast(0.03), contrast(0.01), contrast(0.02), contrast(1e-9, equal=False)]
    assert [c.p_holm for c in corrected(family)] == [
        pytest.approx(0.04),
        pytest.approx(0.03),
        pytest.approx(0.04),
        None,
    ]
    assert [c.verdict for c in corrected([contrast(0.03), contrast(0.04)])] == ["no difference shown"] * 2
    assert corrected([contrast(0.04)])[0].verdict == "better"
    assert corrected([contrast(0.04, difference=0.1)])[0].verdict == "worse"
    assert replace(contrast(0.04), equal_cost=False).verdict == "not at equal cost"


def test_a_failed_training_is_no_comparison_at_equal_cost(finished: tuple[Study, Path], tmp_path: Path) -> None:
    study, folder = finished
    shutil.copytree(folder, tmp_path / "copy")
    table = study.config.tables["policies"]
    cell = study.cell(table, (("selection.policy", "fifo"),))
    path = tmp_path / "copy" / "cells" / cell.key / "result.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    result["rounds"][0]["failed"] = ["the loss of step 0 is nan"]
    path.write_text(json.dumps(result), encoding="utf-8")
    fifo = next(c for c in contrasts(study, tmp_path / "copy", table) if c.name == "fifo")
    assert not fifo.equal_cost and fifo.verdict == "not at equal cost"


def test_intervals_within_devices_by_hand() -> None:
    """Two points that differ by exactly 1 within each of three very different devices: no spread is left."""
    one, other = _within([[1.0, 10.0, 100.0], [2.0, 11.0, 101.0]])
    assert list(one) == pytest.approx([37.0] * 3) and list(other) == pytest.approx([38.0] * 3)
    noisy = np.random.default_rng(0).normal(size=(2, 4000)) + np.arange(4000)
    spread = [float(np.std(u)) for u in _within(noisy.tolist())]
    assert spread == pytest.approx([1, 1], abs=0.05)  # that of one point alone, not 1 / sqrt(2) of it


def test_contrasts_are_paired_by_device(finished: tuple[Study, Path]) -> None:
    study, folder = finished
    table = study.config.tables["policies"]
    found = {(c.name, c.metric): c for c in contrasts(study, folder, table)}
    _, fifo, *_ = [row[0] for row in entries(study, folder, table)]
    of_random = read(folder, study.cell(table, fifo.label, "selection.policy=random").key)
    by_hand = [a - b for a, b in zip(fifo.nll.by_user, of_random["nll"]["by_user"], strict=True)]
    assert found["fifo", "nll"].found.mean_difference == pytest.approx(sum(by_hand) / 4)
    assert found["fifo", "nll"].found.users_better == sum(d < 0 for d in by_hand)
    assert not found["none", "nll"].equal_cost and found["none", "nll"].p_holm is None
    assert len(found) == 4 * 2


def read(folder: Path, key: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "cells" / key / "result.json").read_text(encoding="utf-8"))
    return result


def test_the_papers_figures_stand_where_they_belong(tmp_path: Path) -> None:
    study = load_study(written(tmp_path), ["data.name=dolly"])
    table = study.config.tables["policies"]
    cells = {c.config.selection.policy: c.config for c in study.cells.values()}
    assert table.published == "policy"
    assert PUBLISHED["policy"](cells["quality"]) == 0.3465 and PUBLISHED["policy"](cells["random"]) == 0.241
    assert PUBLISHED["policy"](cells["oasis"]) is None and PUBLISHED["synthesis"](cells["quality"]) is None


def test_a_map_has_each_cell_less_the_one_of_its_row_that_it_is_compared_with(finished: tuple[Study, Path]) -> None:
    """By hand: the cell's mean less that of `bins=2` in its row, which for `bins=2` itself there is not."""
    study, folder = finished
    axes = {"rows": {"selection.policy": ["fifo", "random"]}, "columns": {"selection.bins": [2, 4]}}
    table = TableConfig.model_validate({**axes, "against": ["selection.bins=2"]})
    fifo = [entry(study, folder, table, label) for label in table.labels()[0]]
    rows = [fifo, [replace(e, label=(("selection.policy", "random"), *e.label[1:])) for e in fifo]]
    pairs = [(e.nll, fifo[0].nll) for row in rows for e in row[1:]]
    found = [
        contrast_of(row[1].name, "bins 2", "nll", pair, [0, 0, 1, 1]) for row, pair in zip(rows, pairs, strict=True)
    ]
    (made,) = difference_maps(table, rows, corrected([c for c in found if c]))
    assert (made.than, made.metric, list(made.rows), list(made.columns)) == (
        "bins 2", "nll", ["fifo", "random"], ["bins 2", "bins 4"],
    )  # fmt: skip
    assert [row[0] for row in made.texts] == ["–", "–"]
    by_hand = fifo[1].nll.mean_per_user - fifo[0].nll.mean_per_user
    assert made.cells[0][1] and made.cells[0][1].found.mean_difference == pytest.approx(by_hand)
    assert made.texts[0][1].startswith(f"{by_hand:+.3f} ± ") and made.drawn().data[0].z[0][0] is None
    assert difference_maps(table, rows[:1], []) == []


def test_the_report_says_what_was_shown_and_what_was_not_equal(finished: tuple[Study, Path]) -> None:
    study, folder = finished
    page = read_report(study, folder).write(folder).read_text(encoding="utf-8")
    assert "Policies" in page and "http-equiv" in page and "oasis" in page
    assert "Not equal in all cells" in page
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert [c["label"]["selection.policy"] for c in summary["tables"]["policies"]["cells"]] == [
        "none", "fifo", "quality", "oasis",
    ]  # fmt: skip
    assert summary["tables"]["bins"]["cells"][1]["nll"] == summary["tables"]["policies"]["cells"][1]["nll"]


def test_the_command_runs_a_study_and_refuses_another_in_its_folder(
    finished: tuple[Study, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = finished
    config = written(tmp_path)
    monkeypatch.setattr(sys, "argv", ["florilegium", "study", str(config), "--studies", str(folder.parent)])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert "Policies" in capsys.readouterr().out.replace("\n", "")
    (folder / "study.json").write_text('{"name": "other"}', encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "holds another study" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("FLORILEGIUM_DATA"), reason="FLORILEGIUM_DATA is unset: the studies' data is absent"
)
@pytest.mark.parametrize("path", sorted((config_folder() / "selection").glob("*.toml")), ids=lambda p: p.stem)
def test_every_bundled_study_runs_on_its_data(path: Path, tmp_path: Path) -> None:
    """All cells and the report, with the bundled model and as little of everything as there can be."""
    least = [
        "model.name=nano",
        "study.seeds=1",
        "rounds=1",
        "selection.bins=2",
        "personal.steps=1",
        "data.min_pairs=8",
        "data.max_pairs=12",
        "data.queries_per_user=1",
        "synthesis.sampling.max_new_tokens=4",
        "synthesis.attempts=1",
        "evaluation.sampling.max_new_tokens=4",
        "evaluation.rouge_queries_per_user=1",
    ]
    if path.stem in ("regimes", "dpp-development", "synthesis"):
        least.append("data.users=2")
    if path.stem == "table":
        least.append('study.tables.buffer.fixed={"data.users" = 1}')  # without its 900 dialogues
    study = load_study(path, least)
    run_study(study, tmp_path, lambda phase: None)
    assert read_report(study, tmp_path).write(tmp_path).exists()
    seeds, resources = load_study(path).config.seeds, SharedResources(frozenset())
    for cell in study.cells.values():  # what the full study asks for is there too
        resources.people(cell.config.data, seeds, cell.config.seed)


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("FLORILEGIUM_DATA"), reason="FLORILEGIUM_DATA is unset: the studies' data is absent"
)
def test_the_bundled_study_of_privacy_runs(tmp_path: Path) -> None:
    """All cells and the report, with few devices and one seed; both studies find as many people as they ask for."""
    paths = sorted((config_folder() / "privacy").glob("*.toml"))
    for path in paths:
        assert (
            len(SharedResources(frozenset()).people(next(iter(load_study(path).cells.values())).config.data, 1, 0))
            == 200
        )
    least = ["study.seeds=1", "data.users=4", "rounds=2", "shared.pool_capacity=6", "selection.bins=4"]
    study = load_study(paths[-1], least)
    run_study(study, tmp_path, lambda phase: None)
    assert read_report(study, tmp_path).write(tmp_path).exists()


# -- studies of federations ---------------------------------------------------------------------------------------

FEDERATED = """
rounds = 2
model = { dtype = "float32", limits = { prompt_tokens = 16, reply_tokens = 16 } }
data = { name = "chitchat", users = 4, split = "development", min_pairs = 24, max_pairs = 32, queries_per_user = 3 }
selection = { policy = "random", bins = 4 }
synthesis = { per_dialogue = 0 }
shared = { pool_capacity = 8, adapter = { targets = ["v_proj"] } }
personal = { adapter = { rank = 2 } }
evaluation = { sampling = { max_new_tokens = 6 }, rouge_queries_per_user = 1 }

[study]
kind = "federated"
seeds = 2
hidden_share = 0.5

[study.tables.example-local]
rows = { "privacy.epsilon" = [1, 8] }

[study.tables.without-noise]
rows = { "privacy.mode" = ["none"] }
"""


@pytest.fixture(scope="module")
def federated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    folder = tmp_path_factory.mktemp("federated")
    study = load_study(written(folder, FEDERATED))
    run_study(study, folder / "study", lambda phase: None)
    return study, folder / "study"


@pytest.mark.slow
def test_a_federated_study_compares_budgets_on_the_same_people(federated: tuple[Study, Path]) -> None:
    study, folder = federated
    one, eight, plain = (o for t in study.config.tables.values() for o in outcomes(study, folder, t))
    assert [round(o.epsilon, 1) for o in (one, eight)] == [1.0, 8.0] and math.isinf(plain.epsilon)
    assert one.noise_multiplier > eight.noise_multiplier > plain.noise_multiplier == 0
    for o in (one, eight, plain):
        assert o.arms == ["base", "local", "shared", "personal", "shuffled"]
        for arm in ("base", "local"):  # what nothing shared can change
            assert o.measured(arm) == one.measured(arm)
        assert (o.gain("shared") == np.mean([o.gain("shared", s) for s in (0, 1)], axis=0)).all()
    assert not np.allclose(one.gain("shared", 0), one.gain("shared", 1))  # other noise
    assert abs(plain.gain("shared")).max() > 0
    assert one.ceiling() < eight.ceiling() < plain.ceiling() == 1
    assert {a for o in (one, eight, plain) for a in o.attacks} >= {"loss, aggregate", "gradient, releases"}


def test_signal_to_noise_by_number_of_devices_by_hand(federated: tuple[Study, Path]) -> None:
    """A mean change of norm 1 that all devices share: a hundred times the devices carry a tenth of the noise."""
    study, folder = federated
    one, eight, plain = (o for t in study.config.tables.values() for o in outcomes(study, folder, t))
    seeds = [{**s, "mean_square": 1.0, "variance": 0.0} for s in plain.seeds]
    found = reaches([one, eight, replace(plain, result={**plain.result, "seeds": seeds})])
    assert [(r.name, r.simulated) for r in found] == [("example-local, ε 1", 4), ("example-local, ε 8", 4)]
    for reach, o in zip(found, (one, eight), strict=True):
        width, of_one = o.seeds[0]["width"], release_noise(o.config, 1, 0).on_device
        assert reach.by_devices[4] == pytest.approx(2 / (of_one * width**0.5))
        assert reach.by_devices[1_000_000] == pytest.approx(10 * reach.by_devices[10_000])


def test_a_federated_study_goes_on_with_the_seed_that_it_was_in(federated: tuple[Study, Path], tmp_path: Path) -> None:
    study, folder = federated
    shutil.copytree(folder, tmp_path / "study")
    key = next(iter(study.cells))
    cell = tmp_path / "study" / "cells" / key
    whole = json.loads((cell / "result.json").read_text())
    (cell / "result.json").unlink()
    (cell / "seed1.json").unlink()
    before = (cell / "seed0.json").stat().st_mtime_ns
    run_study(study, tmp_path / "study", lambda phase: None)
    again = json.loads((cell / "result.json").read_text())
    assert (cell / "seed0.json").stat().st_mtime_ns == before
    for ours, theirs in zip(whole["seeds"], again["seeds"], strict=True):
        assert {k: v for k, v in ours.items() if "seconds" not in k} == {
            k: v for k, v in theirs.items() if "seconds" not in k
        }


def test_the_page_of_a_federated_study(federated: tuple[Study, Path]) -> None:
    study, folder = federated
    page = read_report(study, folder).write(folder).read_text()
    for drawn in ("plot-pareto", "plot-signal", "plot-attacks"):
        assert f'id="{drawn}"' in page
    assert "one dialogue (a prompt and its reply)" in page and "no privacy: for simulation only" in page
    summary = json.loads((folder / "summary.json").read_text())
    cell = summary["tables"]["example-local"]["cells"][1]
    assert cell["label"] == {"privacy.epsilon": 8} and len(cell["gain_shared_by_seed"]) == 2
    assert cell["attacks"]["gradient, releases"]["auc_ceiling"] < 1
    told = Console(record=True, width=200, file=io.StringIO())
    told.print(read_report(study, folder).text)
    text = told.export_text()
    assert "epsilon 8" in text and "∞" in text


def test_a_study_whose_data_has_changed_does_not_go_on(tmp_path: Path) -> None:
    def written(reply: str) -> None:
        lines = [
            json.dumps({"user": f"u{k % 12}", "time": k, "prompt": f"what of {k}?", "response": f"{reply} {k}"})
            for k in range(12 * 12)
        ]
        (tmp_path / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")

    (tmp_path / "small.toml").write_text(
        f'data = {{ name = "{tmp_path / "chats.jsonl"}", users = 2, min_pairs = 8, split = "all" }}\n'
        '[study.tables.one]\nrows = { "selection.policy" = ["fifo"] }\n',
        encoding="utf-8",
    )
    study = load_study(tmp_path / "small.toml", ["study.seeds=1"])
    written("it is fine")
    ready(study, tmp_path / "study")
    (tmp_path / "study" / "cells" / next(iter(study.cells))).mkdir(parents=True)  # begun
    ready(study, tmp_path / "study")
    written("it is bad")
    with pytest.raises(RunError, match="the people of 1 of 1 cells have changed"):
        ready(study, tmp_path / "study")
