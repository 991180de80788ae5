"""What small federations come to, to the bit, so that a redesign that moves one is seen; and how that is made anew.

    python tests/golden/make.py --reason "FedAdam begins with a bias correction"

runs each federation, writes what it came to on this kind of machine beside this file and says what has moved. The
reason goes into the file and, with what was said to have moved, into the message of the commit. Sums end otherwise
with other instructions, so there is a file for each kind of processor. A processor of Intel can be held to fewer
instructions than it has. Whether that ends as on one that has no more is not known, so it is a kind of its own:

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python tests/golden/make.py …

The test compares to the bit under the same variables too. All files have to be made anew together.

Each runs on one thread, in float32, over people made up here; all but two in this process. Not covered: real devices,
studies and audits.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from platform import python_version
from tempfile import TemporaryDirectory
from typing import Any

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "HF_HUB_OFFLINE": "1"}

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from florilegium.simulation.config import load_config
from florilegium.simulation.experiment import run_experiment
from florilegium.simulation.runs.folder import RunFolder
from florilegium.simulation.runs.progress import RunProgress
from florilegium.simulation.settings import find_config

HERE = Path(__file__).parent
DIGITS = 6  # of the figures that a person reads
HELD = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")  # to fewer instructions than there are
ELSEWHERE = {"time", "seconds", "wall_s", "peak_rss_bytes", "devices_bytes", "held_bytes"}  # of the machine or the hour
OF_RUN = {"name", "devices", "rounds", "seed", "privacy", "data"}  # of the event that describes a run

Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A federation: the settings in which it differs from `LEAN`, and whether it is stopped in round two."""

    settings: tuple[str, ...]
    stopped: bool = False


LEAN = ("rounds=2", "data.users=4", "data.split=all", "data.min_pairs=4", "data.queries_per_user=2",
        "selection.bins=4", "synthesis.per_dialogue=0", "synthesis.sampling.max_new_tokens=6",
        "shared.pool_capacity=8", "evaluation.rouge_queries_per_user=0", "evaluation.sampling.max_new_tokens=6",
        "evaluation.pooled_epochs=0", "evaluation.every_round=false", "model.device=cpu", "privacy.secret=seed",
        "name=run")  # fmt: skip
OPEN, WORLD = ("privacy.mode=none",), ("world.classes=world/devices",)
BOTH = ("shared.adapter.factors=both",)
CASES: dict[str, Case] = {
    "by-dialogue": Case(("synthesis.per_dialogue=1", "evaluation.rouge_queries_per_user=1", "evaluation.newcomers=2",
                         "evaluation.pooled_epochs=1", "evaluation.every_round=true")),
    "fedadam-resumed": Case((*OPEN, "server.optimizer=fedadam", "server.learning_rate=0.05"), stopped=True),
    "krum-of-people": Case(("privacy.mode=user-local", "server.rule=krum", "server.byzantine=1", "data.users=5",
                            "shared.upload=int8")),
    "trimmed-momentum": Case((*OPEN, "server.rule=trimmed-mean", "server.trimmed_share=0.25",
                              "server.optimizer=fedavgm", "shared.proximal=0.1", "shared.steps_per_round=2")),
    "central-bands": Case(("privacy.mode=user-central", "server.noise_bands=2", "privacy.releases=2",
                           "rounds=3", "seed=1", "server.optimizer=fedyogi", "server.learning_rate=0.05")),
    "fedex": Case((*BOTH, "server.products=residual", "shared.upload=bf16")),
    "flora-open": Case((*BOTH, *OPEN, "server.products=stack", "personal.on_new_shared=retrain")),
    "rolora-sampled": Case(("shared.adapter.factors=alternate", "server.sampled_share=0.5", "rounds=3")),
    "world": Case((*WORLD, "server.sampled_share=0.5", "world.over_sampling=2", "evaluation.users=3")),
    "fedbuff": Case((*WORLD, "server.buffer=2", "server.concurrency=3"), stopped=True),
    "on-flower": Case(("engine=flower", "data.users=3")),
    "on-actors": Case(("ray.actors=2", "data.users=5", "cohort_size=2")),
    "alone": Case(("server.rule=none", "evaluation.newcomers=2", "selection.policy=random",
                   "selection.annotations_per_round=2")),
}  # fmt: skip
FAST = ("by-dialogue", "fedadam-resumed")  # the others are for CI


# -- what it came to ----------------------------------------------------------------------------------------------


def made(name: str, folder: Path) -> Record:
    """What the federation of that name comes to: hashes of all, and figures that a person can read."""
    case, folder = CASES[name], folder.resolve()
    people = folder / "people.jsonl"
    write_people(people)
    config = load_config(find_config("quickstart"), [*LEAN, f"data.name={people}", *case.settings])
    with one_thread():
        if case.stopped:
            _stop_in_round_two(config, folder / "run")
        run_experiment(config, folder / "run", resuming=case.stopped)
    run = RunFolder(folder / "run")
    arrays = _arrays(run)
    return {
        "figures": _figures(_events(run), arrays),
        "events": _hashed(run),
        "arrays": {key: _hash([some[k].tobytes() for k in sorted(some)]) for key, some in arrays.items()},
    }


