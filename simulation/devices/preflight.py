"""What a run needs, found before a library of models is loaded: settings that fit, its people, where its model lies.

Whoever has given a wrong name, or a file with a broken line, is told within a second. Not covered: whether the model
is one that can be trained, what a processor or a cluster has.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from florilegium.client.calibration import planned_event
from florilegium.client.lm.places import check_model
from florilegium.client.selection.lexicons import load_lexicons
from florilegium.simulation.config import ExperimentConfig, with_absolute_paths
from florilegium.simulation.data.population import Bootstrapped, User, load_population
from florilegium.simulation.heterogeneity.classes import DevicePopulation, load_classes
from florilegium.simulation.runs.callbacks import named_callbacks
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.folder import check_new, check_resumable
from florilegium.simulation.settings import ConfigError


def ready(config: ExperimentConfig, folder: Path, *, resuming: bool, overwrite: bool) -> Sequence[User]:
    """The people of a run that can begin; raises `UserError` for one that cannot."""
    if resuming and overwrite:
        raise RunError("--resume and --overwrite exclude each other")
    config = with_absolute_paths(config)  # as they stand in a run's folder
    if resuming:
        check_resumable(folder, config)
    else:
        check_new(folder, overwrite=overwrite)
    named_callbacks(config)
    load_lexicons(config.selection.lexicons)
    world_of(config)
    if not config.server.absent:
        planned_event(config)
    check_model(config.model.name)
    return everybody(config)


def everybody(config: ExperimentConfig) -> Sequence[User]:
    """The devices' users, and behind them those who never take part."""
    newcomers = config.evaluation.newcomers
    data = config.data.model_copy(update={"users": config.data.users + newcomers})
    found = load_population(data, config.seed)
    return found.with_apart(newcomers) if isinstance(found, Bootstrapped) and newcomers else found


def world_of(config: ExperimentConfig) -> DevicePopulation | None:
    """The world of a run that has one."""
    if config.server.absent or not config.world.classes:
        return None
    world = DevicePopulation(config.world, load_classes(config.world.classes), config.seed)
    _check_ranks(config, world)
    return world


def _check_ranks(config: ExperimentConfig, world: DevicePopulation) -> None:
    if not any(c.rank for c in world.classes):
        return
    if not config.server.sums or config.server.products != "average":
        raise ConfigError("devices of unequal rank need server.rule = 'mean' and server.products = 'average'")
    if not config.privacy.by_dialogue:
        raise ConfigError(f"privacy.mode = {config.privacy.mode!r} and devices of unequal rank do not go together")
