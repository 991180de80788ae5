"""Runs the audit of a run's settings and writes its page."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from florilegium.client.lm.places import check_model
from florilegium.simulation.data.population import load_population
from florilegium.simulation.reports import html
from florilegium.simulation.runs.errors import RunError
from florilegium.simulation.runs.folder import RunFolder

if TYPE_CHECKING:
    from florilegium.simulation.audit.audit import Audit


def audit_run(run: RunFolder, devices: int, canaries: int, listener: Callable[[str], None]) -> Audit:
    """Writes `audit.json` and `audit.html` into the run's folder.

    Raises `RunError` for a folder without a run, and for a run whose devices add no noise of their own.
    """
    if not (run.path / "config.toml").exists():
        raise RunError(f"{run.path} has no config.toml: there is no run to audit")
    config = run.config
    if config.privacy.mode == "none":
        raise RunError(f"{run.path}: privacy.mode = 'none' claims nothing that could be audited")
    if config.baseline.name:
        raise RunError(f"{run.path} is of the baseline {config.baseline.name!r}; what is audited is our own method")
    people = config.data.model_copy(update={"users": min(devices, config.data.users)})
    check_model(config.model.name)
    users = load_population(people, config.seed)
    listener("loading")

    from florilegium.client.lm.model import LanguageModel  # and with it torch, now that nothing is left to refuse
    from florilegium.simulation.audit.attack_metrics import RATES
    from florilegium.simulation.audit.audit import Auditor, as_json

    streams = [user.stream for user in users]
    found = Auditor(LanguageModel.load(config.model), config, streams, listener, config.workers).audit(canaries)
    (run.path / "audit.json").write_text(json.dumps(as_json(found), indent=1) + "\n", encoding="utf-8")
    html.write(
        run.path / "audit.html", "audit.html.j2", plots={}, filters={},
        name=run.path.name, found=found, promise=config.privacy.promise, rates=RATES,
    )  # fmt: skip
    return found
