"""What a study needs, found before a library of models is loaded (`simulation.ready`, for all cells)."""

from __future__ import annotations

import json
from pathlib import Path

from client.lexicons import load_lexicons
from client.lm.places import check_model
from simulation.config import ExperimentConfig
from simulation.personal.config import MethodsConfig
from simulation.runs import RunError
from simulation.study.config import Cell, Study
from simulation.study.workbench import Bench


def ready(study: Study, folder: Path) -> Bench:
    """The bench of a study that can begin, with the people of all its cells; what is missing is told now, not after
    hours. Raises `UserError`, `RunError` where the folder belongs to another study.
    """
    named = folder / "study.json"
    if named.exists() and json.loads(named.read_text(encoding="utf-8"))["name"] != study.name:
        raise RunError(f"{folder} holds another study; give another --studies folder or name=")
    bench = Bench.of(study.cells.values())
    for key, cell in study.cells.items():
        if not (folder / "cells" / key / "result.json").exists():
            check_model(cell.config.model.name)
        _invite(cell, bench)
    folder.mkdir(parents=True, exist_ok=True)
    named.write_text(json.dumps({"name": study.name, "cells": list(study.cells)}), encoding="utf-8")
    return bench


def _invite(cell: Cell, bench: Bench) -> None:
    config = cell.config
    if isinstance(config, ExperimentConfig):
        load_lexicons(config.selection.lexicons)
    if isinstance(config, MethodsConfig):
        bench.task(config.task, cell.seeds, config.seed)
    else:
        bench.people(config.data, 1 if cell.study.kind == "federated" else cell.seeds, config.seed)
