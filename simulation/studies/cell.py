"""What the cells of a study share: the model with what it remembers, the people, what was measured once for all."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from florilegium.client.lm.config import ModelConfig
from florilegium.privacy.common.machine import cores
from florilegium.simulation.data.population import DataConfig, User, collect, draw, load_population
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.provenance import sources_sha256
from florilegium.simulation.studies.config import Cell
from florilegium.simulation.tasks.config import TaskConfig, load_task
from florilegium.simulation.tasks.task import Task, TaskUser

if TYPE_CHECKING:
    from florilegium.simulation.evaluation.caching_model import CachingModel

Result = dict[str, Any]


@dataclass
class SharedResources:
    """What cells share."""

    readings: frozenset[str]
    extensions: frozenset[str] = frozenset()  # names of modules' objects that the settings ask for
    _models: dict[ModelConfig, CachingModel] = field(default_factory=dict)
    _people: dict[tuple[DataConfig, int], Sequence[User]] = field(default_factory=dict)
    _measured: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, cells: Iterable[Cell]) -> SharedResources:
        configs = [cell.config for cell in cells]
        return cls(frozenset(c.reading for c in configs), frozenset(x for c in configs for x in c.extensions()))

    def model(self, config: ModelConfig) -> CachingModel:
        """The language model; one at a time is held."""
        if config not in self._models:
            from florilegium.simulation.evaluation.caching_model import CachingModel  # and with it torch

            self._models.clear()
            model = CachingModel.load(config)
            assert isinstance(model, CachingModel)
            model.readings = self.readings
            self._models[config] = model
        return self._models[config]

    def people(self, config: DataConfig, seeds: int, seed: int) -> dict[str, User]:
        """`config.users` users of each seed by device name; nobody is in two seeds."""
        drawn = config.model_copy(update={"users": config.users * seeds})
        key = (drawn, seed)
        if key not in self._people:
            self._people[key] = self._population(drawn, seed)
        return {f"seed{i // config.users}-{i % config.users:03d}": u for i, u in enumerate(self._people[key])}

    def _population(self, config: DataConfig, seed: int) -> Sequence[User]:
        """As `load_population`; what has a name is read once for all that is drawn from it."""
        if not config.is_known():
            return load_population(config, seed)
        return draw(self.remembered((config.name, config.context_turns), lambda: collect(config)), config, seed)

    def task(self, config: TaskConfig, seeds: int, seed: int) -> tuple[Task, list[TaskUser], list[TaskUser]]:
        """The task, its pool, and `config.users` users of each seed, one seed's behind the other's."""
        every = config.model_copy(update={"users": config.users * seeds})
        found: tuple[Task, list[TaskUser], list[TaskUser]] = self.remembered(
            (every, seed), lambda: load_task(every, seed)
        )
        return found

    def remembered(self, key: Hashable, measured: Callable[[], Any]) -> Any:
        """What was measured under this key, or is now."""
        if key not in self._measured:
            self._measured[key] = measured()
        return self._measured[key]

    def hardware(self, config: ModelConfig) -> str:
        engine = self.model(config).engine
        return f"{cores()} cores, {engine.device}, {engine.dtype}"


@dataclass
class Seeded(ABC):
    """A cell that is run once for each seed, while it is being run.

    Its folder holds a file for each seed that was finished, and at the end `result.json`: a study that was killed goes
    on with the seed that it was in.
    """

    cell: Cell
    folder: Path
    bench: SharedResources
    listener: Callable[[str], None]

    @property
    @abstractmethod
    def devices(self) -> list[str]:
        """The names of the people's devices, of all seeds."""

    @property
    @abstractmethod
    def queries(self) -> int:
        """How many held-out replies there are."""

    @abstractmethod
    def repetition(self, number: int) -> Result:
        """What one seed gives."""

    def run(self) -> Result:
        """Goes on after the last seed that was finished and returns the result."""
        path, config = self.folder / "result.json", self.cell.config
        if path.exists():
            return read_result(self.folder)
        result: Result = {
            "settings": config.model_dump(mode="json"),
            "devices": self.devices,
            "queries": self.queries,
            "seeds": [self.kept(number) for number in range(self.cell.seeds)],
            "sources": sources_sha256(self.bench.extensions),
            "hardware": self.bench.hardware(config.model),
            "finished": round(time.time()),
        }
        write_whole(path, result)
        return result

    def kept(self, number: int) -> Result:
        """What one seed gives, from its file, or measured now."""
        path = self.folder / f"seed{number}.json"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, self.repetition(number))
        found: Result = json.loads(path.read_text(encoding="utf-8"))
        return found


class SeededCell(Seeded):
    """One whose people have streams and held-out replies."""

    @cached_property
    @abstractmethod
    def users(self) -> dict[str, User]:
        """The people of all seeds by device name."""

    @property
    def devices(self) -> list[str]:
        return list(self.users)

    @property
    def queries(self) -> int:
        return sum(len(u.held_out) for u in self.users.values())


def read_result(folder: Path) -> Result:
    """The result of a cell; raises `RunError` where it is missing."""
    path = folder / "result.json"
    if not path.exists():
        raise RunError(f"{path} is missing: the study has not come so far; run it again to go on")
    result: Result = json.loads(path.read_text(encoding="utf-8"))
    return result


def write_whole(path: Path, result: Result) -> None:
    """At once or not at all."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(result), encoding="utf-8")
    fresh.replace(path)
