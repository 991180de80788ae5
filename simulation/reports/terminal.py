"""The table that a run ends with on a terminal."""

from __future__ import annotations

from itertools import zip_longest

from rich.console import Group, RenderableType
from rich.text import Text

from florilegium.client.terminal import Figures
from florilegium.simulation.data.describe import told_before
from florilegium.simulation.reports.figures import ratio_in_words
from florilegium.simulation.reports.person_table import render_person
from florilegium.simulation.runs.arms import ARMS
from florilegium.simulation.runs.events import PairedDifference, WorldFairness
from florilegium.simulation.runs.mean_observer import Bystander
from florilegium.simulation.runs.summary import ArmFigures, RunSummary


def render_summary(summary: RunSummary) -> RenderableType:
    """Arms, comparisons and facts of a run. Intervals are half widths."""
    lines = [_comparison(c) for c in summary.comparisons]
    person = [render_person(summary)] if summary.person else []
    return Group(_arms(summary), *person, Text("\n".join([*lines, *_facts(summary)])))


def _arms(summary: RunSummary) -> Figures:
    by = f", {summary.baseline}" if summary.baseline else ""
    table = Figures(title=f"{summary.name}: {summary.devices} devices, {summary.rounds} rounds{by}", title_style="")
    for heading in ("arm", "NLL per user", "NLL per query", "ROUGE-1 per user", "ROUGE-1 per query", "tokens"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm in ARMS:
        if arm in summary.nll:
            length = summary.mean_length_tokens.get(arm)
            cells = (*_cells(summary.nll[arm]), *_cells(summary.rouge1.get(arm)))
            table.add_row(arm, *cells, "–" if length is None else f"{length:.1f}")
    return table


def _facts(summary: RunSummary) -> list[str]:
    measured = zip_longest(summary.signal_to_noise, summary.signal_to_noise_floor)  # older runs have no floors
    ratios = ", ".join(ratio_in_words(ratio, floor) for ratio, floor in measured)
    return [
        _protection(summary),
        f"signal to noise of the mean release, by round: {ratios}",
        f"{summary.upload_bytes_per_release:,} bytes left a device per release; "
        f"{summary.annotations_per_device:.1f} annotations a device; "
        f"{summary.truncated:,} texts were cut to the model's limits",
        f"held out: {told_before(summary.held_out, summary.held_out_met)}",
        f"{summary.hardware}: {summary.wall_s:.0f} s, {summary.peak_rss_bytes / 1e9:.2f} GB, "
        f"{summary.tokens_trained:,} tokens trained",
        *(
            f"{spent:9.1f} s {spent / max(1e-9, summary.wall_s):4.0%}  {phase}"
            for phase, spent in summary.wall_by_phase_s.items()
        ),
        f"{summary.devices_bytes / 1e6:.1f} MB of devices' states and ledgers on the disk",
        *(f"went on after round {c.after_round} with {c.settings}" for c in summary.changed),
        *([_world(summary.world)] if summary.world else []),
        *(f"newcomers, {_comparison(c)}" for c in summary.newcomers_comparisons),
        *([_failures(summary)] if summary.failures or summary.refused else []),
        *(f"kept the personal adapter that it had: {failed}" for failed in summary.failed_trainings),
    ]


def _protection(summary: RunSummary) -> str:
    if summary.server == "none":
        return "privacy: without a server nothing leaves a device"
    return (
        f"privacy: {summary.privacy_mode}, unit {summary.privacy_unit}, {summary.adjacency}; {summary.trust}: "
        f"ε = {summary.epsilon:.2f} at δ = {summary.delta:g}{_towards_others(summary)}"
    )


def _towards_others(summary: RunSummary) -> str:
    if summary.epsilon_of_mean is None or summary.fewest_releases is None:
        return ""
    return f" towards the server; {Bystander(summary.epsilon_of_mean, summary.fewest_releases).told}"


def _failures(summary: RunSummary) -> str:
    """What went wrong on devices in all rounds."""
    failures = [f"{count} × {what}" for what, count in summary.failures.items()]
    refused = [f"{count} × {code}" for code, count in summary.refused.items()]
    parts = [f"failed and counted: {', '.join(failures)}"] * bool(failures)
    return "; ".join([*parts, *[f"no release, by reason: {', '.join(refused)}"] * bool(refused)])


def _cells(figures: ArmFigures | None) -> tuple[str, str]:
    if figures is None:
        return "–", "–"
    low, high = figures.ci95
    return f"{figures.mean_per_user:.3f} ± {(high - low) / 2:.3f}", f"{figures.mean_per_query:.3f}"


def _world(world: WorldFairness) -> str:
    classes = world.classes.values()
    asked, answered = sum(c.asked for c in classes), sum(c.answered for c in classes)
    joules = sum(c.joules for c in classes)
    return f"world: {world.wall_s / 3600:.2f} hours, {answered} of {asked} answered, {joules / 1e3:.2f} kJ"


def _comparison(found: PairedDifference) -> str:
    low, high = found.ci95
    verdict = f"better for {found.users_better} of {found.users}" if low > 0 or high < 0 else "no difference shown"
    name = f"{found.metric}: {found.better} − {found.than}"
    return f"{name:28} {found.mean_difference:+.4f} ({low:+.4f} … {high:+.4f}) {verdict}"
