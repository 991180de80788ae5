"""What several tests share: the bundled model, real dialogues, a very small experiment."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from inspect import signature
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GOMP_SPINCOUNT"] = "1000"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # else its processes hardly have a turn beside others
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes side by side: a thread each
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from hypothesis import HealthCheck, settings

from florilegium.client.lm.config import ModelConfig
from florilegium.client.lm.model import LanguageModel
from florilegium.privacy.ledger import Ledger
from florilegium.simulation.config import ExperimentConfig, load_config
from florilegium.simulation.data import population
from florilegium.simulation.data.conversations import read_chitchat
from florilegium.simulation.data.formats.reading import Reading
from florilegium.simulation.data.population import DataConfig, User, load_population
from florilegium.simulation.settings import config_folder

settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")  # machines are shared: a slow moment is no failure

SMALL = (
    "rounds=2",
    "data.users=3",
    "data.max_pairs=40",
    "data.queries_per_user=2",
    "selection.bins=6",
    "synthesis.sampling.max_new_tokens=12",
    "shared.pool_capacity=16",
    "evaluation.rouge_queries_per_user=1",
    "evaluation.sampling.max_new_tokens=8",
    "evaluation.every_round=false",
)


_collect = population.collect


@lru_cache
def _collected(context_turns: int) -> population.Replies:
    return _collect(DataConfig(context_turns=context_turns))


def collect(config: DataConfig, reading: Reading | None = None, named: str = "") -> population.Replies:
    """As ever, but the bundled chats are read once in a process: that takes three seconds."""
    bundled = config.name == "chitchat" and population.READERS["chitchat"] is read_chitchat
    return _collected(config.context_turns) if bundled else _collect(config, reading, named)


population.collect = collect


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    return LanguageModel.load(ModelConfig(dtype="float32"))


@pytest.fixture(scope="session")
def people() -> list[User]:
    """Two development users of chitchat: real chats, of which the settings were chosen too."""
    return load_population(DataConfig(users=2, split="development", max_pairs=80), seed=0)


def new_ledger() -> Ledger:
    """An empty one."""
    return Ledger(Path(mkdtemp()) / "ledger.db")


@pytest.fixture
def small() -> ExperimentConfig:
    """The quickstart with three users and two rounds."""
    return load_config(config_folder() / "quickstart.toml", [*SMALL, "name=small"])


@pytest.fixture
def quickstart() -> Path:
    return config_folder() / "quickstart.toml"


Note = Callable[[Any, str], list[dict[str, Any]]]


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Note:
    """Notes the calls of a function, by the names of its arguments, and lets them through."""

    def of(owner: Any, name: str) -> list[dict[str, Any]]:
        whole, calls = getattr(owner, name), list[dict[str, Any]]()

        def noting(*given: Any, **named: Any) -> Any:
            calls.append(signature(whole).bind(*given, **named).arguments)
            return whole(*given, **named)

        monkeypatch.setattr(owner, name, noting)
        return calls

    return of
