"""What a device may train for a release, and what of it may leave.

Before any training the ledger is asked: a device whose account does not allow it learns for itself alone. How it trains
is in `client.shared_training`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING

import torch

from florilegium.client.calibration import planned_event
from florilegium.client.observation import Observation
from florilegium.client.shared_training import LEARNING, Learn
from florilegium.client.state import DeviceState
from florilegium.privacy.ledger import Answer, Request
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.release import Release
from florilegium.privacy.secure_aggregation.part import Sendable, SumPart

if TYPE_CHECKING:
    from florilegium.client.context import CohortContext


def train_shared(
    states: list[DeviceState],
    received: torch.Tensor,
    plan: RoundPlan,
    context: CohortContext,
    learn: Learn | None = None,
) -> tuple[list[DeviceState], list[torch.Tensor | None], list[Observation]]:
    """Trains each device's copy of the received adapter (P,); what it costs is in the ledger before.

    Returns the change of each device, of what travels in this round, None for one whose account does not allow it.
    `learn` gives the changes, already bounded as the mode demands, where something else is trained than our own.
    """
    answers = reserve(states, received, plan, context)
    after = [_charged(s, a, context) for s, a in zip(states, answers, strict=True)]
    able = [s for s, a in zip(after, answers, strict=True) if not a.refusal]
    learn = learn or LEARNING[context.config.privacy.distributed, context.config.privacy.by_dialogue]
    changes = learn(able, received, plan, context) if able else {}
    return after, [changes.get(s.id) for s in states], _observed(after, answers, context)


def release(
    changes: Sequence[torch.Tensor | None],
    states: Sequence[DeviceState],
    received: torch.Tensor,
    plan: RoundPlan,
    context: CohortContext,
) -> tuple[list[DeviceState], list[Sendable | None]]:
    """What leaves each device, and that it keeps a copy until the round is over.

    Raises `ReleaseRefusedError` for anything that is not of the agreed form.
    """
    asked = fingerprint(received)
    after = [replace(s, sent=change, asked=asked) for s, change in zip(states, changes, strict=True)]
    return after, [_sent(state, asked, plan, context) for state in after]


def resend(state: DeviceState, received: torch.Tensor, plan: RoundPlan, context: CohortContext) -> Sendable | None:
    """The release that this device made in this round for this adapter, bit by bit; None for another one.

    It is never computed again: rounded otherwise, under the same noise, it would tell what the noise hides.
    """
    return _sent(state, fingerprint(received), plan, context)


def _sent(state: DeviceState, asked: str, plan: RoundPlan, context: CohortContext) -> Sendable | None:
    if state.sent is None or state.asked != asked:
        return None
    if context.config.privacy.distributed:
        return SumPart(plan.version, state.head, state.sent.numpy())
    schema = context.schema.of_round(plan.round, context.rank_of(state.id))
    return Release.of(state.sent.numpy(), plan.version, state.head, schema)


def fingerprint(received: torch.Tensor) -> str:
    """SHA-256 of a shared adapter (P,): whether a server asks the same again."""
    return sha256(received.numpy().tobytes()).hexdigest()


def reserve(
    states: Sequence[DeviceState], received: torch.Tensor, plan: RoundPlan, context: CohortContext
) -> list[Answer]:
    """Asks the ledger for what the round will spend; what it grants is on the disk."""
    event, asked = planned_event(context.config), fingerprint(received)
    requests = [
        Request(
            device=s.id,
            genesis=s.genesis,
            experiment=context.experiment,
            round=plan.round,
            received=asked,
            event=event,
            dialogues=tuple(i for i, _ in s.pool.slots),
            heads=tuple(head for head in (s.head, plan.heads.get(s.id, "")) if head),
            repeatable=context.config.privacy.secret != "os",
        )
        for s in states
    ]
    return context.accounts.reserve(requests, context.config.privacy.budget)


def _charged(state: DeviceState, answer: Answer, context: CohortContext) -> DeviceState:
    """With the account's new head, and without the dialogues whose budget is spent."""
    if answer.refusal:
        return state
    retiring = context.config.privacy.budget.of == "dialogue"
    return replace(state, head=answer.head, pool=state.pool.only(answer.dialogues) if retiring else state.pool)


def _observed(states: Sequence[DeviceState], answers: Sequence[Answer], context: CohortContext) -> list[Observation]:
    accounts = context.accounts.accounts([(s.id, s.genesis) for s in states])
    budget = context.config.privacy.budget
    return [
        Observation(epsilon=account.spent(budget) if account else None, refusal=a.refusal or None)
        for account, a in zip(accounts, answers, strict=True)
    ]
