"""Which task, whose, and how much of it: a benchmark's from its official files, or a stand-in from what is here."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from florilegium.privacy.common.base_config import Config
from florilegium.privacy.common.registry import check
from florilegium.privacy.seeds import derive_seed
from florilegium.simulation.data.errors import DataError
from florilegium.simulation.data.population import DataConfig, Half, half_of
from florilegium.simulation.tasks.benchmarks import BENCHMARKS
from florilegium.simulation.tasks.official import split_users
from florilegium.simulation.tasks.stand_ins import STAND_INS, StandIn, load_stand_in, stand_in
from florilegium.simulation.tasks.task import Task, TaskUser

NAMES = (*STAND_INS, *BENCHMARKS)
HELD_OUT_SHARE = 0.25


class TaskConfig(Config):
    """A task and its people."""

    extensible: ClassVar = {"name": NAMES}

    name: str = Field("chat-reply", description="a stand-in, or a benchmark's")
    folder: str = Field("", description="of a benchmark's official files for the task")
    file: Literal["train", "dev", "test"] = Field("dev", description="which of a benchmark's; test needs its golds")
    users: int = Field(64, ge=1, description="who is reported on; of a benchmark, those with the longest histories")
    pool_users: int = Field(64, ge=1, description="others, whom the task is learned from: at most, of a benchmark")
    split: Half | Literal["all"] = Field(
        "test", description="tune on development users, report on test users; all: of a benchmark, as OPPU tests"
    )
    min_history: int = Field(10, ge=1, description="users with fewer items are left out")
    max_history: int = Field(120, ge=1, description="items kept: the first ones in time, of a benchmark the last")
    queries_per_user: int = Field(8, ge=1, description="at most: the first ones")

    @field_validator("name")
    @classmethod
    def _is_a_task(cls, name: str) -> str:
        return check(name, NAMES, StandIn)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_history < self.min_history:
            raise ValueError(f"max_history = {self.max_history} must be >= min_history = {self.min_history}")
        if (self.name in BENCHMARKS) != bool(self.folder):
            need = "needs folder = the folder of its official files" if not self.folder else "has no folder"
            raise ValueError(f"task {self.name!r} {need}; got folder = {self.folder!r}")
        if self.name in BENCHMARKS and self.file not in BENCHMARKS[self.name].files:
            has = " or ".join(BENCHMARKS[self.name].files)
            raise ValueError(f"task {self.name!r} has no file = {self.file!r}; set it to {has}")
        return self


def load_task(config: TaskConfig, seed: int) -> tuple[Task, list[TaskUser], list[TaskUser]]:
    """The task, the pool that it may be learned from, and the users who are reported on.

    Nobody is in both, nobody of the development half is in the test half, and no history holds anything of a query
    or later than one. What is drawn depends on data, config and seed alone. Raises `DataError`.
    """
    if config.name in BENCHMARKS:
        return _official(config, seed)
    least = _with_held_out(config.min_history, up=True)
    data = DataConfig(
        users=config.users + config.pool_users,
        split=config.split,
        min_pairs=least,
        max_pairs=max(least, _with_held_out(config.max_history, up=False)),
        held_out_share=HELD_OUT_SHARE,
        queries_per_user=config.queries_per_user,
    )
    pool, users = load_stand_in(config.name, config.users, data, seed)
    return stand_in(config.name).task, pool, users


def _with_held_out(history: int, *, up: bool) -> int:
    """Items of a user whose history, the rest after `HELD_OUT_SHARE` is held out, has at least (at most) so many.

    >>> _with_held_out(10, up=True), _with_held_out(120, up=False)
    (14, 160)
    """
    share = 1 - HELD_OUT_SHARE
    return max(2, int(-(-history // share) if up else history // share))


def _official(config: TaskConfig, seed: int) -> tuple[Task, list[TaskUser], list[TaskUser]]:
    """Of each half of the people those with the longest histories; the pool is drawn from the rest of the half."""
    task, found = BENCHMARKS[config.name].load(Path(config.folder).expanduser(), config.file)
    able = (u for u in found if len(u.history) >= config.min_history and config.split in (half_of(u.owner), "all"))
    rest, users = split_users(able, config.users)
    if len(users) < config.users or not rest:
        raise DataError(
            f"users = {config.users}, but of the {len(found)} users of {config.folder}, with "
            f"min_history = {config.min_history}, {len(users)} are left for {config.split} and {len(rest)} for the "
            "pool; lower users or min_history"
        )
    pool = sorted(rest, key=lambda user: derive_seed(seed, "pool", user.id))[: config.pool_users]
    return task, [_cut(u, config) for u in pool], [_cut(u, config) for u in users]


def _cut(user: TaskUser, config: TaskConfig) -> TaskUser:
    kept = user.history[-config.max_history :], user.queries[: config.queries_per_user]
    return TaskUser(user.id, *kept, user.person)
