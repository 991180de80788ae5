"""Data that names no users, parted among simulated ones: who gets what, what is refused, and a run over it."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from pydantic import ValidationError
from typer.testing import CliRunner

from florilegium.simulation.cli.main import app
from florilegium.simulation.config import load_config
from florilegium.simulation.data.convert import convert
from florilegium.simulation.data.describe import describe
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.partition_table import Share
from florilegium.simulation.data.population import DataConfig, collect, half_of, load_population, users_of
from florilegium.simulation.experiment import run_experiment
from florilegium.simulation.reports.partition_figure import LABELS_DRAWN, partition_figure
from florilegium.simulation.settings import find_config

needs_partitioners = pytest.mark.skipif(
    not find_spec("flwr_datasets"), reason="flwr-datasets is not installed; pip install 'florilegium[partition]'"
)
LABELS = ("films", "food", "music", "travel")


def write(path: Path, rows: int = 80, **more: str) -> Path:
    """As many rows of a label as of any other; row i has label i modulo 4."""
    said = ({"question": f"{i}?", "answer": f"{i}.", "colour": LABELS[i % 4], **more} for i in range(rows))
    path.write_text("".join(json.dumps(row) + "\n" for row in said))
    return path


def settings(path: Path, devices: int = 4, **partition: Any) -> DataConfig:
    tree = {"name": str(path), "users": devices, "split": "all", "min_pairs": 4, "max_pairs": 999}
    return DataConfig.model_validate({**tree, "partition": {"by": "colour", **partition}})


def parted(config: DataConfig, seed: int = 0) -> dict[str, list[tuple[str, str]]]:
    """Reply and label of all that each user has."""
    users = users_of(collect(config), config, seed)
    return {user: [(reply.response, reply.domain) for reply in said] for user, said in users.items()}


@needs_partitioners
@pytest.mark.parametrize("kind", ["iid", "linear", "square", "dirichlet", "pathological", "shard"])
def test_each_reply_goes_to_one_user_and_the_seed_alone_decides(tmp_path: Path, kind: str) -> None:
    config = settings(write(tmp_path / "x"), kind=kind)
    users = parted(config, seed=3)
    assert sorted(reply for said in users.values() for reply, _ in said) == sorted(f"{i}." for i in range(80))
    assert parted(config, seed=3) == users != parted(config, seed=4)
    fixed = settings(tmp_path / "x", kind=kind, seed=9)
    assert parted(fixed, seed=3) == parted(fixed, seed=4)
    assert list(users) == [f"all-{i:05d}" for i in range(4)]


@needs_partitioners
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("iid", [20] * 4), ("linear", [8, 16, 24, 32]), ("square", [2, 10, 24, 44]), ("shard", [20] * 4)],
)
def test_sizes_are_as_the_kind_says(tmp_path: Path, kind: str, sizes: list[int]) -> None:
    """Of 80: tenths of 1, 2, 3, 4; and thirtieths of 1, 4, 9, 16 rounded down, the rest to the last."""
    assert [len(said) for said in parted(settings(write(tmp_path / "x"), kind=kind)).values()] == sizes


@needs_partitioners
def test_replies_of_nobody_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """83 replies make eight shards of ten, and three are left; more shards than replies are refused."""
    path = write(tmp_path / "x", 83)
    assert sum(map(len, parted(settings(path, kind="shard")).values())) == 80
    assert "3 of 83 replies are nobody's" in caplog.text
    with pytest.raises(DataError, match=r"shards_per_user = 30: 83 replies make no 120 shards for 4 users"):
        parted(settings(path, kind="shard", shards_per_user=30))


@needs_partitioners
def test_a_pathological_user_has_as_many_labels_as_asked(tmp_path: Path) -> None:
    users = parted(settings(write(tmp_path / "x"), kind="pathological", labels_per_user=1))
    assert [{label for _, label in said} for said in users.values()] == [{label} for label in LABELS]
    two = parted(settings(tmp_path / "x", kind="pathological", labels_per_user=2))
    assert {len({label for _, label in said}) for said in two.values()} == {2}


@needs_partitioners
def test_a_user_of_shards_has_as_many_labels_as_shards(tmp_path: Path) -> None:
    """Where a shard is a label: four users of one, two users of two."""
    one = parted(settings(write(tmp_path / "x"), kind="shard", shards_per_user=1))
    assert {len({label for _, label in said}) for said in one.values()} == {1}
    two = parted(settings(tmp_path / "x", devices=2, kind="shard", shards_per_user=2))
    assert [len({label for _, label in said}) for said in two.values()] == [2, 2]


@needs_partitioners
def test_a_small_alpha_leaves_a_user_with_few_labels_and_a_large_one_with_all(tmp_path: Path) -> None:
    """The share of a user's commonest label: a quarter where all users are alike."""
    write(tmp_path / "x", 400)

    def commonest(alpha: float) -> float:
        users = parted(settings(tmp_path / "x", kind="dirichlet", alpha=alpha)).values()
        return sum(max(Counter(label for _, label in said).values()) for said in users) / 400

    assert commonest(1000) < 0.3 < 0.6 < commonest(0.05)


def test_natural_makes_a_user_of_each_label_and_halves_them(tmp_path: Path) -> None:
    config = settings(write(tmp_path / "x"), kind="natural")
    users = parted(config)
    assert {user: {label for _, label in said} for user, said in users.items()} == {name: {name} for name in LABELS}
    half = users_of(collect(config), config.model_copy(update={"split": "test"}), 0)
    assert list(half) == [name for name in LABELS if half_of(name) == "test"]


