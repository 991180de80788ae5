"""The folder of a run: its complete config, its one stream of events, its checkpoints and its devices' files."""

from __future__ import annotations

import json
import shutil
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

import florilegium
from florilegium.privacy.common.errors import UserError
from florilegium.privacy.common.registry import source_files
from florilegium.privacy.release import Array
from florilegium.privacy.seeds import fresh_secret
from florilegium.simulation.config import ExperimentConfig, load_config
from florilegium.simulation.runs.changes import SPEED, changes, check, told
from florilegium.simulation.runs.device_store import Shards
from florilegium.simulation.settings import ConfigError, dump_config, find_config, validate

Event = dict[str, Any]
MOMENTS = "optimizer."  # begins the names of what a server's optimizer remembers
AGGREGATE = "-aggregate"  # ends the names of checkpoints of rounds that are not over
SHARDS_OF_AN_ACTOR = 4  # so that a run can be resumed with more actors, and that a lost one's are shared out
OTHER_CODE = "another version of the code"
PACKAGES = ("privacy", "client", "server", "simulation")


class RunError(UserError):
    """A run's folder exists, is missing or does not fit what is asked of it."""


HEADS = ("heads.names", "heads.values")  # of a checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """What the server had at the end of a round, or after its releases."""

    round: int
    shared: dict[str, Array]
    heads: dict[str, str]  # device → head of its ledger with its last release
    moments: dict[str, Any]  # of the server's optimizer
    facts: Event  # of the round, where it is not over


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
        return validate(ExperimentConfig, tomllib.loads(text), str(self.path / "config.toml"))

    def record(self, event: str, **facts: Any) -> None:
        """Appends one event."""
        self.record_all(event, [facts])

    def record_all(self, event: str, of_each: Iterable[Event]) -> None:
        """Appends events of one kind."""
        told = {"event": event, "time": round(time.time(), 3)}
        with self.metrics.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(told | facts, allow_nan=True) + "\n" for facts in of_each)

    def events(self) -> Iterator[Event]:
        """All whole lines; a torn last one, from a process that was killed, is passed over."""
        if not self.metrics.exists():
            return
        with self.metrics.open(encoding="utf-8") as stream:
            for line in stream:
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    continue

    def save_shared(
        self,
        round_number: int,
        arrays: Mapping[str, Array],
        heads: Mapping[str, str],
        moments: Mapping[str, Any],
        facts: Event | None = None,
    ) -> None:
        """The server's checkpoint, with the heads of the devices' ledgers: with it a round is done.

        With `facts` it is what the releases came to, and the round is not: the devices do not have it yet.
        """
        path = self.path / "server" / f"{round_number:05d}{'' if facts is None else AGGREGATE}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        stored = dict(arrays) | {f"{MOMENTS}{name}": moment for name, moment in moments.items()} | _packed(heads)
        metadata = {"facts": json.dumps(facts)}
        save_file({k: np.ascontiguousarray(v) for k, v in stored.items()}, fresh, metadata)
        fresh.replace(path)

    def shared(self, round_number: int) -> Checkpoint:
        """The checkpoint of a round that is done."""
        return _read_checkpoint(self.path / "server" / f"{round_number:05d}.safetensors")

    def last_shared(self) -> Checkpoint | None:
        """The newest checkpoint of a round that is done."""
        found = self._checkpoints()
        return _read_checkpoint(found[-1]) if found else None

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
        return _read_checkpoint(path) if path.exists() else None

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
        """Drops the events of what comes after a round, so that it can be done again; says how settings changed."""
        fresh, more = self.metrics.with_suffix(".new"), False
        with fresh.open("w", encoding="utf-8") as stream:
            for event in self.events():
                if event["event"] == "run":
                    more = event["rounds"] < self.config.rounds
                    stream.write(json.dumps(_changed(event, self.config, round_number)) + "\n")
                elif _belongs(event, round_number):
                    stream.write(json.dumps(event) + "\n")
                elif more and self.config.evaluation.every_round and _is_of_a_curve(event):
                    stream.write(json.dumps(event | {"final": False}) + "\n")
        fresh.replace(self.metrics)


