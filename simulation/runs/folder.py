"""The folder of a run: its complete config, its one stream of events, its checkpoints and its devices' files."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from florilegium.privacy.common.registry import looking
from florilegium.privacy.release import Array
from florilegium.privacy.seeds import fresh_secret
from florilegium.simulation.config import ExperimentConfig, load_config
from florilegium.simulation.runs.changes import SPEED, changes, check, told
from florilegium.simulation.runs.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from florilegium.simulation.runs.device_store import Shards
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.events import Evaluation, Event, Facts, RunStart, append, read, rewind
from florilegium.simulation.runs.provenance import sources_sha256, write_sources
from florilegium.simulation.settings import ConfigError, dump_config, find_config, validate

Kind = TypeVar("Kind", bound=Event)
AGGREGATE = "-aggregate"  # ends the names of checkpoints of rounds that are not over
SHARDS_OF_AN_ACTOR = 4  # so that a run can be resumed with more actors, and that a lost one's are shared out
OTHER_CODE = "another version of the code"


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run and how its files are written."""

    path: Path

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def faults(self) -> Path:
        """Where processes that the driver cannot hear leave what went wrong (`simulation.engines.faults`)."""
        return self.path / "faults"

    @cached_property
    def shards(self) -> Shards:
        """The devices and their ledgers."""
        return Shards(self.path / "devices")

    @cached_property
    def config(self) -> ExperimentConfig:
        """The config that the run was started with."""
        text = (self.path / "config.toml").read_text(encoding="utf-8")
        with looking():  # it may be somebody else's: what is named in it is imported where it is used
            return validate(ExperimentConfig, tomllib.loads(text), str(self.path / "config.toml"))

    def record(self, event: Event) -> None:
        """Appends one event to the log."""
        append(self.metrics, [event])

    def record_all(self, events: Iterable[Event]) -> None:
        """Appends events to the log, with one time."""
        append(self.metrics, events)

    def events(self) -> Iterator[Event]:
        """The run's log; raises `RunError` for a line that is no event, but for a torn last one."""
        return read(self.metrics) if self.metrics.exists() else iter(())

    def events_of(self, kind: type[Kind]) -> Iterator[Kind]:
        """The events of one kind."""
        return (event for event in self.events() if isinstance(event, kind))

    def save_shared(
        self,
        round_number: int,
        arrays: Mapping[str, Array],
        heads: Mapping[str, str],
        moments: Mapping[str, Any],
        facts: Facts | None = None,
    ) -> None:
        """The server's checkpoint, with the heads of the devices' ledgers: with it a round is done.

        With `facts` it is what the releases came to, and the round is not: the devices do not have it yet.
        """
        path = self.path / "server" / f"{round_number:05d}{'' if facts is None else AGGREGATE}.safetensors"
        write_checkpoint(path, Checkpoint(round_number, arrays, heads, moments, facts))

    def shared(self, round_number: int) -> Checkpoint:
        """The checkpoint of a round that is done."""
        return read_checkpoint(self.path / "server" / f"{round_number:05d}.safetensors")

    def last_shared(self) -> Checkpoint | None:
        """The newest checkpoint of a round that is done."""
        found = self._checkpoints()
        return read_checkpoint(found[-1]) if found else None

    @property
    def has_rounds(self) -> bool:
        """Whether there is a checkpoint, if only that of what is before round 1."""
        return any(self._checkpoints())

    def _checkpoints(self) -> list[Path]:
        return sorted(p for p in (self.path / "server").glob("*.safetensors") if AGGREGATE not in p.stem)

    @property
    def done(self) -> int:
        """The rounds that are."""
        last = self.last_shared()
        return last.round if last else 0

    def aggregate(self, round_number: int) -> Checkpoint | None:
        """What a round's releases came to, if it came so far."""
        path = self.path / "server" / f"{round_number:05d}{AGGREGATE}.safetensors"
        return read_checkpoint(path) if path.exists() else None

    def server_secret(self) -> int:
        """Of the server's noise: drawn once from the operating system, and kept beside the checkpoints."""
        path = self.path / "server" / "secret"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_suffix(".new")
            fresh.touch(mode=0o600)
            fresh.write_text(f"{fresh_secret():032x}", encoding="ascii")
            fresh.replace(path)
        return int(path.read_text(encoding="ascii"), 16)

    def rewind(self, round_number: int) -> None:
        """Drops the events of what comes after a round, so that it can be done again; says how settings changed.

        Raises `RunError` for a log with a line that is no event, and leaves it as it is.
        """
        if not self.metrics.exists():
            raise RunError(f"{self.metrics} is missing; begin anew with --overwrite")
        more = False

        def changed(event: Event, facts: Facts) -> Facts | None:
            nonlocal more
            if isinstance(event, RunStart):
                more = event.rounds < self.config.rounds
                return _brought_up_to_date(facts, self.config, round_number)
            if _belongs(event, round_number):
                return facts
            return facts | {"final": False} if more and curves and _is_of_a_curve(event) else None

        curves = self.config.evaluation.every_round
        rewind(self.metrics, changed)