def write_people(path: Path) -> None:
    """Seven people with twelve replies each, each with a subject and a temper of their own."""
    subjects = ("rain", "the old mill", "chess", "bread", "trains", "my brother", "owls")
    tempers = ("i love {}", "{} again, really?", "not sure about {}", "let us talk about {}")
    asked = ("what about {}?", "did you see {} today?", "tell me of {} and the sea")
    lines = [
        {
            "user": f"u{k}",
            "time": f"2026-03-{t + 1:02d}T10:00:00",
            "prompt": asked[(t + k) % 3].format(subjects[(k * t) % 7]),
            "response": f"{tempers[k % 4].format(subjects[(k + t // 4) % 7])}, it was {t * k + 3} days",
        }
        for k in range(7)
        for t in range(12)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@contextmanager
def one_thread() -> Iterator[None]:
    """So that sums are made in one order, in processes that are started too."""
    before, told = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        torch.set_num_threads(before)
        os.environ.pop("OMP_NUM_THREADS")
        os.environ.update({"OMP_NUM_THREADS": told} if told else {})


def _stop_in_round_two(config: Any, folder: Path) -> None:
    progress = RunProgress()

    def stop() -> None:
        if progress.phase == "learn_shared" and progress.round == 1:
            raise KeyboardInterrupt

    progress.changed = stop
    try:
        run_experiment(config, folder, progress=progress)
    except KeyboardInterrupt:
        return
    raise AssertionError("the run was not stopped in round two")


def _arrays(run: RunFolder) -> dict[str, dict[str, np.ndarray]]:
    """Adapters as they are exported, and what the server has at the end."""
    found = {path.parent.relative_to(run.path).as_posix(): load_file(path)
             for path in sorted((run.path / "adapters").rglob("adapter_model.safetensors"))}  # fmt: skip
    last = run.last_shared()
    assert last
    moments = {key: np.asarray(x) for key, x in last.moments.items()}
    return found | {"server/shared": dict(last.shared)} | ({"server/moments": moments} if moments else {})


def _events(run: RunFolder) -> list[Record]:
    """As they stand in the file."""
    return [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]


def _figures(events: Sequence[Record], arrays: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, float]:
    told: dict[str, float] = {}
    for event in events:
        if event["event"] in ("evaluation", "newcomers"):
            what = f"{event['event']} of {event['arm']}, {event['metric']}, round {event.get('round', 'last')}"
            told[what] = event["mean_per_user"]
        elif event["event"] == "round":
            told[f"releases of round {event['round']}"] = event["releases"]
            told[f"norm of the change of round {event['round']}"] = event["change_norm_l2"] or 0.0
        elif event["event"] == "device_round" and event["epsilon"] and math.isfinite(event["epsilon"]):
            told["largest epsilon"] = max(told.get("largest epsilon", 0.0), event["epsilon"])
    for key, some in arrays.items():
        told[f"norm of {key}"] = float(np.sqrt(sum(float((x.astype(np.float64) ** 2).sum()) for x in some.values())))
    return {what: float(f"{value:.{DIGITS}g}") for what, value in told.items()}


def _hashed(run: RunFolder) -> dict[str, str]:
    """A hash of each field of each kind of event, over all events in their order, wherever the run's folder is."""
    columns: dict[str, list[bytes]] = {}
    for event in _events(run):
        for field, value in event.items():
            if field in ELSEWHERE | {"event"} or (event["event"] == "run" and field not in OF_RUN):
                continue
            columns.setdefault(f"{event['event']}.{field}", []).append(_bare(value, run.path.parent))
    return {key: _hash(column) for key, column in sorted(columns.items())}


def _bare(value: Any, folder: Path) -> bytes:
    """Without what is of the machine, the hour or the place, at any depth."""

    def left(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: left(v) for k, v in sorted(x.items()) if k not in ELSEWHERE}
        return [left(v) for v in x] if isinstance(x, list) else x

    return json.dumps(left(value)).replace(str(folder), "").encode()


def _hash(parts: Sequence[bytes]) -> str:
    digest = sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]


# -- where it was made --------------------------------------------------------------------------------------------


def here() -> Record:
    """What decides about the last bits, as far as a process can know."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "vendor": _processor("vendor_id"),
        "model": f"{_processor('cpu family')}-{_processor('model')}",
        "held": " ".join(f"{key}={os.environ[key]}" for key in HELD if key in os.environ),
    }


def _processor(what: str) -> str:
    """Of the processor, where Linux tells: libraries choose by its vendor and its model."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next(
        (value.strip() for key, _, value in (x.partition(":") for x in lines) if key.strip() == what), "unknown"
    )


def file_of(made_by: Mapping[str, str]) -> Path:
    held = "-held" if made_by["held"] else ""
    return HERE / f"{made_by['capability']}-{made_by['vendor']}{held}.json".lower()


def stored() -> list[Record]:
    """The record of the most similar kind of machine first."""
    found, made_by = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(HERE.glob("*.json"))], here()
    return sorted(found, key=lambda record: sum(record["made_by"].get(key) != x for key, x in made_by.items()))


def moved(before: Record, now: Record) -> list[str]:
    """In words what is not the same to the bit; a figure with how far."""
    told = []
    for part in ("figures", "arrays", "events"):
        for key in sorted({*before[part], *now[part]}):
            old, new = before[part].get(key), now[part].get(key)
            if old is None or new is None:
                told.append(f"{part}: {key} is {'new' if old is None else 'gone'}")
            elif old != new:
                told.append(f"{part}: {key}" + (f": {old} → {new}" if part == "figures" else " is another"))
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reason", required=True, help="why what they come to has moved; for the commit")
    reason, made_by = parser.parse_args().reason, here()
    path = file_of(made_by)
    before = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.exists() else {}
    cases: dict[str, Record] = {}
    for name in CASES:
        with TemporaryDirectory() as folder:
            cases[name] = made(name, Path(folder))
        changes = moved(before[name], cases[name]) if name in before else ["is new"]
        print(f"{name}: {'; '.join(changes) or 'the same to the bit'}", flush=True)
    facts = {"made_by": made_by, "python": python_version(), "reason": reason, "cases": cases}
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(HERE.parent.parent)}; put into the commit why: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
