"""`florilegium bench privacy`: what protection costs a device in time, beside the same work without it, in one run.

Noisy steps (each dialogue's gradient apart, clipped, noised) against plain steps of AdamW on the same dialogues and
adapters; the ledger's reservation (read, judged, hashed, on the disk) against the round that it is part of. Arms take
turns in each repeat. Devices are chitchat's development users.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Group

from florilegium.client.calibration import planned_event
from florilegium.client.config import DeviceConfig
from florilegium.client.context import CohortContext
from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.config import ModelConfig
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.training_data import TrainingSet
from florilegium.client.phases import annotate, observe
from florilegium.client.private_training import reserve, train_shared
from florilegium.client.shared_training import noisy_steps
from florilegium.client.state import States
from florilegium.client.terminal import Figures
from florilegium.privacy.ledger import Ledger
from florilegium.privacy.plan import RoundPlan
from florilegium.simulation.benchmarks.engine import machine
from florilegium.simulation.data.population import DataConfig, User, load_population

EXAMPLES = (4, 16, 32)  # that a step draws of a pool of twice as many, in expectation
STEPS = 2


@dataclass(frozen=True)
class Measured:
    """Milliseconds of one device in one round of `STEPS` steps; medians over repeats."""

    examples: int
    noisy_ms: float
    plain_ms: float
    ledger_ms: float
    round_ms: float  # all of learning the shared adapter, the ledger in it

    @property
    def ratio(self) -> float:
        return self.noisy_ms / self.plain_ms

    @property
    def ledger_share(self) -> float:
        return self.ledger_ms / self.round_ms


@dataclass(frozen=True)
class Outcome:
    """A row a number of examples, all of the same model and as many devices."""

    model: str
    devices: int
    rows: list[Measured]


def measure(model: str, devices: int, repeats: int, tell: Callable[[str], object]) -> Outcome:
    """Raises `DataError` where there are fewer users."""
    tell("loading")
    lm = LanguageModel.load(ModelConfig(name=model))
    users = load_population(DataConfig(users=devices, split="development", min_pairs=24, max_pairs=96), seed=0)
    return Outcome(model, devices, [_measured(lm, users, examples, repeats, tell) for examples in EXAMPLES])


def _measured(
    lm: LanguageModel, users: Sequence[User], examples: int, repeats: int, tell: Callable[[str], object]
) -> Measured:
    shared = {"pool_capacity": 2 * examples, "steps_per_round": STEPS}
    config = DeviceConfig.model_validate({"shared": shared, "rounds": repeats})
    times: list[list[float]] = [[], [], [], []]
    with TemporaryDirectory() as folder:
        context, states = _ready(lm, users, config, Path(folder))
        planned_event(config)  # calibrated now, once for all rounds
        received = torch.zeros(context.shared_layout.width)
        for number in range(1, repeats + 1):
            tell(f"{examples} examples, repeat {number} of {repeats}")
            plan = RoundPlan(number, number - 1)
            arms: tuple[Callable[[], object], ...] = (
                partial(noisy_steps, states, received, plan, context),
                partial(_plain, states, received, context, examples),
                partial(reserve, states, received, plan, context),
                partial(train_shared, states, received, plan, context),
            )
            for found, work in zip(times, arms, strict=True):
                began = time.perf_counter()
                work()
                found.append(1000 * (time.perf_counter() - began) / len(states))
    noisy, plain, ledger, rest = map(median, times)
    return Measured(examples, noisy, plain, ledger, ledger + rest)  # the round's own reservation was paid before


def _ready(
    lm: LanguageModel, users: Sequence[User], config: DeviceConfig, folder: Path
) -> tuple[CohortContext, States]:
    """Devices with full pools, as they are when learning begins."""
    replies = {d.id: d.response for user in users for d in user.stream}
    context = CohortContext.of(
        lm, config, 0, lambda device, dialogue: replies[dialogue], ledger=Ledger(folder / "ledger.db")
    )
    states = [context.new_state(f"device-{k:05d}") for k in range(len(users))]
    states, _ = observe(states, [user.stream for user in users], RoundPlan(1, 0), context)
    return context, annotate(states, context)[0]


def _plain(states: States, received: torch.Tensor, context: CohortContext, examples: int) -> None:
    """As many steps on as many dialogues of the pool, without clipping and noise."""
    sets = []
    for state in states:
        pooled = context.lm.format.dialogues([Dialogue(i, p, state.replies[i]) for i, p in state.pool.slots])
        batch = list(range(min(examples, len(pooled))))
        sets.append(TrainingSet(pooled, [batch] * STEPS))
    rates = [[1e-3] * STEPS] * len(sets)
    start = context.lm.adapters(context.shared_layout, received.expand(len(states), -1))
    context.lm.engine.finetune(start, [], sets, rates)


def as_json(found: Outcome) -> dict[str, Any]:
    """For programs."""
    told = [{**asdict(r), "noisy_by_plain": r.ratio, "ledger_share": r.ledger_share} for r in found.rows]
    return {"machine": machine("cpu"), "model": found.model, "devices": found.devices, "steps": STEPS, "rows": told}


def as_table(found: Outcome) -> Group:
    """For people."""
    title = f"{found.model}, {found.devices} devices in one pass, {STEPS} steps; milliseconds of one device"
    table = Figures(title=title, title_style="")
    for heading in ("examples a step", "noisy steps", "plain steps", "times as long", "ledger", "of the round"):
        table.add_column(heading, justify="right")
    for r in found.rows:
        table.add_row(
            str(r.examples), f"{r.noisy_ms:.1f}", f"{r.plain_ms:.1f}", f"{r.ratio:.2f}", f"{r.ledger_ms:.2f}",
            f"{r.ledger_share:.1%}",
        )  # fmt: skip
    return Group(table)
