"""What trackers are told of a run, each read back by the library that it is for."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from florilegium.simulation.config import load_config
from florilegium.simulation.runs import callbacks, trackers
from florilegium.simulation.runs.callbacks import Callbacks, named_callbacks
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.events import (
    ArmComparison,
    DeviceResult,
    DeviceRound,
    Evaluation,
    Event,
    RoundEnd,
    ShownReply,
)
from florilegium.simulation.runs.folder import RunFolder, create

SAID = "what-a-person-said"
NAMES = ("tensorboard", "mlflow", "wandb")


def of_device(number: int, device: str, epsilon: float) -> DeviceRound:
    counts = dict.fromkeys(("tokens_trained", "arrived", "accepted", "buffered", "truncated", "annotations"), 1)
    return DeviceRound(round=number, device=device, epsilon=epsilon, upload_bytes=8, **counts)  # type: ignore[arg-type]


def of_round(number: int) -> list[Event]:
    end = RoundEnd(
        round=number, releases=3 + number, refused={"spent": 1}, signal_to_noise=None, change_norm_l2=0.5,
        seconds={"observe": 2.0},
    )  # fmt: skip
    return [of_device(number, "device-1", 1.5 * number), of_device(number, "device-2", float(number)), end]


def arm(number: int, name: str, mean: float, *, final: bool) -> Evaluation:
    found = {"mean_per_user": mean, "mean_per_query": mean + 1, "ci95": (mean - 0.25, mean + 0.25)}
    return Evaluation(arm=name, metric="nll", round=number, final=final, users=2, queries=4, **found)  # type: ignore[arg-type]


AT_THE_END: list[Event] = [
    arm(2, "base", 4.0, final=True), arm(2, "personal", 3.5, final=True),
    DeviceResult(device="device-1", arm="base", nll=4.0, queries=2),
    ShownReply(device="device-1", prompt=SAID, recorded=SAID, before=SAID, after=SAID),
    ArmComparison(metric="nll", better="personal", than="base", mean_difference=-0.5, ci95=(-0.6, -0.4), users=2,
                  users_better=2),
]  # fmt: skip
POINTS = {
    (1, "releases", 4), (1, "change_norm_l2", 0.5), (1, "seconds/observe", 2.0), (1, "refused/spent", 1),
    (1, "epsilon", 1.5), (1, "nll/base", 4.25), (2, "epsilon", 3.0), (2, "releases", 5), (2, "nll/personal", 3.5),
    (2, "nll_per_query/personal", 4.5), (2, "nll_low/personal", 3.25), (2, "nll_high/personal", 3.75),
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return create(tmp_path / "runs" / "made", load_config("quickstart", ["name=made"]))


def told(run: RunFolder, tracker: str) -> None:
    """Two rounds and an end, with what is written between."""
    board = Callbacks(run, named_callbacks(load_config("quickstart", [f"callbacks={tracker}"])))
    board.begin(0)
    for number in (1, 2):
        run.record_all([*of_round(number), *([arm(1, "base", 4.25, final=False)] if number == 1 else [])])
        board.end_round(number)
    run.record_all(AT_THE_END)
    board.end(interrupted=False)


def in_tensorboard(runs: Path) -> tuple[set[tuple[int, str, float]], str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read: Any = EventAccumulator(str(runs / "made" / "tensorboard"))
    read.Reload()
    found = {(x.step, name, x.value) for name in read.Tags()["scalars"] for x in read.Scalars(name)}
    texts = [read.Tensors(f"{name}/text_summary")[0] for name in ("config", "evaluation", "comparison")]
    return found, "".join(text.tensor_proto.string_val[0].decode() for text in texts)


def in_mlflow(runs: Path) -> tuple[set[tuple[int, str, float]], str]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{runs / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("florilegium").experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == "made"
    assert found.data.params["selection.policy"] == "quality" and len(found.data.params) > 100
    history = [m for name in found.data.metrics for m in client.get_metric_history(found.info.run_id, name)]
    texts = [path.read_text(encoding="utf-8") for path in (runs / "mlflow-artifacts").rglob("*.*")]
    return {(m.step, m.key, m.value) for m in history}, "".join(texts)


def in_wandb(runs: Path) -> tuple[set[tuple[int, str, float]], str]:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # as the end of the program does: its other process has written all of it then
    (path,) = (runs / "wandb").rglob("*.wandb")
    found: set[tuple[int, str, float]] = set()
    settings = ""
    for raw in of_leveldb_log(path.read_bytes()):
        record = Record.FromString(raw)
        items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        found |= {(items["_step"], name, x) for name, x in items.items() if isinstance(x, int | float)}
        settings += "".join(f"{item.key} = {item.value_json}\n" for item in record.run.config.update)
    tables = [path.read_text(encoding="utf-8") for path in (runs / "wandb").rglob("*.table.json")]
    return found, settings + "".join(tables)


def of_leveldb_log(data: bytes, at: int = 7, block: int = 32_768) -> Iterator[bytes]:
    """The records of a file: each in one part or, over the ends of blocks, in several (types 2, 3, 4)."""
    whole = b""
    while at < len(data):
        if block - at % block < 7:
            at += block - at % block  # what is left of a block is too short for a head
            continue
        length, kind = struct.unpack_from("<4xHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


READ: dict[str, Callable[[Path], tuple[set[tuple[int, str, float]], str]]] = {
    "tensorboard": in_tensorboard, "mlflow": in_mlflow, "wandb": in_wandb,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_has_the_figures_the_settings_and_the_tables_and_nobodys_words(name: str, run: RunFolder) -> None:
    pytest.importorskip(name, reason=f"the extra `{name}` is not installed")
    told(run, name)
    runs = run.path.parent
    found, texts = READ[name](runs)
    assert found >= POINTS
    assert "quality" in texts and "personal" in texts and "mean_difference" in texts and "-0.5" in texts
    elsewhere = [p for p in runs.rglob("*") if p.is_file() and p != run.metrics]
    assert not [p for p in elsewhere if SAID.encode() in p.read_bytes()]
    assert SAID in run.metrics.read_text(encoding="utf-8") and SAID not in texts and "device-1" not in texts


def test_rounds_and_arms_are_points_and_the_last_ones_tables() -> None:
    early = arm(1, "base", 4.25, final=False)
    assert set(trackers.points([*of_round(1), *of_round(2), early, *AT_THE_END])) >= POINTS
    found = trackers.tables([early, *AT_THE_END])
    assert [row["arm"] for row in found["evaluation"]] == ["base", "personal"]
    assert found["comparison"][0]["ci95_high"] == -0.4


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_that_is_not_installed_is_told_before_a_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    with pytest.raises(RunError, match=rf"callbacks={name} needs a package: pip install 'florilegium\[{name}\]'"):
        named_callbacks(load_config("quickstart", [f"callbacks={name}"]))


def test_the_names_of_trackers_are_those_of_settings() -> None:
    assert tuple(callbacks.OURS) == NAMES
    assert all(issubclass(getattr(trackers, kind), trackers.Tracker) for kind in callbacks.TRACKERS.values())
