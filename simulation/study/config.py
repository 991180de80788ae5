"""A study: the settings of one experiment, and tables whose cells each change some of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from privacy.config import Config
from simulation.config import ConfigError, ExperimentConfig, parse_override, read_tree, set_value, validate
from simulation.study.published import PUBLISHED

Label = tuple[tuple[str, Any], ...]  # (setting, value): where a cell stands in its table
Axis = dict[str, tuple[Any, ...]]
SAME_PEOPLE = ("data.order", "data.stickiness")  # of the data, what leaves streams and held-out replies what they are
WITHOUT_EFFECT = ("shared", "server", "privacy", "engine", "cohort_size", "name")


class TableConfig(Config):
    """Rows by columns; each axis has one setting, or several that are crossed."""

    title: str = ""
    rows: Axis = Field(default_factory=dict, description="setting → values")
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
        return value

    @model_validator(mode="after")
    def _matters(self) -> Self:
        against = [override.partition("=")[0] for override in self.against]
        idle = [s for s in (*self.rows, *self.columns, *self.fixed, *against) if s.partition(".")[0] in WITHOUT_EFFECT]
        if idle:
            raise ValueError(f"{idle[0]} changes nothing in a study, whose devices have no server")
        others = [s for s in against if s.partition(".")[0] in ("data", "seed") and s not in SAME_PEOPLE]
        if others:
            raise ValueError(f"against {others[0]}: cells with other data or seeds have other people: no pairs")
        return self

    def labels(self) -> list[list[Label]]:
        """The grid of cells, row by row."""
        return [[(*row, *column) for column in _crossed(self.columns)] for row in _crossed(self.rows)]


class StudyConfig(Config):
    """How a grid of arms and seeds is run."""

    seeds: int = Field(5, ge=1, description="independent draws of data.users devices each; no device is in two")
    tables: dict[str, TableConfig] = Field(min_length=1)


@dataclass(frozen=True)
class Cell:
    """One arm: an experiment on all seeds."""

    config: ExperimentConfig
    seeds: int

    @cached_property
    def key(self) -> str:
        """Names the cell's folder: the same settings are the same cell, in whichever table it stands."""
        settings = self.config.model_dump_json(exclude={"name", "cohort_size", "engine"})
        return sha256(f"{self.seeds} {settings}".encode()).hexdigest()[:16]


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
        set_value(tree, "shared.pool_capacity", 0)  # no server: nothing is annotated for its sake
        return Cell(validate(ExperimentConfig, tree, f"{self.where}, cell {dict(label)}"), self.config.seeds)

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
    tree = read_tree(path, overrides)
    if "study" not in tree:
        raise ConfigError(f"{path}: has no [study]; florilegium run is for a single experiment")
    config = validate(StudyConfig, tree.pop("study"), f"{path}, study")
    study = Study(tree["name"], tree, config, str(path))
    assert study.cells  # made now, so that what is wrong in a cell is told before anything runs
    return study


def _crossed(axis: Axis) -> Iterator[Label]:
    return (tuple(zip(axis, values, strict=True)) for values in product(*axis.values()))
