"""What the cells of a study share: the model with what it remembers, the people, what was measured once for all."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from client.lm.config import ModelConfig
from simulation.data.population import DataConfig, User, load_population
from simulation.study.config import Cell
from simulation.study.remember import RememberingModel

Result = dict[str, Any]


@dataclass
class Bench:
    """What cells share."""

    readings: frozenset[str]
    _models: dict[ModelConfig, RememberingModel] = field(default_factory=dict)
    _people: dict[tuple[DataConfig, int], list[User]] = field(default_factory=dict)
    _measured: dict[Hashable, Result] = field(default_factory=dict)

    @classmethod
    def of(cls, cells: Iterable[Cell]) -> Bench:
        return cls(frozenset(c.config.selection.reading for c in cells))

    def model(self, config: ModelConfig) -> RememberingModel:
        """The language model; one at a time is held."""
        if config not in self._models:
            self._models.clear()
            model = RememberingModel.load(config)
            assert isinstance(model, RememberingModel)
            model.readings = self.readings
            self._models[config] = model
        return self._models[config]

    def people(self, config: DataConfig, seeds: int, seed: int) -> dict[str, User]:
        """`config.users` users of each seed by device name; nobody is in two seeds."""
        drawn = config.model_copy(update={"users": config.users * seeds})
        key = (drawn, seed)
        if key not in self._people:
            self._people[key] = load_population(drawn, seed)
        return {f"seed{i // config.users}-{i % config.users:03d}": u for i, u in enumerate(self._people[key])}

    def remembered(self, key: Hashable, measured: Callable[[], Result]) -> Result:
        """What was measured under this key, or is now."""
        if key not in self._measured:
            self._measured[key] = measured()
        return self._measured[key]

    def hardware(self, config: ModelConfig) -> str:
        engine = self.model(config).engine
        return f"{len(os.sched_getaffinity(0))} cores, {engine.device}, {engine.dtype}"
