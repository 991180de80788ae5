"""The folder of a run: its complete config, its one stream of events, its checkpoints and its devices' files."""

from __future__ import annotations

import json
import shutil
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from client.state import DeviceStore
from privacy.release import Array
from privacy.seeds import fresh_secret
from simulation.config import ConfigError, ExperimentConfig, dump_config

Event = dict[str, Any]
AGGREGATE = "-aggregate"  # ends the names of checkpoints of rounds that are not over
PACKAGES = ("privacy", "client", "server", "simulation")


class RunError(RuntimeError):
    """A run's folder exists, is missing or does not fit what is asked of it."""


@dataclass(frozen=True)
class Checkpoint:
    """What the server had at the end of a round, or after its releases."""

    round: int
    shared: dict[str, Array]
    heads: dict[str, str]  # device → head of its ledger with its last release
    facts: Event  # of the round, where it is not over


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run and how its files are written."""

    path: Path

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def devices(self) -> DeviceStore:
        return DeviceStore(self.path / "devices")

    @property
    def controls(self) -> DeviceStore:
        return DeviceStore(self.path / "controls")

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.db"

    @cached_property
    def config(self) -> ExperimentConfig:
        """The config that the run was started with."""
        text = (self.path / "config.toml").read_text(encoding="utf-8")
        return ExperimentConfig.model_validate(tomllib.loads(text))

    def record(self, event: str, **facts: Any) -> None:
        """Appends one event."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **facts}, allow_nan=True)
        with self.metrics.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def events(self) -> Iterator[Event]:
        """All whole lines; a torn last one, from a process that was killed, is passed over."""
        if not self.metrics.exists():
            return
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue

    def note(self, device: str, stage: str, observation: Event) -> None:
        """What a simulated device did in a phase, until the driver makes an event of it."""
        path = self.path / "notes" / device / f"{stage}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(observation), encoding="utf-8")
        fresh.replace(path)

    def notes(self, device: str, round_number: int) -> Event:
        """All notes of a device in one round, in one."""
        merged: Event = {"seconds": {}}
        for path in sorted((self.path / "notes" / device).glob(f"{round_number:05d}-*.json")):
            page = json.loads(path.read_text(encoding="utf-8"))
            merged["seconds"] |= page.pop("seconds", {})
            merged |= page
        return merged

    def save_shared(
        self, round_number: int, arrays: Mapping[str, Array], heads: Mapping[str, str], facts: Event | None = None
    ) -> None:
        """The server's checkpoint, with the heads of the devices' ledgers: with it a round is done.

        With `facts` it is what the releases came to, and the round is not: the devices do not have it yet.
        """
        path = self.path / "server" / f"{round_number:05d}{'' if facts is None else AGGREGATE}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        metadata = {"heads": json.dumps(dict(heads)), "facts": json.dumps(facts)}
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, fresh, metadata)
        fresh.replace(path)

    def last_shared(self) -> Checkpoint | None:
        """The newest checkpoint of a round that is done."""
        found = sorted(p for p in (self.path / "server").glob("*.safetensors") if AGGREGATE not in p.stem)
        return _read_checkpoint(found[-1]) if found else None

    def aggregate(self, round_number: int) -> Checkpoint | None:
        """What a round's releases came to, if it came so far."""
        path = self.path / "server" / f"{round_number:05d}{AGGREGATE}.safetensors"
        return _read_checkpoint(path) if path.exists() else None

    def server_secret(self) -> int:
        """Of the server's noise: drawn once from the operating system, and kept beside the checkpoints."""
        path = self.path / "server" / "secret"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            path.write_text(f"{fresh_secret():032x}", encoding="ascii")
        return int(path.read_text(encoding="ascii"), 16)

    def rewind(self, round_number: int) -> None:
        """Drops the events of what comes after a round, so that it can be done again."""
        kept = [e for e in self.events() if e["event"] == "run" or _belongs(e, round_number)]
        fresh = self.metrics.with_suffix(".new")
        fresh.write_text("".join(json.dumps(e) + "\n" for e in kept), encoding="utf-8")
        fresh.replace(self.metrics)


def _read_checkpoint(path: Path) -> Checkpoint:
    with safe_open(path, "np") as stored:
        told = stored.metadata()
        shared = {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118
        return Checkpoint(int(path.stem[:5]), shared, json.loads(told["heads"]), json.loads(told["facts"]))


def _belongs(event: Event, round_number: int) -> bool:
    """Whether an event was written in the rounds up to this one; the verdict after the last belongs to none."""
    return "round" in event and event["round"] <= round_number and not event.get("final")


def create(path: Path, config: ExperimentConfig, *, overwrite: bool = False) -> RunFolder:
    """A new run. Refuses a folder that exists, unless it is a run and may be overwritten.

    The run that it replaces lies aside until `settle` says that the new one has begun.
    """
    if path.exists() and any(path.iterdir()):
        if not overwrite:
            raise RunError(f"{path} exists; use --resume to go on with it, --overwrite to replace it, or name=…")
        if not (path / "config.toml").exists():
            raise RunError(f"{path} is not the folder of a run (no config.toml); it is left alone")
        shutil.rmtree(_aside(path), ignore_errors=True)
        path.rename(_aside(path))
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.toml").write_text(dump_config(config), encoding="utf-8")
    (path / "sources.sha256").write_text(sources_sha256() + "\n", encoding="utf-8")
    return RunFolder(path)


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


def resume(path: Path, config: ExperimentConfig) -> RunFolder:
    """The run in a folder, if its settings are the same."""
    if not (path / "config.toml").exists():
        raise RunError(f"{path} has no config.toml: there is no run to resume")
    if RunFolder(path).config != config:
        raise ConfigError(f"{path}/config.toml differs from the config given; resume with the same settings")
    return RunFolder(path)


@lru_cache(maxsize=1)
def sources_sha256() -> str:
    """A hash of the sources of the four packages: driver and workers must agree on it."""
    digest = sha256()
    root = Path(__file__).parent.parent
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def check_sources(run: RunFolder) -> None:
    """Raises `RunError` when this process runs other code than the one that made the run's folder."""
    stored = (run.path / "sources.sha256").read_text(encoding="utf-8").strip()
    if stored != sources_sha256():
        raise RunError(f"the code in {Path(__file__).parent.parent} is not the code that started {run.path}")
