"""One measurement of `florilegium bench scale`, in a process of its own: our rounds, without training.

    python -m florilegium.simulation.benchmarks.scale_florilegium 10000 0 FOLDER

prints when each round ended and what the process needed at most. A device sends 3 kB, as `scale_flower`'s does, and
does all else that a device does but train: its state and its ledger are on the disk, the gate looks at what it sends,
the run's events are written.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch

from florilegium.client.context import CohortContext
from florilegium.client.dialogue import Dialogue
from florilegium.client.observation import Observation
from florilegium.client.pool import Pool
from florilegium.client.private_training import release, reserve
from florilegium.client.state import States
from florilegium.privacy.common.machine import peak_rss_bytes
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.secure_aggregation.part import Sendable
from florilegium.simulation.benchmarks.scale_flower import NUMBERS, ROUNDS, SAMPLED
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.data.population import User
from florilegium.simulation.runs.stopping import end_with_parent

POOLED = tuple((f"d{i}", "") for i in range(16))  # dialogues that each device pays for


class Nobody(Sequence[User]):
    """So many users who never say anything."""

    def __init__(self, users: int) -> None:
        self.users = users

    def __len__(self) -> int:
        return self.users

    @overload
    def __getitem__(self, index: int) -> User: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[User]: ...

    def __getitem__(self, index: int | slice) -> User | Sequence[User]:
        if isinstance(index, slice):
            return []
        if not index < self.users:
            raise IndexError(index)  # where going through all of them ends
        return User(str(index), (), (Dialogue("d", "Hello?", "Hi."),))


def idle_contribute(
    states: States,
    arrived: Sequence[Sequence[Dialogue]],
    received: torch.Tensor,
    plan: RoundPlan,
    context: CohortContext,
) -> tuple[States, list[Sendable | None], list[Observation]]:
    """Pays and releases without training."""
    states = [replace(s, pool=Pool(s.pool.capacity, POOLED, len(POOLED))) for s in states]
    answers = reserve(states, received, plan, context)
    paid = [replace(s, head=a.head) for s, a in zip(states, answers, strict=True)]
    change = torch.full((NUMBERS,), 1e-3)
    changes = [None if a.refusal else change for a in answers]
    states, releases = release(changes, paid, received, plan, context)
    return states, releases, [_seen(context.upload_bytes(s.id, plan)) for s in states]


def idle_adopt(
    states: States, received: torch.Tensor, plan: RoundPlan, context: CohortContext
) -> tuple[States, list[Observation]]:
    """Keeps the personal adapter that there is."""
    return [replace(s, sent=None, asked="") for s in states], [_seen(None) for _ in states]


def _seen(upload_bytes: int | None) -> Observation:
    """What a device with little to tell notes, in the form that summaries read."""
    return Observation(
        arrived=0, accepted=0, buffered=0, truncated=0, annotations=0, synthetic_kept=0, synthetic_rejected=0,
        synthetic_reasons={}, epsilon=1.0, upload_bytes=upload_bytes,
    )  # fmt: skip


def config_of(devices: int, actors: int) -> ExperimentConfig:
    adapter = {"targets": ["v_proj"], "rank": 1, "alpha": 1, "factors": "b"}
    return ExperimentConfig.model_validate({
        "name": "scale",
        "rounds": ROUNDS,
        "cohort_size": 128,
        "model": {"dtype": "float32"},
        "data": {"users": devices, "min_pairs": 2, "max_pairs": 2},
        "privacy": {"delta": 1e-9},
        "server": {"sampled_share": SAMPLED},
        "shared": {"adapter": adapter},
        "personal": {"adapter": adapter},
        "evaluation": {"users": 1, "every_round": False, "rouge_queries_per_user": 0, "pooled_epochs": 0},
        "ray": {"actors": actors},
        "workers": "auto" if actors else 1,
    })  # fmt: skip


def ours(devices: int, actors: int, folder: Path) -> list[float]:
    """When each round was over, in seconds since the epoch."""
    from florilegium.client.lm.model import LanguageModel
    from florilegium.simulation.devices.people import UsersByDevice
    from florilegium.simulation.engines.cohort_grid import CohortGrid
    from florilegium.simulation.engines.placement import open_workers
    from florilegium.simulation.engines.scheduler import Scheduler
    from florilegium.simulation.recorder import federate_run
    from florilegium.simulation.runs.events import RoundEnd
    from florilegium.simulation.runs.folder import create

    run = create(folder / "run", config_of(devices, actors))
    alone = idle_devices(run, LanguageModel.load(run.config.model))
    with open_workers(run, alone, idle_worker) as workers:
        scheduler = Scheduler(workers, alone)
        federate_run(run, CohortGrid(scheduler.map, alone.schema, list(UsersByDevice(Nobody(devices)))), scheduler)
    return [event.time for event in run.events_of(RoundEnd)]


def idle_worker(folder: Path) -> Any:
    """The same in a worker process."""
    from florilegium.client.lm.model import LanguageModel
    from florilegium.simulation.runs.folder import RunFolder

    run = RunFolder(folder)
    return idle_devices(run, LanguageModel.load(run.config.model))


def idle_devices(run: Any, lm: Any) -> Any:
    """The devices of a run that do everything but train."""
    from florilegium.simulation.devices.people import UsersByDevice
    from florilegium.simulation.devices.simulated import RoundFunctions, SimulatedDevices

    users = UsersByDevice(Nobody(run.config.data.users))
    context = CohortContext.of(lm, run.config, run.config.seed, users.reply, None, run.shards.ledger)
    return SimulatedDevices(run, context, users, RoundFunctions(idle_contribute, idle_adopt))


def main() -> None:
    end_with_parent()
    began = time.time()
    ended = ours(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    print("\n" + json.dumps({"began": began, "ended": ended, "peak_bytes": peak_rss_bytes()}))


if __name__ == "__main__":
    main()
