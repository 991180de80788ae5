"""The settings of an experiment: one tree, read from a TOML file that holds only what differs from the defaults."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from florilegium.client.config import DeviceConfig
from florilegium.client.lm.config import ReplyConfig
from florilegium.client.lm.places import NAMES
from florilegium.client.selection.lexicons import SOURCES
from florilegium.privacy.common.base_config import Config, Names, over
from florilegium.privacy.common.registry import check
from florilegium.privacy.secure_aggregation.config import SecureAggregationConfig, why_not_summed
from florilegium.server.config import ServerConfig, devices_to_ask
from florilegium.simulation.data.conversations import READERS
from florilegium.simulation.data.population import DataConfig
from florilegium.simulation.settings import ConfigError, find_config, read_tree, validate

ENGINES = ("cohort", "flower")  # of `simulation.experiment`
TRACKERS = {"tensorboard": "TensorBoard", "mlflow": "Mlflow", "wandb": "Wandb"}  # of `simulation.runs.trackers`


class PersonConfig(Config):
    """Measures of whether a model has become its person's (`simulation.evaluation.person`), after the last round."""

    people: int = Field(24, ge=0, description="evaluated devices that they are made on; below 8: they are left out")
    replies: int = Field(3, ge=1, description="held-out replies of each that are scored under everybody's adapters")


class EvaluationConfig(Config):
    """How held-out replies are used. How many there are of each user is set in [data]."""

    every_round: bool = Field(True, description="learning curves; the last round is always evaluated")
    users: int = Field(
        0, ge=0, description="devices that are evaluated and have a control: those asked most often; 0: all"
    )
    newcomers: int = Field(0, ge=0, description="further users, who never take part, evaluated at the end")
    sampling: ReplyConfig = ReplyConfig(max_new_tokens=24)
    rouge_queries_per_user: int = Field(4, ge=0, description="replies generated per user and arm at the end")
    pooled_epochs: int = Field(1, ge=0, description="of the ceiling that sees all data without privacy; 0: left out")
    pooled_batch_size: int = Field(64, ge=1, description="examples of a step of that ceiling")
    pooled_learning_rate: float = Field(2e-3, gt=0, description="of AdamW, of that ceiling")
    replies_shown: int = Field(6, ge=0, description="before and after replies in the report")
    person: PersonConfig = PersonConfig()


class EngineConfig(Config):
    """What carries messages between server and devices, and what becomes of a device that raises."""

    extensible: ClassVar = {"name": ENGINES}

    name: str = Field("cohort", description="cohort: devices in cohorts; flower: Flower's own simulation")
    on_device_error: Literal["end", "count"] = Field(
        "end", description="end the run; count: where faults of devices are simulated (`DeviceFaultError`)"
    )
    failed_share: float = Field(
        0.1, ge=0, le=1, description="count: of the devices that are asked at once; above it the run ends"
    )

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        return check(value, ENGINES, Callable)


def place_of(address: str) -> tuple[str, int] | None:
    """Host and port of `HOST:PORT` or `ray://HOST:PORT`."""
    found = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = found.hostname, found.port
    except ValueError:
        return None
    return (host, port) if host and port else None


class RayConfig(Config):
    """Ray actors that simulated devices live in, on a cluster say. Changes speed, not results (but for rounding)."""

    actors: int = Field(0, ge=0, description="Ray actors, each with the base model; 0: `workers` of this machine")
    cpus_per_actor: float = Field(
        1.0, gt=0, description="that Ray reserves for an actor; it computes with as many threads"
    )
    gpus_per_actor: float = Field(0.0, ge=0, description="that Ray reserves for an actor")
    address: str = Field("", description="of a cluster to join; empty: actors on this machine")
    shards: int = Field(0, ge=0, le=9999, description="folders that devices are kept in; 0: four an actor; fixed")

    @field_validator("address")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        if value and value not in ("auto", "local") and not place_of(value):
            raise ValueError("must be HOST:PORT, ray://HOST:PORT or auto")
        return value

    @property
    def cpus_needed(self) -> int:
        return math.ceil(self.actors * self.cpus_per_actor)


class WorldConfig(Config):
    """Which devices there are and how long the server waits for them."""

    classes: str = Field("", description="a file of device classes, or world/devices; empty: all equal, always there")
    deadline_s: float = Field(0, ge=0, description="an answer that takes longer is late; 0: none")
    over_sampling: float = Field(1.0, ge=1, description="of K wanted answers, so many times K devices are asked")
    drop_out: float = Field(0, ge=0, lt=1, description="chance that a device that began never answers")
    start_hour: float = Field(0, ge=0, lt=24, description="of the day in the first time zone, when the run begins")
    idle_s: float = Field(60, gt=0, description="pause between rounds")

    @model_validator(mode="after")
    def _settings_need_a_world(self) -> Self:
        changed = [k for k, field in type(self).model_fields.items() if getattr(self, k) != field.default]
        if changed and not self.classes:
            raise ValueError(f"{', '.join(changed)} without devices; set world.classes=world/devices")
        return self


