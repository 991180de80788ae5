"""A world of unequal devices: which classes there are, which device is of which, and when it can be there.

A device's class, its time zone and every chance are drawn by a hash of (seed, purpose, device, round): neither the
order in which devices are asked nor the number of workers changes anything. `availability.py` plays rounds,
`simulation/evaluation/fairness.py` sums them up.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from florilegium.privacy.common.base_config import Config
from florilegium.privacy.seeds import derive_seed
from florilegium.simulation.config import WorldConfig
from florilegium.simulation.settings import find_config, read_tree, validate

Chance = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class DeviceClass(Config):
    """One kind of device. Rates are those of the model that is simulated."""

    name: Text = Field(description="of the class, as reports show it")
    share: float = Field(gt=0, le=1, description="of the population")
    train_tokens_per_s: float = Field(gt=0, description="trained, forward and back; read: three times as many")
    memory_bytes: int = Field(gt=0, description="that training may use")
    up_bits_per_s: float = Field(gt=0, description="sent")
    down_bits_per_s: float = Field(gt=0, description="received")
    joules_per_token: float = Field(gt=0, description="trained; read: a third")
    joules_per_byte: float = Field(gt=0, description="sent or received")
    available: tuple[Chance, ...] = Field(min_length=24, max_length=24, description="chance by local hour, from 0 h")
    rank: int = Field(0, ge=0, description="of the shared adapter that fits; 0: full")
    source: Text = Field(description="where the figures come from")


class DeviceClasses(Config):
    """A file of device classes: one `[[classes]]` each."""

    name: str = Field(description="of the file")
    classes: tuple[DeviceClass, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_a_population(self) -> Self:
        names, total = [c.name for c in self.classes], sum(c.share for c in self.classes)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"class names must be unique, given twice: {', '.join(twice)}")
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of {', '.join(names)} sum to {total:g} and must sum to 1")
        return self


@dataclass(frozen=True)
class DevicePopulation:
    """What a run's fates depend on."""

    settings: WorldConfig
    classes: tuple[DeviceClass, ...]
    seed: int


def load_classes(path: str | Path) -> tuple[DeviceClass, ...]:
    """The device classes of a file or of a bundled one (`world/devices`); raises `ConfigError`."""
    found = find_config(str(path))
    return validate(DeviceClasses, read_tree(found), str(found), found).classes


def class_of(device: str, classes: Sequence[DeviceClass], seed: int) -> DeviceClass:
    """A device's class: by name and seed alone, so that another device never changes it."""
    bounds = list(accumulate(c.share for c in classes))
    return classes[min(bisect_right(bounds, uniform(seed, "class", device)), len(classes) - 1)]


def zone_h(device: str, seed: int) -> float:
    """A device's time zone: hours ahead of the first, uniform over the day."""
    return 24 * uniform(seed, "zone", device)


def local_hour(world: DevicePopulation, device: str, t_s: float) -> float:
    """The time of day where a device is, in [0, 24)."""
    return (world.settings.start_hour + t_s / 3600 + zone_h(device, world.seed)) % 24


def uniform(seed: int, *purpose: str | int) -> float:
    """In [0, 1), by a hash: 53 of its bits, all that a float holds."""
    return (derive_seed(seed, "world", *purpose) >> 10) / 2**53