def test_data_with_users_is_parted_by_nothing_but_natural(tmp_path: Path) -> None:
    write(tmp_path / "x", user="ana")
    with pytest.raises(DataError, match=r"'iid' is for data that names no users, and .* has 1; leave it out, or use"):
        load_population(settings(tmp_path / "x", kind="iid"), 0)
    assert list(parted(settings(tmp_path / "x", kind="natural", by=""))) == ["ana"]
    assert list(parted(settings(tmp_path / "x", kind="natural"))) == list(LABELS)


@needs_partitioners
@pytest.mark.parametrize(
    ("partition", "users", "told"),
    [
        ({"kind": "dirichlet", "by": "hue"}, 4, "line 1: data.partition.by = 'hue' is none of its columns: question"),
        ({"kind": "dirichlet", "by": ""}, 4, "needs a label in a domain .*: 80 of 80 replies have none"),
        ({"kind": "iid"}, 81, "80 replies cannot be parted among 81 users"),
        ({"kind": "iid"}, 40, "has 0 users with min_pairs = 4 replies or more after its partition"),
        ({"kind": "pathological", "labels_per_user": 5}, 4, "labels_per_user = 5 must be <= 4"),
        ({"kind": "pathological", "labels_per_user": 4}, 30, "data.partition.kind = 'pathological': .*Label"),
    ],
)
def test_what_cannot_be_parted_is_refused(tmp_path: Path, partition: dict[str, Any], users: int, told: str) -> None:
    with pytest.raises(DataError, match=told):
        load_population(settings(write(tmp_path / "x"), users, **partition), 0)


def test_without_the_package_it_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr_datasets.partitioner", None)
    with pytest.raises(DataError, match=r"needs the package flwr-datasets: pip install 'florilegium\[partition\]'"):
        load_population(settings(write(tmp_path / "x"), kind="iid"), 0)


def test_a_row_without_a_label_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "x")
    path.write_text(path.read_text() + json.dumps({"question": "q", "answer": "a", "colour": None}) + "\n")
    with pytest.raises(DataError, match="needs a label in 'colour': 1 of 81 replies have none"):
        load_population(settings(path, kind="shard"), 0)


@pytest.mark.parametrize(
    ("partition", "told"),
    [
        ({"kind": "dirichlet", "alpha": 0}, "greater than 0"),
        ({"kind": "iid", "alpha": 2}, "alpha = 2.0 is of kind = 'dirichlet', not of 'iid'"),
        ({"kind": ""}, "by without a kind"),
        ({"kind": "natural", "users": 3}, "leave users out"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, partition: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(told)):
        settings(write(tmp_path / "x"), **partition)


@needs_partitioners
def test_more_users_than_are_drawn_can_be_made(tmp_path: Path) -> None:
    config = settings(write(tmp_path / "x"), devices=3, kind="iid", users=10)
    assert [len(user.stream) + len(user.held_out) for user in load_population(config, 0)] == [8, 8, 8]


@needs_partitioners
def test_a_description_shows_the_parts_and_draws_them(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl")
    told = describe(settings(tmp_path / "x.jsonl", kind="pathological", labels_per_user=1), seed=0)
    assert told.users == tuple(Share(f"all-{i:05d}", 20, ((label, 20),)) for i, label in enumerate(LABELS))
    words = ["partition.kind=linear", "partition.by=colour", "users=4", "split=all", "min_pairs=10"]
    asked = ["data", "describe", str(tmp_path / "x.jsonl"), *words, "--picture", str(tmp_path / "x.html")]
    done = CliRunner().invoke(app, asked)
    shown = " ".join(done.output.split())
    assert "linear: 4 users, 1 of them with fewer than min_pairs = 10 replies" in shown
    assert "all-00000 (too few) 8" in shown and "all-00003 32" in shown
    assert "plotly" in (tmp_path / "x.html").read_text(encoding="utf-8")


def test_a_picture_has_a_bar_of_each_user_and_what_is_rare_together() -> None:
    labels = tuple((f"<b>{i}", 30 - i) for i in range(LABELS_DRAWN + 2))
    drawn = partition_figure([Share("ana", sum(n for _, n in labels), labels), Share("ben", 5, (("", 5),))])
    assert drawn.data[0].name == "&lt;b&gt;0" and drawn.data[-1].name == "3 others"
    assert list(drawn.data[-1].y) == [18 + 17, 5]


def test_a_partition_is_no_import(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"leave data\.partition out of an import"):
        convert(settings(write(tmp_path / "x"), kind="iid"), tmp_path / "out")


@needs_partitioners
def test_a_run_over_a_partition_comes_to_its_end(tmp_path: Path) -> None:
    data = [f"data.name={write(tmp_path / 'faq.jsonl')}", "data.split=all", "data.min_pairs=4", "data.users=2"]
    kind = ["data.partition.kind=dirichlet", "data.partition.by=colour", "rounds=1"]
    config = load_config(find_config("quickstart"), [*SMALL, "evaluation.rouge_queries_per_user=0", *data, *kind])
    summary = run_experiment(config, tmp_path / "run")
    assert (summary.devices, summary.rounds) == (2, 1)
