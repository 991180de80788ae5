"""What the driver of a simulation asks of the processes that hold the devices, beside the federation (a `Job`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.config import SamplingConfig
from florilegium.client.observation import Observation
from florilegium.client.phases import frozen_adapters, learn_personal
from florilegium.client.round import learn_alone
from florilegium.client.state import stage
from florilegium.privacy.plan import RoundPlan
from florilegium.simulation.devices.simulated import SimulatedDevices
from florilegium.simulation.evaluation.metrics import Arm, Reply, Scored, by_device, reply_arms, score_users


@dataclass(frozen=True)
class Rows:
    """What a server sent (1, P), which every device takes as far as it has room; or a personal row of each (K, P)."""

    kind: Literal["shared", "personal"]
    rows: torch.Tensor


@dataclass(frozen=True)
class Arms:
    """What is compared, on which devices: `names[k]` has row k."""

    names: Sequence[str]
    arms: Mapping[str, Sequence[Rows]]

    def with_arm(self, name: str, parts: Sequence[Rows]) -> Arms:
        return Arms(self.names, {**self.arms, name: parts})

    def of(self, names: Sequence[str], devices: SimulatedDevices) -> dict[str, Arm]:
        """For some of the devices, in their order."""
        context, places = devices.context, {name: k for k, name in enumerate(self.names)}
        chosen = [places[name] for name in names]

        def stacks(rows: Rows) -> list[Adapters]:
            if rows.kind == "shared":
                return frozen_adapters(rows.rows[0], names, context)
            return [
                context.lm.adapters(context.personal_layout, rows.rows if len(rows.rows) == 1 else rows.rows[chosen])
            ]

        return {arm: [stack for rows in parts for stack in stacks(rows)] for arm, parts in self.arms.items()}


@dataclass(frozen=True)
class Asked:
    """Replies that are to be generated: the first `queries` of each device; `first[name]` counts those before."""

    arms: Arms
    queries: int
    sampling: SamplingConfig
    seed: int
    first: Mapping[str, int]


def observed(devices: SimulatedDevices, names: Sequence[str], round_number: int) -> dict[str, Observation]:
    """What was seen of each device in a round."""
    return devices.observations(names, round_number)


def learn_without_server(devices: SimulatedDevices, names: Sequence[str], round_number: int) -> None:
    """The `local` arm: the same buffers, steps and order as the personal adapters, no shared one beneath."""
    context, store, over = devices.context, devices.run.shards.controls, stage(round_number)
    stages = devices.store.stages(names)
    took_part = [name for name in names if stages[name] == over]
    if not took_part or set(store.stages(took_part).values()) == {over}:
        return
    before = store.find(took_part, stage(round_number - 1))
    states = [
        replace(state, personal=at[1].personal if (at := before[state.id]) else context.new_state(state.id).personal)
        for state in devices.states(took_part, round_number)
    ]
    learned, _ = learn_personal(states, None, RoundPlan(round_number, round_number), context)
    store.save(learned, over)


def personal_rows(
    devices: SimulatedDevices, names: Sequence[str], round_number: int
) -> dict[str, dict[str, torch.Tensor]]:
    """Of each device its personal adapter (P,) with the server and without, after a round."""
    alone = devices.run.shards.controls.find(names, stage(round_number))
    start = devices.context.new_state
    return {
        state.id: {
            "personal": state.personal,
            "local": at[1].personal if (at := alone[state.id]) else start(state.id).personal,
        }
        for state in devices.states(names, round_number)
    }


def scored(devices: SimulatedDevices, names: Sequence[str], arms: Arms) -> dict[str, dict[str, Scored]]:
    """By arm and device the NLL of the held-out replies."""
    queries = [devices.users[name].held_out for name in names]
    found = score_users(devices.context.lm, queries, arms.of(names, devices))
    return {arm: dict(zip(names, values, strict=True)) for arm, values in found.items()}


def replied(devices: SimulatedDevices, names: Sequence[str], asked: Asked) -> dict[str, dict[str, list[Reply]]]:
    """By arm and device the generated replies."""
    lm, queries = devices.context.lm, [devices.users[name].held_out[: asked.queries] for name in names]
    seeds = [asked.seed + asked.first[n] + i for n, some in zip(names, queries, strict=True) for i in range(len(some))]
    found = reply_arms(lm, queries, asked.arms.of(names, devices), asked.sampling, seeds)
    return {arm: dict(zip(names, by_device(replies, len(names)), strict=True)) for arm, replies in found.items()}


def joined_late(
    devices: SimulatedDevices, names: Sequence[str], shared: torch.Tensor | None
) -> dict[str, dict[str, Scored]]:
    """Devices that never took part take the shared adapter (P,), if any, and learn from all of their stream at once."""
    context, rounds = devices.context, devices.context.config.rounds
    streams = [devices.users[name].stream for name in names]
    plan = RoundPlan(rounds + 1, rounds)
    states, _ = learn_alone([context.new_state(n) for n in names], streams, shared, plan, context)
    own = Rows("personal", torch.stack([s.personal for s in states]))
    if shared is None:
        return scored(devices, names, Arms(names, {"base": [], "personal": [own]}))
    given = Rows("shared", shared[None])
    return scored(devices, names, Arms(names, {"base": [], "shared": [given], "personal": [given, own]}))