# of `simulation.baselines.registry`
BASELINES = ("local", "fedavg", "fedprox", "ours", "ditto", "fedper", "fedrep", "feddpa", "fedalt")


class BaselineConfig(Config):
    """Another scheme of personalisation in the place of our own. FedProx's μ is `shared.proximal`."""

    extensible: ClassVar = {"name": BASELINES}

    name: str = Field("", description="of the scheme; empty: our own method")
    learning_rate: float = Field(3e-3, gt=0, description="of AdamW, for whatever is trained")
    steps: int = Field(8, ge=2, description="of a device in a round; who trains two adapters gives half to each")
    batch_size: int = Field(8, ge=1, description="examples of a step")
    ditto_lambda: float = Field(0.1, ge=0, description="Ditto's pull of each device's own model to the shared one")
    personal_share: float = Field(
        0.5, gt=0, lt=1, description="FedPer, FedRep: of the adapted layers, the last ones, that stay on the device"
    )
    mix: float = Field(
        0.5, ge=0, le=1, description="FedDPA: the local adapter's weight in training, and its largest for a query"
    )
    compared: int = Field(5, ge=1, description="FedDPA in a study: own examples that a query is compared with")

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        return check(value, BASELINES) if value else value

    @field_validator("steps")
    @classmethod
    def _has_halves(cls, value: int) -> int:
        if value % 2:
            raise ValueError("must be even: who trains two adapters gives half of the steps to each")
        return value


