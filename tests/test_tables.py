"""Tables as files: a run's events, and a study's page cell for cell, against figures worked out by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from florilegium.simulation.cli import main
from florilegium.simulation.config import load_config
from florilegium.simulation.reports.tables import PageTable, as_latex, write_tables
from florilegium.simulation.results import export_run
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.events import Evaluation, RoundEnd, ShownReply
from florilegium.simulation.runs.folder import RunFolder, create
from florilegium.simulation.studies.config import load_study
from florilegium.simulation.studies.study_report import read_report

STUDY = """
data = {{ users = 2 }}
{base}
[study]
kind = "{kind}"
seeds = 2
[study.tables.t]
title = "Table"
{rows}
"""
SHAPE = 'adapter = { rank = 4, alpha = 8, factors = "both" }'
RIVALS = f'shared = {{ {SHAPE} }}\npersonal = {{ {SHAPE} }}\nprivacy = {{ mode = "none", clips = "change" }}'
T_OF_TWO = 12.706  # 97.5 % of Student's t of one degree of freedom: half an interval of two units by its standard error


def rows_of(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text(encoding="utf-8").splitlines()))


def reported(folder: Path, text: str, results: list[dict[str, Any]]) -> Path:
    """The folder of a study with these results of its cells, in their order."""
    (folder / "made.toml").write_text(text, encoding="utf-8")
    study = load_study(folder / "made.toml")
    for (key, cell), result in zip(study.cells.items(), results, strict=True):
        (folder / "cells" / key).mkdir(parents=True)
        whole = {"settings": cell.config.model_dump(mode="json"), "devices": ["a", "b"], "queries": 3} | result
        whole |= {"sources": "x", "hardware": "made up"}
        (folder / "cells" / key / "result.json").write_text(json.dumps(whole), encoding="utf-8")
    read_report(study, folder).write(folder)
    return folder / "tables"


def by(user: list[float], query: list[float], **more: float) -> dict[str, Any]:
    return {"by_user": user, "by_query": query, **more}


# -- a study of policies ------------------------------------------------------------------------------------------

ROUND = {
    "buffered": 8, "annotations": 6, "synthetic_kept": 4, "synthetic_rejected": 1, "personal_steps": 10,
    "personal_tokens": 3000, "buffer_bytes": 33_024, "failed": [], "seconds": {"learn": 3.0}, "spared_s": 1.0,
    "synthetic_reasons": {"a copy": 1}, "round": 1,
}  # fmt: skip


def of_policy(nll: list[float], rouge: list[float]) -> dict[str, Any]:
    return {
        "seeds": [0, 1], "rounds": [ROUND], "nll": by(nll, [1.0, 2.0, 6.0]), "nll_shuffled": by([2.0, 5.0], [1.0]),
        "rouge1": by(rouge, [0.1, 0.2, 0.6], mean_length_tokens=7.5),
    }  # fmt: skip


def test_each_figure_of_a_study_of_policies_is_that_by_hand(tmp_path: Path) -> None:
    rows = 'rows = { "selection.policy" = ["fifo", "random"] }\nagainst = ["selection.policy=random"]'
    results = [of_policy([1.0, 3.0], [0.1, 0.3]), of_policy([2.0, 4.5], [0.1, 0.3])]
    tables = reported(tmp_path, STUDY.format(kind="alone", rows=rows, base=""), results)
    _, fifo, random = rows_of(tables / "figures-of-t.csv")
    # mean 2, deviation √2, standard error 1; ROUGE-1: mean 0.2, standard error 0.1; of queries (1 + 2 + 6) / 3
    assert fifo == ["fifo", f"2.000 ± {T_OF_TWO}", "3.000", "3.500", "0.200 ± 1.271", "0.300", "7.5"]
    assert random[1] == "3.250 ± 15.883"  # standard error 1.25
    _, of_nll, of_rouge = rows_of(tables / "tests-of-t.csv")
    # differences −1 and −1.5: mean −1.25, standard error 0.25, t = −5, p = 2 / π · arctan(1 / 5)
    assert of_nll == [
        "fifo − random", "NLL", "−1.250", "−4.427 to +1.927", "2 of 2", "2 of 2", "0.13",
        "0.13", "no difference shown",
    ]  # fmt: skip
    assert of_rouge[1:5] == ["ROUGE-1", "0.000", "0.000 to 0.000", "0 of 2"]
    cost = rows_of(tables / "cost-of-t.csv")[1]  # of two devices
    assert cost == ["fifo", "4", "16.5 kB", "3.0", "2.0", "0.5", "5", "1,500", "0", "2.0"]
    assert r"fifo & 2.000 $\pm$ 12.706 & 3.000 & 3.500" in (tables / "figures-of-t.tex").read_text(encoding="utf-8")


# -- a study of rivals --------------------------------------------------------------------------------------------


def of_rival(nll: tuple[float, float], upload: int, epsilon: float | None) -> dict[str, Any]:
    """Two seeds of one device each."""
    seeds = [
        {
            "epsilon": epsilon, "upload_bytes": upload * (k + 1), "download_bytes": 8000, "kept_bytes": 500,
            "tokens": 1200 + k, "seconds": 90.0 + k,
            "arms": {
                "own": {"nll": by([nll[k]], [nll[k], nll[k] + 1]), "rouge1": by([0.1 + 0.2 * k], [0.5])},
                "base": {"nll": by([4.0 + k], [4.0])}, "shuffled": {"nll": by([5.0 + k], [5.0])},
            },
        }
        for k in range(2)
    ]  # fmt: skip
    return {"seeds": seeds}


def test_each_figure_of_a_study_of_rivals_is_that_by_hand(tmp_path: Path) -> None:
    rows = 'rows = { "baseline.name" = ["ours", "ditto"] }'
    results = [of_rival((2.0, 4.0), 2000, None), of_rival((1.0, 3.5), 4000, None)]
    tables = reported(tmp_path, STUDY.format(kind="rivals", rows=rows, base=RIVALS), results)
    _, ours, ditto = rows_of(tables / "figures-of-t.csv")
    assert ours == ["ours", f"3.000 ± {T_OF_TWO}", "3.500", "5.500", "2.000, 4.000", "0.200 ± 1.271"]
    assert ditto[1:5] == ["2.250 ± 15.883", "2.750", "5.500", "1.000, 3.500"]
    assert rows_of(tables / "cost-of-t.csv")[1:] == [
        ["ours", "0.003", "3.0 kB", "8.0 kB", "500 B", "1,200", "∞", "90.5"],
        ["ditto", "0.003", "6.0 kB", "8.0 kB", "500 B", "1,200", "∞", "90.5"],
    ]
    assert "The base model's NLL is 4.500" in (tmp_path / "report.html").read_text(encoding="utf-8")
    of_nll = rows_of(tables / "tests-of-t.csv")[1]  # differences −1 and −0.5: mean −0.75, standard error 0.25, t = −3
    assert of_nll == ["ditto − ours", "NLL", "−0.750", "−3.927 to +2.427", "2 of 2", "2 of 2", "0.2", "0.2",
                      "no difference shown"]  # fmt: skip


# -- files --------------------------------------------------------------------------------------------------------


def test_latex_has_no_character_that_it_would_read_as_its_own() -> None:
    table = PageTable("Cost of a_b", "50 %", [["Cell", "ε & δ"], ["a_b {x}", "−1.5 ± 0.1 %"], ["c", "∞"]])
    assert table.file == "cost-of-a_b"
    _, begin, _, head, _, first, *_ = as_latex(table).splitlines()
    assert begin == r"\begin{tabular}{lr}" and head == r"Cell & $\varepsilon$ \& $\delta$ \\"
    assert first == r"a\_b \{x\} & $-$1.5 $\pm$ 0.1 \% \\"


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<div role='region' aria-label='A'><table><tr><th>x</th></tr></table></div>")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a.csv").write_text("mine")
    with pytest.raises(RunError, match="not of an export"):
        write_tables(tmp_path / "page.html", tmp_path / "theirs")
    assert (tmp_path / "theirs" / "a.csv").read_text() == "mine"
    for _ in range(2):  # of an earlier export they are written anew
        assert [p.name for p in write_tables(tmp_path / "page.html", tmp_path / "ours")] == ["a.csv", "a.tex"]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """One that was stopped after a round."""
    made = create(tmp_path / "made", load_config("quickstart", ["name=made"]))
    number = {"mean_per_user": 4.1234567, "mean_per_query": 4.0, "ci95": (4.0, 4.25), "users": 2, "queries": 3}
    made.record_all([
        RoundEnd(round=1, releases=3, refused={"spent": 1}, signal_to_noise=None, change_norm_l2=0.5,
                 seconds={"learn": 2.0}),
        Evaluation(arm="base", metric="nll", round=1, final=False, **number),  # type: ignore[arg-type]
        Evaluation(arm="personal", metric="nll", round=1, final=False, **number),  # type: ignore[arg-type]
        ShownReply(device="d", prompt='a "quoted",\nbroken \ud83d line', recorded="", before="", after=""),
    ])  # fmt: skip
    return made


def test_a_run_that_was_stopped_is_exported_as_far_as_it_is(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["florilegium", "export", str(run.path)])
    with pytest.raises(SystemExit) as end:
        main.main()
    told = capsys.readouterr().out
    assert not end.value.code and "evaluation.csv: 2 rows" in told and "is not finished" in told and "0 rounds" in told
    with (run.path / "tables" / "evaluation.csv").open(encoding="utf-8", newline="") as stream:
        first, second = csv.DictReader(stream)
    assert (first["arm"], second["arm"], first["mean_per_user"]) == ("base", "personal", "4.1234567")
    assert (first["ci95_low"], first["ci95_high"]) == ("4.0", "4.25")
    with (run.path / "tables" / "round.csv").open(encoding="utf-8", newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert (row["refused_spent"], row["seconds_learn"], row["signal_to_noise"]) == ("1", "2.0", "")
    with (run.path / "tables" / "replies.csv").open(encoding="utf-8", newline="") as stream:
        (said,) = csv.DictReader(stream)
    assert said["prompt"] == 'a "quoted",\nbroken ? line'
    for wrong in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RunError, match="not the folder of a run"):
            export_run(wrong, tmp_path / "out", parquet=False)


def test_parquet_has_the_same_rows(run: RunFolder, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra `parquet` is not installed")
    written = export_run(run.path, tmp_path / "out", parquet=True)
    assert {p.name: n for p, n in written.items()} == {
        "round.parquet": 1,
        "evaluation.parquet": 2,
        "replies.parquet": 1,
    }
    rows = parquet.read_table(tmp_path / "out" / "evaluation.parquet").to_pylist()
    assert [r["arm"] for r in rows] == ["base", "personal"] and rows[0]["mean_per_user"] == 4.1234567
    assert rows[0]["final"] is False and rows[0]["ci95_high"] == 4.25
