"""What a run leaves for programs and for people: summary.json, results.jsonl, a table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from florilegium.client.terminal import Figures
from florilegium.simulation.data.describe import told_before
from florilegium.simulation.reports.figures import ratio_in_words
from florilegium.simulation.runs.folder import Event, RunFolder
from florilegium.simulation.runs.mean_observer import Bystander, bystander

Summary = dict[str, Any]
SUMMED = ("arrived", "accepted", "synthetic_kept", "synthetic_rejected", "truncated")
ARMS = ("base", "shared", "local", "personal", "shuffled", "pooled")


def write_summary(run: RunFolder) -> Summary:
    """Writes `summary.json` and one line per device and arm in `results.jsonl`, both from the events."""
    summary = summarize(run.events())
    with (run.path / "results.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(e) + "\n" for e in run.events() if e["event"] == "result")
    (run.path / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


@dataclass
class DeviceTotals:
    """Of all devices in all rounds, taken in one event after the other."""

    sums: Counter[str] = field(default_factory=Counter)
    annotations: dict[str, int] = field(default_factory=dict)  # by device, so far
    failed: list[str] = field(default_factory=list)
    epsilon: float = 0.0  # the largest
    upload_bytes: int = 0  # of the largest release

    def add(self, event: Event) -> None:
        self.sums.update({key: event.get(key, 0) for key in SUMMED})
        self.annotations[event["device"]] = event["annotations"]
        if "personal_failed" in event:
            self.failed.append(f"{event['device']}: {event['personal_failed']}")
        self.epsilon = max(self.epsilon, event["epsilon"] or 0.0)
        self.upload_bytes = max(self.upload_bytes, event["upload_bytes"])


def summarize(events: Iterable[Event]) -> Summary:
    """The figures of a run that was finished."""
    by_kind: dict[str, list[Event]] = {}
    devices = DeviceTotals()
    for event in events:
        if event["event"] == "device_round":  # of which there may be millions
            devices.add(event)
        else:
            by_kind.setdefault(event["event"], []).append(event)
    start, end, rounds = by_kind["run"][0], by_kind["end"][-1], by_kind["round"]
    final = [e for e in by_kind["evaluation"] if e.get("final")]
    return {
        "name": start["name"],
        "devices": start["devices"],
        "rounds": start["rounds"],
        "changed": start.get("changed", []),
        "seed": start["seed"],
        "engine": start["engine"],
        "server": start["config"]["server"]["rule"],
        "model": start["model"]["name"],
        "hardware": start["hardware"],
        **{metric: {e["arm"]: _figures(e) for e in final if e["metric"] == metric} for metric in ("nll", "rouge1")},
        "comparisons": [_without(e, "event", "time") for e in by_kind.get("comparison", [])],
        "mean_length_tokens": _mean_lengths(by_kind.get("result", [])),
        "annotations_per_device": _mean(list(devices.annotations.values())),
        "acceptance_rate": devices.sums["accepted"] / max(1, devices.sums["arrived"]),
        "synthetic_kept": devices.sums["synthetic_kept"],
        "synthetic_rejected": devices.sums["synthetic_rejected"],
        "truncated": devices.sums["truncated"],
        "failed_trainings": devices.failed,
        "failures": dict(Counter(e["what"] for e in by_kind.get("failure", []))),
        "refused": dict(sum((Counter(e["refused"]) for e in rounds), Counter())),
        "epsilon": devices.epsilon,
        "epsilon_of_mean": seen.epsilon if (seen := bystander(start, rounds)) else None,
        "fewest_releases": seen.releases if seen else None,
        "delta": start["privacy"]["delta"],
        "noise_multiplier": start["privacy"]["noise_multiplier"],
        "privacy_mode": start["privacy"]["mode"],
        "privacy_unit": start["privacy"]["unit"],
        "adjacency": start["privacy"]["adjacency"],
        "trust": start["privacy"]["trust"],
        "signal_to_noise": [e["signal_to_noise"] for e in rounds],
        "signal_to_noise_floor": [e["signal_to_noise_floor"] for e in rounds],
        "upload_bytes_per_release": devices.upload_bytes,
        "download_bytes_per_round": rounds[-1]["download_bytes"],
        "newcomers": {e["arm"]: _figures(e) for e in by_kind.get("newcomers", [])},
        "newcomers_comparisons": [_without(e, "event", "time") for e in by_kind.get("newcomers_comparison", [])],
        "world": _without(by_kind["fairness"][-1], "event", "time") if "fairness" in by_kind else None,
        **{key: start["data"][key] for key in ("people", "held_out", "held_out_met")},
        "devices_bytes": end["devices_bytes"],
        "wall_s": end["wall_s"],
        "peak_rss_bytes": end["peak_rss_bytes"],
        "tokens_trained": end["tokens_trained"],
    }


def _figures(event: Event) -> Summary:
    return {key: event[key] for key in ("mean_per_user", "mean_per_query", "ci95")}


def _without(event: Event, *keys: str) -> Event:
    return {k: v for k, v in event.items() if k not in keys}


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


def _mean_lengths(results: list[Event]) -> dict[str, float]:
    replied = [e for e in results if "mean_length_tokens" in e]
    arms = {e["arm"] for e in replied}
    return {a: _mean([e["mean_length_tokens"] for e in replied if e["arm"] == a]) for a in ARMS if a in arms}


def render_summary(summary: Summary) -> RenderableType:
    """The table that a run ends with. Intervals are half widths."""
    table = Figures(
        title=f"{summary['name']}: {summary['devices']} devices, {summary['rounds']} rounds", title_style=""
    )
    for heading in ("arm", "NLL per user", "NLL per query", "ROUGE-1 per user", "ROUGE-1 per query", "tokens"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm in ARMS:
        if arm in summary["nll"]:
            length = summary["mean_length_tokens"].get(arm)
            cells = (*_cells(summary["nll"][arm]), *_cells(summary["rouge1"].get(arm)))
            table.add_row(arm, *cells, "–" if length is None else f"{length:.1f}")
    lines = [_comparison(c) for c in summary["comparisons"]]
    measured = zip(summary["signal_to_noise"], summary["signal_to_noise_floor"], strict=True)
    ratios = ", ".join(ratio_in_words(ratio, floor) for ratio, floor in measured)
    protection = (
        "privacy: without a server nothing leaves a device"
        if summary["server"] == "none"
        else (
            f"privacy: {summary['privacy_mode']}, unit {summary['privacy_unit']}, {summary['adjacency']}; "
            f"{summary['trust']}: "
            f"ε = {summary['epsilon']:.2f} at δ = {summary['delta']:g}{_towards_others(summary)}"
        )
    )
    facts = [
        protection,
        f"signal to noise of the mean release, by round: {ratios}",
        f"{summary['upload_bytes_per_release']:,} bytes left a device per release; "
        f"{summary['annotations_per_device']:.1f} annotations a device; "
        f"{summary['truncated']:,} texts were cut to the model's limits",
        f"held out: {told_before(summary['held_out'], summary['held_out_met'])}",
        f"{summary['hardware']}: {summary['wall_s']:.0f} s, {summary['peak_rss_bytes'] / 1e9:.2f} GB, "
        f"{summary['tokens_trained']:,} tokens trained",
        f"{summary['devices_bytes'] / 1e6:.1f} MB of devices' states and ledgers on the disk",
        *(f"went on after round {c['after_round']} with {c['settings']}" for c in summary["changed"]),
        *([_world(summary["world"])] if summary["world"] else []),
        *(f"newcomers, {_comparison(c)}" for c in summary["newcomers_comparisons"]),
        *([_failures(summary)] if summary["failures"] or summary["refused"] else []),
        *(f"kept the personal adapter that it had: {failed}" for failed in summary["failed_trainings"]),
    ]
    return Group(table, Text("\n".join([*lines, *facts])))


def _towards_others(summary: Summary) -> str:
    if summary["epsilon_of_mean"] is None:
        return ""
    return f" towards the server; {Bystander(summary['epsilon_of_mean'], summary['fewest_releases']).told}"


def _failures(summary: Summary) -> str:
    """What went wrong on devices in all rounds."""
    failures = [f"{count} × {what}" for what, count in summary["failures"].items()]
    refused = [f"{count} × {code}" for code, count in summary["refused"].items()]
    parts = [f"failed and counted: {', '.join(failures)}"] * bool(failures)
    return "; ".join([*parts, *[f"no release, by reason: {', '.join(refused)}"] * bool(refused)])


def _cells(figures: Summary | None) -> tuple[str, str]:
    if figures is None:
        return "–", "–"
    low, high = figures["ci95"]
    return f"{figures['mean_per_user']:.3f} ± {(high - low) / 2:.3f}", f"{figures['mean_per_query']:.3f}"


def _world(world: Summary) -> str:
    classes = world["classes"].values()
    asked, answered = (sum(c[key] for c in classes) for key in ("asked", "answered"))
    joules = sum(c["joules"] for c in classes)
    return f"world: {world['wall_s'] / 3600:.2f} hours, {answered} of {asked} answered, {joules / 1e3:.2f} kJ"


def _comparison(found: Event) -> str:
    low, high = found["ci95"]
    verdict = (
        f"better for {found['users_better']} of {found['users']}" if low > 0 or high < 0 else "no difference shown"
    )
    name = f"{found['metric']}: {found['better']} − {found['than']}"
    return f"{name:28} {found['mean_difference']:+.4f} ({low:+.4f} … {high:+.4f}) {verdict}"
