"""A study: the settings of one experiment, and tables whose cells each change some of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from florilegium.privacy.common.base_config import Config
from florilegium.simulation.baselines.config import BaselinesConfig
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.personalization.config import InteractiveConfig, MethodsConfig
from florilegium.simulation.settings import ConfigError, parse_override, read_tree, set_value, validate
from florilegium.simulation.studies.published import PUBLISHED

Label = tuple[tuple[str, Any], ...]  # (setting, value): where a cell stands in its table
Axis = dict[str, tuple[Any, ...]]
SAME_PEOPLE = ("data.order", "data.stickiness")  # of the data, what leaves streams and held-out replies what they are
TOGETHER = " & "  # between settings of an axis that change together
WITHOUT_SERVER = ("shared", "server", "privacy")  # settings without effect where devices live alone
TREES: dict[str, type[ExperimentConfig] | type[MethodsConfig] | type[InteractiveConfig]] = {
    "rivals": BaselinesConfig,
    "methods": MethodsConfig,
    "lives": InteractiveConfig,
}
UNSEEN = ("engine", "cohort_size", "workers", "name", "ray", "world", "callbacks")  # without effect on a study's cells


def unseen(kind: str) -> tuple[str, ...]:
    """The settings without effect on the cells of a study of this kind."""
    return UNSEEN if kind == "rivals" else (*UNSEEN, "baseline")


class TableConfig(Config):
    """Rows by columns; each axis has one setting, or several that are crossed."""

    title: str = Field("", description="over the table; empty: its name")
    rows: Axis = Field(
        default_factory=dict, description='setting → values; "one & other" → pairs of values that go together'
    )
    columns: Axis = Field(default_factory=dict, description="setting → values; may be left out")
    fixed: dict[str, Any] = Field(default_factory=dict, description="settings of all cells")
    against: tuple[str, ...] = Field((), description="setting=value: cells are compared with those that differ in it")
    published: str = Field("", description=f"figures of the paper beside ours: {', '.join(PUBLISHED)}")

    @field_validator("published")
    @classmethod
    def _known(cls, value: str) -> str:
        if value and value not in PUBLISHED:
            raise ValueError(f"must be one of {', '.join(PUBLISHED)}")
        return value

    @field_validator("rows", "columns")
    @classmethod
    def _has_values(cls, value: Axis) -> Axis:
        empty = [setting for setting, values in value.items() if not values]
        if empty:
            raise ValueError(f"{empty[0]} has no values")
        for key, values in value.items():
            count = len(key.split(TOGETHER))
            wrong = [v for v in values if count > 1 and (not isinstance(v, list | tuple) or len(v) != count)]
            if wrong:
                raise ValueError(f"{key} = {wrong[0]!r} must be a list of {count} values")
        return value

    @property
    def settings(self) -> list[str]:
        """Those that cells of this table change."""
        axes = [setting for axis in (self.rows, self.columns) for key in axis for setting in key.split(TOGETHER)]
        return [*axes, *self.fixed, *(a.partition("=")[0] for a in self.against)]

    @model_validator(mode="after")
    def _paired(self) -> Self:
        against = [override.partition("=")[0] for override in self.against]
        others = [s for s in against if s.partition(".")[0] in ("data", "seed") and s not in SAME_PEOPLE]
        if others:
            raise ValueError(f"against {others[0]}: cells with other data or seeds have other people: no pairs")
        return self

    def labels(self) -> list[list[Label]]:
        """The grid of cells, row by row."""
        return [[(*row, *column) for column in _crossed(self.columns)] for row in _crossed(self.rows)]


class StudyConfig(Config):
    """How a grid of arms and seeds is run."""

    kind: Literal["alone", "federated", "rivals", "methods", "lives"] = Field(
        "alone",
        description="devices without a server, with one, by another scheme of personalisation; methods on a task; "
        "people who talk with their devices",
    )
    seeds: int = Field(
        5, ge=1,
        description="federated: draws of dice for the same devices; else draws of data.users devices, none in two",
    )  # fmt: skip
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="processes of one thread for cells and seeds; auto: one a core, as memory allows",
    )
    hidden_share: float = Field(
        0.1, ge=0, le=1, description="federated: of each stream, for attacks; of two such dialogues a coin hides one"
    )
    tables: dict[str, TableConfig] = Field(min_length=1, description="by a name of one's own; each is a grid of cells")

    @model_validator(mode="after")
    def _matters(self) -> Self:
        without = (*unseen(self.kind), *WITHOUT_SERVER) if self.kind == "alone" else unseen(self.kind)
        for setting in (s for table in self.tables.values() for s in table.settings):
            if setting.partition(".")[0] in without:
                raise ValueError(f"{setting} cannot be varied: it changes nothing in a study of the kind {self.kind!r}")
        return self


@dataclass(frozen=True)
class Cell:
    """One arm: an experiment on all seeds."""

    config: ExperimentConfig | MethodsConfig | InteractiveConfig
    study: StudyConfig

    @property
    def seeds(self) -> int:
        return self.study.seeds

    @cached_property
    def key(self) -> str:
        """Names the cell's folder: the same settings are the same cell, in whichever table it stands."""
        settings = self.config.model_dump_json(exclude=set(unseen(self.study.kind)))
        kind = {"alone": "", "federated": f"{self.study.hidden_share} "}.get(self.study.kind, f"{self.study.kind} ")
        return sha256(f"{kind}{self.seeds} {settings}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Study:
    """A study as it was read."""

    name: str
    tree: Mapping[str, Any]  # the experiment's settings as given
    config: StudyConfig
    where: str  # for error messages

    def cell(self, table: TableConfig, label: Label, override: str = "") -> Cell:
        """The cell of a table at a label, or the one that differs from it by `setting=value`."""
        tree = deepcopy(dict(self.tree))
        for setting, value in (*table.fixed.items(), *label):
            set_value(tree, setting, deepcopy(value))
        if override:
            set_value(tree, *parse_override(override))
        if self.config.kind == "alone":
            set_value(tree, "shared.pool_capacity", 0)  # no server: nothing is annotated for its sake
        kind = TREES.get(self.config.kind, ExperimentConfig)
        config = validate(kind, tree, f"{self.where}, cell {dict(label)}")
        if self.config.kind == "federated" and isinstance(config, ExperimentConfig) and not config.server.by_rounds:
            raise ConfigError(
                f"{self.where}: a federated study asks by rounds; server.buffer and server.rule = 'none' do not"
            )
        if self.config.kind != "rivals" and isinstance(config, ExperimentConfig) and config.baseline.name:
            raise ConfigError(f"{self.where}: baseline.name is for a study of the kind 'rivals'")
        return Cell(config, self.config)

    @cached_property
    def cells(self) -> dict[str, Cell]:
        """All cells by key, those that others are compared with too, each once, in the order of the tables."""
        found: dict[str, Cell] = {}
        for table in self.config.tables.values():
            for label in (label for row in table.labels() for label in row):
                for override in ("", *table.against):
                    cell = self.cell(table, label, override)
                    found.setdefault(cell.key, cell)
        return found


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Reads a study; raises `ConfigError` naming what is wrong, in every cell, before anything runs."""
    return study_of(read_tree(path, overrides), str(path))


def study_of(tree: dict[str, Any], where: str) -> Study:
    """The study of a tree of settings, checked as `load_study` does."""
    if "study" not in tree:
        raise ConfigError(f"{where}: has no [study]; florilegium run is for a single experiment")
    if "workers" in tree:
        raise ConfigError(f"{where}: workers = {tree['workers']!r} is of a single run; a study's are study.workers")
    config = validate(StudyConfig, tree.pop("study"), f"{where}, study")
    study = Study(tree["name"], tree, config, where)
    _ = study.cells  # made now, so that what is wrong in a cell is told before anything runs
    return study


def _crossed(axis: Axis) -> Iterator[Label]:
    """Every setting's values with every other's, but for those that go together."""
    for values in product(*axis.values()):
        pairs = [_pairs(key.split(TOGETHER), value) for key, value in zip(axis, values, strict=True)]
        yield tuple(pair for of_key in pairs for pair in of_key)


def _pairs(settings: list[str], value: Any) -> Label:
    return ((settings[0], value),) if len(settings) == 1 else tuple(zip(settings, value, strict=True))
