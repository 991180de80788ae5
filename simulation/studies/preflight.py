"""What a study needs, found before a library of models is loaded (`simulation.devices.preflight`, for all cells)."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from florilegium.client.lm.places import check_model
from florilegium.client.selection.lexicons import load_lexicons
from florilegium.privacy.common.registry import is_extension
from florilegium.simulation.baselines.config import BaselinesConfig
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.personalization.config import InteractiveConfig, MethodsConfig
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.studies.cell import SharedResources
from florilegium.simulation.studies.config import Cell, Study


def ready(study: Study, folder: Path) -> SharedResources:
    """The bench of a study that can begin, with the people of all its cells; what is missing is told now, not after
    hours. Raises `UserError`, `RunError` where the folder belongs to another study.
    """
    named = folder / "study.json"
    if named.exists() and json.loads(named.read_text(encoding="utf-8"))["name"] != study.name:
        raise RunError(f"{folder} holds another study; give another --studies folder or name=")
    bench = SharedResources.of(study.cells.values())
    people: dict[str, str] = {}
    for key, cell in study.cells.items():
        if not (folder / "cells" / key / "result.json").exists():
            check_model(cell.config.model.name)
        people[key] = sha256(repr(_invited(cell, bench)).encode("utf-8", "surrogatepass")).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    _agree(folder, people)
    named.write_text(json.dumps({"name": study.name, "cells": list(study.cells)}), encoding="utf-8")
    return bench


def _agree(folder: Path, people: dict[str, str]) -> None:
    """Notes whom each cell is about; raises `RunError` where one that was begun was about others."""
    noted = folder / "people.json"
    before = json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else {}
    begun = [key for key in people if (folder / "cells" / key).exists()]
    if other := [key for key in begun if before.get(key, people[key]) != people[key]]:
        raise RunError(
            f"{folder} was begun with other data: the people of {len(other)} of {len(people)} cells have changed, and "
            f"old and new would be mixed. Put back what was there, or give another --studies folder or name="
        )
    noted.write_text(json.dumps(before | people, indent=1) + "\n", encoding="utf-8")


def _invited(cell: Cell, bench: SharedResources) -> object:
    """The people of a cell; what is missing for it is told."""
    config = cell.config
    _check_kinds(config)
    if isinstance(config, ExperimentConfig):
        load_lexicons(config.selection.lexicons)
    if isinstance(config, MethodsConfig):
        return bench.task(config.task, cell.seeds, config.seed)
    return bench.people(config.data, 1 if cell.study.kind == "federated" else cell.seeds, config.seed)


def _check_kinds(config: ExperimentConfig | MethodsConfig | InteractiveConfig) -> None:
    """Raises `ExtensionError` where a method or a baseline of the user's own is something else.

    With the tables torch is loaded, which such a module loads itself.
    """
    if isinstance(config, MethodsConfig) and is_extension(config.method.name):
        from florilegium.client.personalization.registry import method_class

        method_class(config.method.name)
    if isinstance(config, BaselinesConfig) and is_extension(config.baseline.name):
        from florilegium.simulation.baselines.registry import baseline

        baseline(config.baseline.name)