def _read_checkpoint(path: Path) -> Checkpoint:
    with safe_open(path, "np") as stored:
        told = stored.metadata()
        arrays = {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118
        heads = _unpacked(arrays)
        shared = {k: a for k, a in arrays.items() if not k.startswith(MOMENTS)}
        moments = {k.removeprefix(MOMENTS): a for k, a in arrays.items() if k.startswith(MOMENTS)}
        return Checkpoint(int(path.stem[:5]), shared, heads, moments, json.loads(told["facts"]))


def _packed(heads: Mapping[str, str]) -> dict[str, Array]:
    """Heads of ledgers by device as arrays: there may be millions, and a file's header has 100 MB."""
    names, values = "\n".join(heads).encode(), bytes.fromhex("".join(heads.values()))
    return {key: np.frombuffer(data, np.uint8) for key, data in zip(HEADS, (names, values), strict=True)}


def _unpacked(arrays: dict[str, Any]) -> dict[str, str]:
    """The inverse of `_packed`; takes them out of the arrays."""
    names, values = (arrays.pop(key).tobytes() for key in HEADS)
    return {name: values[32 * i : 32 * i + 32].hex() for i, name in enumerate(names.decode().split("\n")) if name}


def _belongs(event: Event, round_number: int) -> bool:
    """Whether an event was written in the rounds up to this one; the verdict after the last belongs to none."""
    before = "round" in event and event["round"] <= round_number and not event.get("final")
    return before and round_number > 0  # what is before round 1 is evaluated anew


def _is_of_a_curve(event: Event) -> bool:
    """Whether it is a figure of the last round that those of rounds before the last have too."""
    return bool(event["event"] == "evaluation" and event["metric"] == "nll" and event["arm"] != "pooled")


def _changed(event: Event, config: ExperimentConfig, round_number: int) -> Event:
    """The event that a run began with, for one that goes on with these settings."""
    found = changes(ExperimentConfig.model_validate(event["config"]), config)
    slow = {key: values for key, values in found.items() if not key.startswith(SPEED)}
    code = {"sources": sources_sha256(config.extensions())}
    now = event | {"rounds": config.rounds, "config": config.model_dump(mode="json"), **code}
    news = [*([told(slow)] if slow else []), *([OTHER_CODE] if event["sources"] != code["sources"] else [])]
    if news:
        now["changed"] = [*event.get("changed", []), {"after_round": round_number, "settings": ", ".join(news)}]
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
    _write_sources(fresh, config)
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
    _write_sources(path, config)  # which may have been mended; that is told in the run's event
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


def _write_sources(path: Path, config: ExperimentConfig) -> None:
    (path / "sources.sha256").write_text(sources_sha256(config.extensions()) + "\n", encoding="utf-8")


def sources_sha256(extensions: Iterable[str] = ()) -> str:
    """A hash of the sources of the four packages, and of the modules of these names: driver and workers must agree."""
    return _sources_sha256(tuple(sorted(set(extensions))))


@lru_cache(maxsize=8)  # what was imported does not change with the file
def _sources_sha256(extensions: tuple[str, ...]) -> str:
    digest = sha256()
    root = Path(florilegium.__file__).parent
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    for module, path in source_files(extensions).items():
        digest.update(module.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def check_sources(run: RunFolder) -> None:
    """Raises `RunError` when this process runs other code than the one that made the run's folder."""
    stored = (run.path / "sources.sha256").read_text(encoding="utf-8").strip()
    extensions = run.config.extensions()
    if stored != sources_sha256(extensions):
        own = f" or of {', '.join(extensions)}" if extensions else ""
        raise RunError(f"the code in {Path(florilegium.__file__).parent}{own} is not the code that started {run.path}")
