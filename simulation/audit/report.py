"""Runs the audit of a run's settings and writes its page."""

from __future__ import annotations

import json

from client.lm.model import LanguageModel
from simulation import page
from simulation.audit.audit import RATES, Audit, Listener, as_json, audit
from simulation.data.population import load_population
from simulation.runs import RunError, RunFolder


def audit_run(run: RunFolder, devices: int, canaries: int, listener: Listener) -> Audit:
    """Writes `audit.json` and `audit.html` into the run's folder.

    Raises `RunError` for a folder without a run, and for a run whose devices add no noise of their own.
    """
    if not (run.path / "config.toml").exists():
        raise RunError(f"{run.path} has no config.toml: there is no run to audit")
    config = run.config
    if config.privacy.mode != "example-local":
        raise RunError(f"privacy.mode = {config.privacy.mode!r}: the audit is of example-local")
    people = config.data.model_copy(update={"users": min(devices, config.data.users)})
    listener("loading")
    users = load_population(people, config.seed)
    found = audit(LanguageModel.load(config.model), config, users, canaries, config.seed, listener)
    (run.path / "audit.json").write_text(json.dumps(as_json(found), indent=1) + "\n", encoding="utf-8")
    page.write(
        run.path / "audit.html", "audit/report.html.j2", plots={}, filters={},
        name=run.path.name, found=found, promise=config.privacy.promise, rates=RATES,
    )  # fmt: skip
    return found
