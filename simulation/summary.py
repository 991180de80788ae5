"""What a run leaves for programs and for people: summary.json, results.jsonl, adapters in PEFT's format, a table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from client.lm.hub import resolve
from client.lm.peft_format import write_peft
from simulation.host import SimulatedDevices
from simulation.runs import Event, RunFolder

Summary = dict[str, Any]
ARMS = ("base", "shared", "local", "personal", "shuffled", "pooled")


def write_summary(run: RunFolder) -> Summary:
    """Writes `summary.json` and one line per device and arm in `results.jsonl`, both from the events."""
    events = list(run.events())
    summary = summarize(events)
    results = [e for e in events if e["event"] == "result"]
    (run.path / "results.jsonl").write_text("".join(json.dumps(e) + "\n" for e in results), encoding="utf-8")
    (run.path / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def summarize(events: Iterable[Event]) -> Summary:
    """The figures of a run that was finished."""
    by_kind: dict[str, list[Event]] = {}
    for event in events:
        by_kind.setdefault(event["event"], []).append(event)
    start, end = by_kind["run"][0], by_kind["end"][-1]
    devices, rounds = by_kind["device_round"], by_kind["round"]
    final = [e for e in by_kind["evaluation"] if e.get("final")]
    return {
        "name": start["name"],
        "devices": start["devices"],
        "rounds": start["rounds"],
        "seed": start["seed"],
        "engine": start["engine"],
        "model": start["model"]["name"],
        "hardware": start["hardware"],
        **{metric: {e["arm"]: _figures(e) for e in final if e["metric"] == metric} for metric in ("nll", "rouge1")},
        "comparisons": [_without(e, "event", "time") for e in by_kind.get("comparison", [])],
        "mean_length_tokens": _mean_lengths(by_kind.get("result", [])),
        "annotations_per_device": _mean(list(_last_of_devices(devices, "annotations").values())),
        "acceptance_rate": sum(e["accepted"] for e in devices) / max(1, sum(e["arrived"] for e in devices)),
        "synthetic_kept": sum(e["synthetic_kept"] for e in devices),
        "synthetic_rejected": sum(e["synthetic_rejected"] for e in devices),
        "truncated": sum(e["truncated"] for e in devices),
        "failed_trainings": [f"{e['device']}: {e['personal_failed']}" for e in devices if "personal_failed" in e],
        "epsilon": max(_last_of_devices(devices, "epsilon").values()),
        "delta": start["privacy"]["delta"],
        "noise_multiplier": start["privacy"]["noise_multiplier"],
        "privacy_mode": start["privacy"]["mode"],
        "privacy_unit": start["privacy"]["unit"],
        "adjacency": start["privacy"]["adjacency"],
        "trust": start["privacy"]["trust"],
        "signal_to_noise": [e["signal_to_noise"] for e in rounds],
        "upload_bytes_per_release": max(e["upload_bytes"] for e in devices),
        "download_bytes_per_round": rounds[-1]["download_bytes"],
        "wall_s": end["wall_s"],
        "peak_rss_bytes": end["peak_rss_bytes"],
        "tokens_trained": end["tokens_trained"],
    }


def _figures(event: Event) -> Summary:
    return {key: event[key] for key in ("mean_per_user", "mean_per_query", "ci95")}


def _without(event: Event, *keys: str) -> Event:
    return {k: v for k, v in event.items() if k not in keys}


def _last_of_devices(devices: list[Event], key: str) -> dict[str, float]:
    return {e["device"]: e[key] for e in devices}


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


def _mean_lengths(results: list[Event]) -> dict[str, float]:
    arms = {e["arm"] for e in results if "mean_length_tokens" in e}
    return {a: _mean([e["mean_length_tokens"] for e in results if e["arm"] == a]) for a in ARMS if a in arms}


def export_adapters(run: RunFolder, devices: SimulatedDevices, shared: torch.Tensor) -> None:
    """`adapters/shared` and `adapters/personal/<device>`, as plain `peft` reads them."""
    site, last = devices.site, devices.site.config.rounds
    base = str(resolve(site.lm.name).resolve())
    write_peft(run.path / "adapters" / "shared", site.shared_layout, shared, base)
    for name in devices.users:
        row = devices.state(name, last).personal
        write_peft(run.path / "adapters" / "personal" / name, site.personal_layout, row, base)


def render_summary(summary: Summary) -> RenderableType:
    """The table that a run ends with. Intervals are half widths."""
    table = Table(title=f"{summary['name']}: {summary['devices']} devices, {summary['rounds']} rounds", title_style="")
    for heading in ("arm", "NLL per user", "per query", "ROUGE-1 per user", "per query", "tokens"):
        table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
    for arm in ARMS:
        if arm in summary["nll"]:
            length = summary["mean_length_tokens"].get(arm)
            cells = (*_cells(summary["nll"][arm]), *_cells(summary["rouge1"].get(arm)))
            table.add_row(arm, *cells, "–" if length is None else f"{length:.1f}")
    lines = [_comparison(c) for c in summary["comparisons"]]
    ratios = ", ".join("no noise" if r is None or math.isnan(r) else f"{r:.2f}" for r in summary["signal_to_noise"])
    facts = [
        f"privacy: {summary['privacy_mode']}, unit {summary['privacy_unit']}, {summary['adjacency']}; "
        f"{summary['trust']}: "
        f"ε = {summary['epsilon']:.2f} at δ = {summary['delta']:g}",
        f"signal to noise of the mean release, by round: {ratios}",
        f"{summary['upload_bytes_per_release']:,} bytes left a device per release; "
        f"{summary['annotations_per_device']:.1f} annotations a device; "
        f"{summary['truncated']:,} texts were cut to the model's limits",
        f"{summary['hardware']}: {summary['wall_s']:.0f} s, {summary['peak_rss_bytes'] / 1e9:.2f} GB, "
        f"{summary['tokens_trained']:,} tokens trained",
        *(f"kept the personal adapter that it had: {failed}" for failed in summary["failed_trainings"]),
    ]
    return Group(table, Text("\n".join([*lines, *facts])))


def _cells(figures: Summary | None) -> tuple[str, str]:
    if figures is None:
        return "–", "–"
    low, high = figures["ci95"]
    return f"{figures['mean_per_user']:.3f} ± {(high - low) / 2:.3f}", f"{figures['mean_per_query']:.3f}"


def _comparison(found: Event) -> str:
    low, high = found["ci95"]
    verdict = (
        f"better for {found['users_better']} of {found['users']}" if low > 0 or high < 0 else "no difference shown"
    )
    name = f"{found['metric']}: {found['better']} − {found['than']}"
    return f"{name:28} {found['mean_difference']:+.4f} ({low:+.4f} … {high:+.4f}) {verdict}"
