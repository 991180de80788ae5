"""The people of a simulation by the names of their devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from florilegium.simulation.data.population import User

MADE_AT_ONCE = 1024  # users that are kept in memory


def device_name(index: int) -> str:
    """A device's name follows from its place in the population; the user's id stays out of file names."""
    return f"device-{index:05d}"


class UsersByDevice(Mapping[str, User]):
    """The users of a population by the names of their devices; a user is made when asked for."""

    def __init__(self, population: Sequence[User]) -> None:
        self.population = population
        self._user = lru_cache(maxsize=MADE_AT_ONCE)(self._made)

    def __getitem__(self, name: str) -> User:
        return self._user(name)

    def _made(self, name: str) -> User:
        prefix, _, number = name.rpartition("-")
        if prefix != "device" or not number.isdecimal() or int(number) >= len(self.population):
            raise KeyError(name)
        return self.population[int(number)]

    def __iter__(self) -> Iterator[str]:
        return (device_name(i) for i in range(len(self.population)))

    def __len__(self) -> int:
        return len(self.population)

    def reply(self, device: str, dialogue: str) -> str:
        """What the person wrote, which stands for what they would annotate."""
        return next(d.response for d in self[device].stream if d.id == dialogue)