class ExperimentConfig(DeviceConfig):
    """A federation to simulate: its devices, its server, its people."""

    elsewhere: ClassVar[Mapping[str, str]] = {
        "clients": "it is called data.users here",
        "num_clients": "it is called data.users here",
        "dataset": "it is called data.name here",
        "lora": "its settings are shared.adapter and personal.adapter",
        "rival": "it is called baseline here",
    }

    name: str = Field("experiment", description="of the run's folder")
    seed: int = Field(0, ge=0, description="of all that is drawn")
    engine: EngineConfig = Field(EngineConfig(), description="its name alone will do: engine = 'flower'")
    cohort_size: int = Field(128, ge=1, description="devices in one pass at most; changes speed and rounding alone")
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="processes of this machine that devices live in; auto: one a core, as memory allows"
    )
    data: DataConfig = DataConfig()
    server: ServerConfig = ServerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    ray: RayConfig = RayConfig()
    world: WorldConfig = WorldConfig()
    baseline: BaselineConfig = BaselineConfig()
    callbacks: Names = Field(
        (), description=f"{', '.join(TRACKERS)}, or package.module:NAME of a `Callback` that is told how a run goes on"
    )

    @property
    def reading(self) -> str:
        """What the policy reads off the base's hidden states."""
        return self.selection.reading

    @property
    def asked(self) -> int:
        """Devices that a round asks."""
        wanted = devices_to_ask(self.server.wanted(self.data.users), self.world.over_sampling)
        return min(self.data.users, max(wanted, self.server.least_releases))

    @property
    def summed(self) -> SecureAggregationConfig:
        """With all that a round asks for what is left to it."""
        told = self.secure_aggregation
        devices = told.devices or self.asked
        return told.model_copy(update={"devices": devices, "survivors": told.survivors or devices})

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_a_baseline(cls, values: Any) -> Any:
        """A baseline trains on what [selection] keeps and protects whole devices, where nothing else is said."""
        given = values.get("baseline") if isinstance(values, dict) else None
        given = given.model_dump() if isinstance(given, Config) else given
        if not isinstance(given, dict) or not given.get("name"):
            return values
        alone = given["name"] == "local"
        return over(values, {
            "shared": {"source": "buffer", "pool_capacity": 0, "adapter": {"alpha": 8.0, "factors": "both"}},
            "privacy": {"mode": "none" if alone else "user-central", "clips": "change"},
            **({"server": {"rule": "none"}} if alone else {}),
            "evaluation": {"pooled_epochs": 0},
        })  # fmt: skip

    @model_validator(mode="after")
    def _baseline_fits(self) -> Self:
        if name := self.baseline.name:
            refuse_unfit(self, name)
        return self

    @model_validator(mode="after")
    def _delta_is_small(self) -> Self:
        """With δ = 1 / n a mechanism may publish one of n units and keep its promise."""
        by_dialogue, devices = self.privacy.by_dialogue, self.data.users
        units = devices * (self.data.max_pairs if by_dialogue else 1)
        if self.privacy.mode != "none" and self.privacy.delta * units >= 1:
            what = f"{devices:,} devices" + (f" of {self.data.max_pairs} dialogues" if by_dialogue else "")
            small = 10.0 ** math.floor(-math.log10(units) - 1e-9)
            raise ValueError(
                f"privacy.delta = {self.privacy.delta:g} must be < 1 / n = {1 / units:.2g} ({what}); "
                f"set privacy.delta={small:g}"
            )
        return self

    @model_validator(mode="after")
    def _once_said(self) -> Self:
        """What one dialogue says must not stand in another one's prompt where dialogues are protected one by one."""
        releasing = not self.server.absent and self.shared.pool_capacity
        if self.privacy.by_dialogue and releasing and self.data.context_turns > 1:
            raise ValueError(
                f"data.context_turns = {self.data.context_turns}: a reply would be in the prompts of those after it, "
                f"and protected in one of them alone; use 1, a user-* [privacy] mode, or server.rule = 'none'"
            )
        return self

    @model_validator(mode="after")
    def _bands_fit(self) -> Self:
        """Correlated noise is calibrated for devices that take part every so many rounds."""
        bands, privacy = self.server.noise_bands, self.privacy
        if bands > 1 and privacy.mode != "user-central":
            raise ValueError(f"server.noise_bands = {bands} needs privacy.mode = 'user-central': the server adds it")
        times = -(-self.rounds // bands)
        if bands > 1 and privacy.releases != times:
            raise ValueError(
                f"privacy.releases = {privacy.releases} must be {times}: so often is a device asked in {self.rounds} "
                f"rounds with server.noise_bands = {bands}"
            )
        return self

    @model_validator(mode="after")
    def _sum_is_one(self) -> Self:
        """What devices protect together has to be summed, of as many as are said to be there."""
        if not self.privacy.distributed:
            return self
        mode, server, summed = self.privacy.mode, self.server, self.summed
        wrong = {
            f"rule = {server.rule!r}": server.rule != "mean",
            f"buffer = {server.buffer}": server.buffer > 0,
            f"products = {server.products!r}": server.products != "average",
        }
        if odd := [setting for setting, is_so in wrong.items() if is_so]:
            raise ValueError(f"privacy.mode = {mode!r} gives a server the sum of a round; server.{odd[0]} needs more")
        if summed.devices < self.asked:
            raise ValueError(
                f"secure_aggregation.devices = {summed.devices} is below the {self.asked} devices that a round asks: "
                f"their sum could wrap"
            )
        if self.world.classes and summed.survivors >= self.asked:
            raise ValueError("[world] has devices that drop out; set secure_aggregation.survivors below those asked")
        if summed.survivors > self.asked:
            raise ValueError(
                f"secure_aggregation.survivors = {summed.survivors} is above the {self.asked} devices that a round "
                f"asks: none would come to a sum"
            )
        if why := why_not_summed(summed.devices, summed.survivors, summed.colluding):
            raise ValueError(why)
        return self

    @model_validator(mode="after")
    def _server_fits(self) -> Self:
        server, privacy, factors = self.server, self.privacy, self.shared.adapter.factors
        asked = min(self.data.users, devices_to_ask(server.wanted(self.data.users), self.world.over_sampling))
        if asked < server.least_releases:
            raise ValueError(
                f"server.rule = {server.rule!r} needs {server.least_releases} releases in a round of {asked} devices; "
                f"ask more, or lower server.byzantine and krum_keep, or raise trimmed_share"
            )
        if server.products != "average" and factors != "both":
            raise ValueError(f"server.products = {server.products!r} needs shared.adapter.factors = 'both'")
        if privacy.mode == "user-central" and (not server.sums or server.buffer):
            odd = f"buffer = {server.buffer}" if server.sums else f"rule = {server.rule!r}"
            raise ValueError(f"privacy.mode = 'user-central' adds noise to a round's sum; server.{odd} makes none")
        if privacy.mode == "user-central" and server.products != "average":
            raise ValueError(
                f"server.products = {server.products!r} sends products of the devices' own factors, which the noise of "
                f"privacy.mode = 'user-central' does not cover; use products = 'average'"
            )
        if server.noise_bands > 1 and server.sampled_share != 1:
            raise ValueError("server.noise_bands asks each device in its turn; leave server.sampled_share out")
        if server.buffer and (server.sampled_share != 1 or self.world.over_sampling != 1 or self.world.deadline_s):
            raise ValueError(
                "server.buffer has no rounds: leave server.sampled_share, world.over_sampling and world.deadline_s "
                "out; server.concurrency says how many devices are at work"
            )
        if server.buffer and not self.world.classes:
            raise ValueError("server.buffer needs to know who is how fast; set world.classes=world/devices")
        if server.absent and self.world.classes:
            raise ValueError("[world] tells when a server gets its answers; server.rule = 'none' has no server")
        if self.engine.name != "cohort" and (self.world.classes or self.ray.actors):
            raise ValueError("[world] and ray.actors need engine = 'cohort'")
        if self.workers not in ("auto", 1) and (self.ray.actors or self.engine.name != "cohort"):
            raise ValueError(
                f"workers = {self.workers} needs engine = 'cohort' and ray.actors = 0, else leave it 'auto'"
            )
        return self

    @field_validator("callbacks")
    @classmethod
    def _are_there(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check(name, TRACKERS) for name in value)

    @field_validator("engine", mode="before", json_schema_input_type=str | EngineConfig)
    @classmethod
    def _by_its_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _folder_name(cls, value: str) -> str:
        if not value or not all(c.isalnum() or c in "-_." for c in value) or value.startswith("."):
            raise ValueError("must be letters, digits, '-', '_' or '.': it names the run's folder")
        return value


def refuse_unfit(config: ExperimentConfig, name: str) -> None:
    """Raises `ValueError` for what a baseline does not have in a run."""
    what, server = f"baseline.name = {name!r}", config.server
    if name == "fedalt":
        raise ValueError(
            f"{what} sends each device another adapter, and a round has one for all; use florilegium study"
        )
    check_baseline(config, name)
    if (name == "local") != server.absent:
        raise ValueError(
            f"{what} {'has no server: set' if name == 'local' else 'has a server: leave out'} server.rule = 'none'"
        )
    if config.shared.source != "buffer":
        raise ValueError(f"{what} trains on what [selection] keeps; leave shared.source out")
    if server.products != "average" or server.buffer or server.noise_bands > 1 or config.world.classes:
        raise ValueError(f"{what} has no server.products, server.buffer, server.noise_bands and no [world]")
    if config.shared.synthetic or config.personal.adapter.kind != "lora":
        raise ValueError(f"{what} trains on replies alone, and adapters of [shared]; leave shared.synthetic, kind out")
    if config.evaluation.newcomers or config.evaluation.pooled_epochs:
        raise ValueError(f"{what} has no newcomers and no pooled arm; leave evaluation.newcomers and pooled_epochs out")


def check_baseline(config: ExperimentConfig, name: str) -> None:
    """Raises `ValueError` for settings under which a baseline is not the scheme that it is called."""
    mode, factors = config.privacy.mode, config.shared.adapter.factors
    if factors != "both":
        raise ValueError(f"shared.adapter.factors = {factors!r} must be 'both': baselines train all factors")
    if mode not in ("none", "user-central"):
        raise ValueError(f"privacy.mode = {mode!r} must be 'none' or 'user-central': baselines clip whole changes")
    if mode != "none" and name == "fedalt":
        raise ValueError("baseline.name = 'fedalt' uploads whole adapters, not changes, and has no noise; use 'none'")
    if config.data.users < 2:
        raise ValueError(f"data.users = {config.data.users} must be >= 2: baselines are federations")


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The settings of a TOML file, or of a config that comes with the package by its name, such as `quickstart`.

    `overrides` are `key.path=value` with a TOML value or a bare word. Raises `ConfigError` for what cannot be.
    """
    path = find_config(str(name))
    tree = read_tree(path, overrides)
    if "study" in tree:
        raise ConfigError(f"{path}: is a study of several experiments; run it with: florilegium study {path}")
    given = " ".join(o if len(o) <= 60 else f"{o[:60]}…" for o in overrides)
    return validate(
        ExperimentConfig, tree, f"{path.name} with {given}" if given else str(path), None if overrides else path
    )


def with_absolute_paths(config: ExperimentConfig) -> ExperimentConfig:
    """As processes in other folders can read it too."""
    world = str(find_config(config.world.classes).resolve()) if config.world.classes else ""
    lexicons = tuple(_absolute(source, SOURCES) for source in config.selection.lexicons)
    return config.model_copy(
        update={
            "selection": config.selection.model_copy(update={"lexicons": lexicons}),
            "data": config.data.model_copy(update={"name": _absolute_data(config.data.name)}),
            "model": config.model.model_copy(update={"name": _absolute(config.model.name, NAMES)}),
            "world": config.world.model_copy(update={"classes": world}),
        }
    )


def _absolute_data(name: str) -> str:
    """An existing file wins over a known name, a folder does not."""
    return _absolute(name, () if Path(name).expanduser().is_file() else READERS)


def _absolute(name: str, known: Collection[str]) -> str:
    """The path of a file or a folder; another name stays what it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name not in known and path.exists() else name
