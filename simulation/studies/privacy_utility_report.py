"""The report of a study of federations, made from the cells' results alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from florilegium.client.terminal import Figures
from florilegium.simulation.studies import privacy_utility_figures
from florilegium.simulation.studies.config import Study
from florilegium.simulation.studies.privacy_utility import Outcome, Reach, comparisons, outcomes, reaches
from florilegium.simulation.studies.statistics import METRICS, spread
from florilegium.simulation.studies.study_report import Shown, StudyReport, listed

Modes = Shown[Outcome]


def report(study: Study, folder: Path) -> StudyReport[Outcome]:
    """What a study of federations shows; raises `RunError` where a cell has not been run."""
    shown = []
    for key, table in study.config.tables.items():
        found = outcomes(study, folder, table)
        shown.append(Modes(key, table, found, comparisons(found)))
    every = list({o.cell.key: o for t in shown for o in t.outcomes}.values())
    reach = reaches(every)
    devices = listed(o.devices for o in every)
    return StudyReport(
        study,
        shown,
        template="privacy_utility_study.html.j2",
        lead="What privacy costs, what it buys, and what needs none.",
        unit="A unit is a device: the mean over the seeds' dice, then a paired t-test over devices, corrected by Holm "
        "within the table and metric. The people are the same in all cells and seeds.",
        units="Devices",
        facts={
            "Devices in a federation": devices,
            "Seeds": str(study.config.seeds),
            "Time of all cells, added up": f"{sum(s['seconds'] for o in every for s in o.seeds) / 60:,.0f} min",
        },
        sentences=_sentences(shown),
        note="Mean over devices",
        tables=[_drawn(study, t) for t in shown],
        cell=_cell,
        figures=_figures(every, reach),
        values={
            "devices": devices,
            "reach": reach,
            "promises": {o.config.privacy.mode: o.config.privacy.promise for o in every},
        },
        summary={"signal_to_noise_by_devices": [asdict(r) for r in reach]},
    )


def _sentences(shown: Sequence[Modes]) -> list[str]:
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
                    sentences.append(f"{t.title}: {what} {told} with {'; '.join(cells)}.")
            unclear = [c.name.removesuffix(f": {arm}") for c in family if not c.shown]
            if unclear:
                sentences.append(f"{t.title}: no difference of {arm} − {than} was shown with {'; '.join(unclear)}.")
    return sentences


def _figures(every: Sequence[Outcome], reach: Sequence[Reach]) -> dict[str, Any]:
    plain = [o for o in every if o.config.shared.adapter == every[0].config.shared.adapter]  # one choice of factors
    return {
        "pareto": privacy_utility_figures.pareto(plain),
        "attacks": privacy_utility_figures.attack_success(plain),
        "signal": privacy_utility_figures.signal(reach),
    }


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


def _drawn(study: Study, t: Modes) -> RenderableType:
    drawn = Figures(title=f"{t.title}: NLL, mean of {study.config.seeds} seeds", title_style="")
    arms = ("base", "shared", "local", "personal", "shuffled")
    headings = ("cell", "ε", *arms[:-1], "stranger's", "signal/noise", "best attack", "bytes up")
    for heading in headings:
        drawn.add_column(heading, justify="left" if heading == "cell" else "right")
    for o in t.outcomes:
        best = max((o.attack(name)[0] for name in o.attacks), default=math.nan)
        drawn.add_row(
            o.name, "∞" if math.isinf(o.epsilon) else f"{o.epsilon:.2f}",
            *(spread(m) if (m := o.measured(arm)) else "–" for arm in arms), f"{o.signal_to_noise:.2f}",
            f"{best:.3f} of {o.ceiling():.3f}", f"{o.seeds[0]['upload_bytes']:,}",
        )  # fmt: skip
    return drawn
