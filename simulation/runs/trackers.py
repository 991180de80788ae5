"""A run's figures where experiments are compared: TensorBoard, MLflow, Weights & Biases.

Each gets what `metrics.jsonl` has of rounds and arms, the settings, and the last round's tables; nothing of single
devices, and nothing that anybody said. By default all of it stays on this machine: `runs/NAME/tensorboard`,
`runs/mlflow.db` and `runs/wandb`. A run that goes on is another run there, with the rounds of before.
"""

from __future__ import annotations

import csv
import io
import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any, ClassVar, TypeVar

from florilegium.simulation.runs.callbacks import Callback, RunFacts
from florilegium.simulation.runs.changes import flat
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.events import ArmComparison, DeviceRound, Evaluation, Event, RoundEnd
from florilegium.simulation.settings import dump_config

PROJECT = "florilegium"  # MLflow's experiment, W&B's project
MOST_IN_A_BATCH = 100  # of MLflow's parameters and metrics
Value = TypeVar("Value")
Row = dict[str, Any]
Point = tuple[int, str, float]  # round, name, value


def points(events: Iterable[Event]) -> Iterator[Point]:
    """The figures of rounds and of arms; ε is the largest that a device had spent."""
    for event in events:
        if isinstance(event, RoundEnd):
            yield from ((event.round, name, value) for name, value in _numbers(event.facts()) if name != "round")
        elif isinstance(event, Evaluation):
            low, high = event.ci95
            of_arm = {"": event.mean_per_user, "_per_query": event.mean_per_query, "_low": low, "_high": high}
            yield from ((event.round, f"{event.metric}{what}/{event.arm}", x) for what, x in of_arm.items())
    spent: dict[int, float] = {}
    for event in events:
        if isinstance(event, DeviceRound) and event.epsilon is not None:
            spent[event.round] = max(event.epsilon, spent.get(event.round, 0.0))
    yield from ((number, "epsilon", value) for number, value in spent.items())


def _numbers(facts: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, float]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{at}{name}/")
        elif isinstance(value, int | float):
            yield f"{at}{name}", value


def tables(events: Iterable[Event]) -> dict[str, list[Row]]:
    """Arms after the last round, and their paired differences."""
    found: dict[str, list[Row]] = {"evaluation": [], "comparison": []}
    for event in events:
        if isinstance(event, ArmComparison) or (isinstance(event, Evaluation) and event.final):
            row = {name: value for name, value in asdict(event).items() if name not in ("time", "final")}
            row["ci95_low"], row["ci95_high"] = row.pop("ci95")
            found[event.kind].append(row)
    return {name: rows for name, rows in found.items() if rows}


class Tracker(Callback):
    """What all of them do; each says how it is opened, written to and closed."""

    package: ClassVar[str]
    extra: ClassVar[str]

    def __init__(self) -> None:
        """Raises `RunError` where the package is not installed."""
        self.seen: list[Event] = []
        if find_spec(self.package) is None:
            raise RunError(f"callbacks={self.extra} needs a package: pip install 'florilegium[{self.extra}]'")

    def on_run_begin(self, facts: RunFacts) -> None:
        self.open(facts)
        self._write(facts)

    def on_round_end(self, facts: RunFacts) -> None:
        self._write(facts)

    def on_run_end(self, facts: RunFacts) -> None:
        self._write(facts)
        self.close(tables(self.seen), facts)

    def _write(self, facts: RunFacts) -> None:
        self.seen += facts.events
        self.write(list(points(facts.events)))

    @abstractmethod
    def open(self, facts: RunFacts) -> None:
        """With the settings."""

    @abstractmethod
    def write(self, found: Sequence[Point]) -> None: ...

    @abstractmethod
    def close(self, found: Mapping[str, list[Row]], facts: RunFacts) -> None:
        """With the tables of the last round, if it has come so far."""


class TensorBoard(Tracker):
    """Read by `tensorboard --logdir runs`."""

    package = extra = "tensorboard"

    def open(self, facts: RunFacts) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(facts.folder / "tensorboard")
        self.writer.add_text("config", f"```\n{dump_config(facts.config)}```")

    def write(self, found: Sequence[Point]) -> None:
        for number, name, value in found:
            self.writer.add_scalar(name, value, number)
        self.writer.flush()

    def close(self, found: Mapping[str, list[Row]], facts: RunFacts) -> None:
        for name, rows in found.items():
            lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
            self.writer.add_text(name, "\n".join("|".join(map(str, line)) for line in lines), facts.round)
        self.writer.close()


class Mlflow(Tracker):
    """In `runs/mlflow.db`, read by `mlflow ui --backend-store-uri sqlite:///runs/mlflow.db`.

    MLFLOW_TRACKING_URI names another place.
    """

    package = extra = "mlflow"

    def open(self, facts: RunFacts) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        runs = facts.folder.parent.absolute()
        elsewhere = os.environ.get("MLFLOW_TRACKING_URI")
        self.client: Any = MlflowClient(tracking_uri=elsewhere or f"sqlite:///{runs / 'mlflow.db'}")
        artifacts = None if elsewhere else (runs / "mlflow-artifacts").as_uri()
        known = self.client.get_experiment_by_name(PROJECT)
        experiment = known.experiment_id if known else self.client.create_experiment(PROJECT, artifacts)
        self.run_id = self.client.create_run(experiment, run_name=facts.config.name).info.run_id
        for some in _batches(list(flat(facts.config.model_dump(mode="json")).items())):
            self.client.log_batch(self.run_id, params=[_param(*pair) for pair in some])
        self.client.log_text(self.run_id, dump_config(facts.config), "config.toml")

    def write(self, found: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        for some in _batches(found):
            self.client.log_batch(self.run_id, [Metric(name, value, 0, number) for number, name, value in some])

    def close(self, found: Mapping[str, list[Row]], facts: RunFacts) -> None:
        for name, rows in found.items():
            text = io.StringIO()
            writer = csv.DictWriter(text, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
            self.client.log_text(self.run_id, text.getvalue(), f"{name}.csv")
        self.client.set_terminated(self.run_id, "KILLED" if facts.interrupted else "FINISHED")


def _batches(values: Sequence[Value]) -> Iterator[Sequence[Value]]:
    return (values[at : at + MOST_IN_A_BATCH] for at in range(0, len(values), MOST_IN_A_BATCH))


def _param(name: str, value: Any) -> Any:
    from mlflow.entities import Param

    return Param(name, str(value))


class Wandb(Tracker):
    """In `runs/wandb`, without a network; `wandb sync` sends it. WANDB_MODE=online sends at once."""

    package = extra = "wandb"

    def open(self, facts: RunFacts) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_DATA_DIR", str(facts.folder.parent / "wandb"))  # tables, before they are sent
        import wandb

        self.table: Any = wandb.Table
        quiet = wandb.Settings(
            silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True, x_disable_meta=True
        )
        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=facts.config.name, dir=facts.folder.parent,
            config=facts.config.model_dump(mode="json"), settings=quiet,
        )  # fmt: skip

    def write(self, found: Sequence[Point]) -> None:
        for number in sorted({number for number, _, _ in found}):
            self.run.log({name: value for of, name, value in found if of == number}, step=number)

    def close(self, found: Mapping[str, list[Row]], facts: RunFacts) -> None:
        for name, rows in found.items():
            self.run.log({name: self.table(columns=list(rows[0]), data=[list(row.values()) for row in rows])})
        self.run.finish(exit_code=int(facts.interrupted))
