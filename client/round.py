"""One round of a cohort, read from top to bottom: what a device does before and after the server aggregates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from florilegium.client.context import CohortContext
from florilegium.client.dialogue import Dialogue
from florilegium.client.observation import Observation, PhaseRecorder
from florilegium.client.phases import annotate, learn_personal, observe, synthesize, synthesize_pool
from florilegium.client.private_training import release, train_shared
from florilegium.client.state import States
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.secure_aggregation.part import Sendable

NOTHING_SENT = Observation(upload_bytes=0, epsilon=0.0)


def contribute(
    states: States,
    arrived: Sequence[Sequence[Dialogue]],
    received: torch.Tensor,
    plan: RoundPlan,
    context: CohortContext,
) -> tuple[States, list[Sendable | None], list[Observation]]:
    """Selects, asks, trains the shared adapter (P,) and releases its noised change.

    What only the personal adapter needs comes after the aggregation: it must not delay or spoil a release.
    """
    recorder = PhaseRecorder(len(states), plan.round, context.listener)
    states = _gather(states, arrived, plan, context, recorder)
    if context.config.shared.synthetic:
        with recorder.phase("descend") as made:
            states, made[:] = synthesize_pool(states, context)
    with recorder.phase("learn_shared") as spent:
        states, changes, spent[:] = train_shared(states, received, plan, context)
    with recorder.phase("release") as sent:
        states, releases = release(changes, states, received, plan, context)
        sizes = [context.upload_bytes(s.id, plan) if r else 0 for s, r in zip(states, releases, strict=True)]
        sent[:] = [Observation(upload_bytes=size) for size in sizes]
    return states, releases, recorder.observations


def adopt(
    states: States, received: torch.Tensor | None, plan: RoundPlan, context: CohortContext
) -> tuple[States, list[Observation]]:
    """Takes the aggregated shared adapter (P,), if any, synthesizes, and trains the personal adapter on top of it."""
    recorder = PhaseRecorder(len(states), plan.round, context.listener)
    over = [replace(s, sent=None, asked="") for s in states]
    return _personalize(over, received, plan, context, recorder), recorder.observations


def stay(
    states: States, arrived: Sequence[Sequence[Dialogue]], plan: RoundPlan, context: CohortContext
) -> tuple[States, list[Sendable | None], list[Observation]]:
    """As `contribute`, of devices that have no server: nothing is trained for one, nothing leaves."""
    recorder = PhaseRecorder(len(states), plan.round, context.listener)
    states = _gather(states, arrived, plan, context, recorder)
    return states, [None] * len(states), [seen.joined(NOTHING_SENT) for seen in recorder.observations]


def learn_alone(
    states: States,
    arrived: Sequence[Sequence[Dialogue]],
    received: torch.Tensor | None,
    plan: RoundPlan,
    context: CohortContext,
) -> tuple[States, list[Observation]]:
    """A round in which nothing is released, with a shared adapter (P,) beneath the personal one, or without."""
    recorder = PhaseRecorder(len(states), plan.round, context.listener)
    states = _gather(states, arrived, plan, context, recorder)
    return _personalize(states, received, plan, context, recorder), recorder.observations


def _gather(
    states: States,
    arrived: Sequence[Sequence[Dialogue]],
    plan: RoundPlan,
    context: CohortContext,
    recorder: PhaseRecorder,
) -> States:
    with recorder.phase("observe") as seen:
        states, seen[:] = observe(states, arrived, plan, context)
    with recorder.phase("annotate") as asked:
        states, asked[:] = annotate(states, context)
    return states


def _personalize(
    states: States, received: torch.Tensor | None, plan: RoundPlan, context: CohortContext, recorder: PhaseRecorder
) -> States:
    with recorder.phase("synthesize") as written:
        states, written[:] = synthesize(states, plan, context)
    with recorder.phase("learn_personal") as learned:
        states, learned[:] = learn_personal(states, received, plan, context)
    return states