def _belongs(event: Event, round_number: int) -> bool:
    """Whether an event was written in the rounds up to this one; the verdict after the last belongs to none."""
    number = getattr(event, "round", None)
    before = number is not None and number <= round_number and not getattr(event, "final", False)
    return before and round_number > 0  # what is before round 1 is evaluated anew


def _is_of_a_curve(event: Event) -> bool:
    """Whether it is a figure of the last round that those of rounds before the last have too."""
    return isinstance(event, Evaluation) and event.metric == "nll" and event.arm != "pooled"


def _brought_up_to_date(facts: Facts, config: ExperimentConfig, round_number: int) -> Facts:
    """The event that a run began with, for one that goes on with these settings."""
    with looking():
        before = validate(ExperimentConfig, dict(facts["config"]), "the settings in metrics.jsonl")
    found = changes(before, config)
    slow = {key: values for key, values in found.items() if not key.startswith(SPEED)}
    code = {"sources": sources_sha256(config.extensions())}
    now = facts | {"rounds": config.rounds, "config": config.model_dump(mode="json"), **code}
    news = [*([told(slow)] if slow else []), *([OTHER_CODE] if facts.get("sources") != code["sources"] else [])]
    if news:
        now["changed"] = [*facts.get("changed", []), {"after_round": round_number, "settings": ", ".join(news)}]
    return now


def create(path: Path, config: ExperimentConfig, *, overwrite: bool = False) -> RunFolder:
    """A new run. Refuses a folder that exists, unless it is a run and may be overwritten.

    Its folder is there whole or not at all, whenever the process is killed. The run that it replaces lies aside until
    `settle` says that the new one has begun.
    """
    check_new(path, overwrite=overwrite)
    fresh = path.with_name(f".{path.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.parent.mkdir(parents=True, exist_ok=True)
    fresh.mkdir(mode=0o700)  # it will hold what people said
    _write_config(fresh, config)
    write_sources(fresh, config.extensions())
    Shards.create(fresh / "devices", config.ray.shards or max(1, SHARDS_OF_AN_ACTOR * config.ray.actors))
    if path.exists() and any(path.iterdir()):
        shutil.rmtree(_aside(path), ignore_errors=True)
        path.rename(_aside(path))
    fresh.rename(path)
    return RunFolder(path)


def check_new(path: Path, *, overwrite: bool) -> None:
    """Raises `RunError` where no new run may be made."""
    if path.exists() and any(path.iterdir()):
        if not overwrite:
            raise RunError(f"{path} exists; use --resume to go on with it, --overwrite to replace it, or name=…")
        if not (path / "config.toml").exists():
            raise RunError(f"{path} is not the folder of a run (no config.toml); it is left alone")


def settle(run: RunFolder) -> bool:
    """Whether a new run has begun. If not, its folder goes, and the one that it should replace comes back."""
    begun = run.metrics.exists()
    if begun:
        shutil.rmtree(_aside(run.path), ignore_errors=True)
    else:
        shutil.rmtree(run.path)
        if _aside(run.path).exists():
            _aside(run.path).rename(run.path)
    return begun


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def find_run(name: str, overrides: Sequence[str], runs: Path, *, resuming: bool) -> tuple[ExperimentConfig, Path]:
    """The settings and the folder of a run to begin; or to go on with, where the name may be that of its folder."""
    given = Path(name)
    stored = given / "config.toml"
    if resuming and stored.is_file():
        return load_config(stored, overrides), given
    try:
        settings = load_config(find_config(name), overrides)
    except ConfigError:
        if not stored.is_file():
            raise
        raise RunError(f"{given} is a run: go on with --resume, or begin another one with {stored} name=…") from None
    return settings, runs / settings.name


def resume(path: Path, config: ExperimentConfig) -> RunFolder:
    """The run in a folder; raises `ConfigError` for settings that it cannot go on with."""
    check_resumable(path, config)
    _write_config(path, config)
    write_sources(path, config.extensions())  # which may have been mended; that is told in the run's event
    shutil.rmtree(RunFolder(path).faults, ignore_errors=True)  # of before
    shutil.rmtree(_aside(path), ignore_errors=True)  # of an --overwrite that was killed
    return RunFolder(path)


def check_resumable(path: Path, config: ExperimentConfig) -> None:
    """Raises `RunError` where there is no run, and `ConfigError` where it cannot go on with these settings."""
    if not (path / "config.toml").exists():
        raise RunError(f"{path} has no config.toml: there is no run to resume")
    run = RunFolder(path)
    check(run.config, config, run.done, f"{path}/config.toml")


def _write_config(path: Path, config: ExperimentConfig) -> None:
    fresh = path / "config.new"
    fresh.write_text(dump_config(config), encoding="utf-8")
    fresh.replace(path / "config.toml")
