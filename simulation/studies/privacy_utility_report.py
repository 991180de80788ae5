"""Writes the report of a study of federations: one page, made from the cells' results alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from florilegium.simulation.reports import html
from florilegium.simulation.reports.run_report import flattened
from florilegium.simulation.studies import figures, privacy_utility_figures
from florilegium.simulation.studies.config import Study, TableConfig
from florilegium.simulation.studies.privacy_utility import Outcome, Reach, comparisons, outcomes, reaches
from florilegium.simulation.studies.statistics import METRICS, Contrast, named, spread, write_summary


@dataclass(frozen=True)
class Shown:
    """A table of the study with its figures."""

    key: str
    table: TableConfig
    outcomes: list[Outcome]
    contrasts: list[Contrast]


def render_study(study: Study, folder: Path) -> Path:
    """Writes `summary.json` and `report.html`; raises `RunError` where a cell has not been run."""
    shown = []
    for key, table in study.config.tables.items():
        found = outcomes(study, folder, table)
        shown.append(Shown(key, table, found, comparisons(found)))
    every = list({o.cell.key: o for t in shown for o in t.outcomes}.values())
    reach = reaches(every)
    cells = {t.key: ([_cell(o) for o in t.outcomes], t.contrasts) for t in shown}
    write_summary(folder, study, cells, signal_to_noise_by_devices=[asdict(r) for r in reach])
    return html.write(
        folder / "report.html", "privacy_utility_study.html.j2", 
        filters={"spread": spread, "named": named, "budget": budget},
        plots=_plots(shown, every, reach), study=study, shown=shown, metrics=METRICS, reach=reach,
        sentences=verdict(shown), devices=sorted({o.devices for o in every}),
        promises={o.config.privacy.mode: o.config.privacy.promise for o in every},
        hardware=sorted({o.result["hardware"] for o in every}),
        minutes=sum(s["seconds"] for o in every for s in o.seeds) / 60,
        versions_of_code=len({o.result["sources"] for o in every}), config=list(flattened(dict(study.tree))),
    )  # fmt: skip


def budget(epsilon: float) -> str:
    """As it stands in tables."""
    return "∞" if math.isinf(epsilon) else f"{epsilon:.2f}"


def verdict(shown: Sequence[Shown]) -> list[str]:
    """One sentence a table on what the corrected tests of the shared adapter's NLL show, and one on the personal's."""
    sentences = []
    for t in shown:
        for arm, than in (("shared", "base"), ("personal", "local")):
            family = [c for c in t.contrasts if c.metric == "nll" and c.name.endswith(f": {arm}") and c.than == than]
            words = {"better": "helped", "worse": "harmed"}
            for word, told in words.items():
                cells = [c.name.removesuffix(f": {arm}") for c in family if c.shown and c.verdict == word]
                what = "the shared adapter" if arm == "shared" else "sharing, beneath the personal adapter,"
                if cells:
                    sentences.append(f"{t.table.title or t.key}: {what} {told} with {'; '.join(cells)}.")
            unclear = [c.name.removesuffix(f": {arm}") for c in family if not c.shown]
            if unclear:
                sentences.append(
                    f"{t.table.title or t.key}: no difference of {arm} − {than} was shown with {'; '.join(unclear)}."
                )
    return sentences


def _plots(shown: Sequence[Shown], every: Sequence[Outcome], reach: Sequence[Reach]) -> dict[str, Any]:
    plain = [o for o in every if o.config.shared.adapter == every[0].config.shared.adapter]  # one choice of factors
    made: dict[str, Any] = {
        "pareto": privacy_utility_figures.pareto(plain),
        "attacks": privacy_utility_figures.attack_success(plain),
        "signal": privacy_utility_figures.signal(reach),
    }
    for t in shown:
        for metric in METRICS:
            made[f"{t.key}-differences-{metric}"] = figures.differences(t.contrasts, metric)
    return {name: drawn for name, drawn in made.items() if drawn is not None}


def _cell(o: Outcome) -> dict[str, Any]:
    arms = {}
    for arm in o.arms:
        measured = {metric: m.summary() for metric in METRICS if (m := o.measured(arm, metric))}
        arms[arm] = {**measured, "mean_length_tokens": _finite(o.length_tokens(arm))}
    gains = {f"gain_{arm}_by_seed": [float(o.gain(arm, s).mean()) for s in range(len(o.seeds))] for arm in o.arms}
    return {
        "label": dict(o.label),
        "devices": o.devices,
        "epsilon": _finite(o.epsilon),
        "noise_multiplier": o.noise_multiplier,
        "signal_to_noise": _finite(o.signal_to_noise),
        "upload_bytes": o.seeds[0]["upload_bytes"],
        "arms": arms,
        **gains,
        "attacks": {name: {"auc": o.attack(name)[0], "auc_ceiling": o.ceiling()} for name in o.attacks},
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
