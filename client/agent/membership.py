"""Being in a federation: terms are checked and agreed to, rounds are answered at a pace, adapters are taken.

Whether a release may leave, and what it costs, is decided in `client.private_training` and by the ledger.
"""

from __future__ import annotations

import sqlite3
import time
from dataclasses import replace

import torch
from pydantic import ValidationError

from florilegium.client.agent.acceptance import (
    check_promise,
    check_settings,
    check_sums,
    check_work,
    disagreement,
    unprotected,
)
from florilegium.client.agent.device import SESSION, Device, forget_shared, write_adapter
from florilegium.client.agent.errors import AgentError
from florilegium.client.agent.folder import replace_file
from florilegium.client.agent.learning import gathered, retire
from florilegium.client.agent.pace import doubled, rehearsed
from florilegium.client.agent.registration import Registration, public_identity
from florilegium.client.agent.terms import Membership, Terms
from florilegium.client.agent.vault import Sent, write_fact, write_sent
from florilegium.client.agent.vault_sessions import ANSWERED
from florilegium.client.calibration import release_limits
from florilegium.client.context import CohortContext
from florilegium.client.observation import Observation
from florilegium.client.private_training import resend
from florilegium.client.round import contribute
from florilegium.client.state import DeviceState
from florilegium.privacy.common.errors import UserError
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.secure_aggregation.part import Sendable

LOST = "lost"  # in place of a head that should be there


# -- joining and leaving ----------------------------------------------------------------------------------------------


def check_terms(device: Device, terms: Terms, registration: Registration | None = None) -> None:
    """Raises `AgentError` for terms that do not fit this device, or that its owner has not consented to."""
    missing = [item for item, given in device.consents.items() if not given]
    if missing:
        raise AgentError(f"not consented to: {' and '.join(missing)}; florilegium device consent {missing[0]} yes")
    config = device.config.device
    if why := unprotected(config.privacy) or disagreement(config, terms.distributed):
        raise AgentError(why)
    if terms.base != device.vault.fact("base", ""):
        raise AgentError(
            f"the federation is for the weights {terms.base[:12]!r} of {terms.model!r}; this device has "
            f"{device.lm.name!r} with others: ask the server's operator, or florilegium device rebase"
        )
    if not terms.operator:
        raise AgentError(f"the terms of {terms.name!r} name no key of its operator: whom would this device answer?")
    there = device.membership
    if there and there.name != terms.name:
        raise AgentError(f"this device is in {there.name!r}; leave it first: florilegium device leave")
    _check_registration(device, terms, registration)
    context = _affordable(device, terms)
    longest = release_limits(context.config, context.schema)[0]
    if terms.largest_norm_l2 and longest > terms.largest_norm_l2:
        raise AgentError(
            f"{terms.name!r} refuses releases longer than {terms.largest_norm_l2:.3g}; with its noise this "
            f"device's are up to {longest:.3g}: ask the operator for terms of another --mode, or with a smaller "
            f"--least-epsilon"
        )


def _check_registration(device: Device, terms: Terms, registration: Registration | None) -> None:
    """Raises `AgentError` unless this device is registered where devices have to be, and there alone."""
    told = terms.distributed
    if told is None:
        if registration:
            raise AgentError(f"a registration has no effect in {terms.name!r}: its devices sign nothing for each other")
        return
    identity = public_identity(device.vault, terms.federation)
    way = f"give the registrar of {terms.name!r} what florilegium device identity shows for these terms: {identity}"
    if registration is None:
        raise AgentError(f"devices of {terms.name!r} add noise together and are registered: {way}")
    if registration.identity != identity or not registration.is_of(told.registrar, terms.federation):
        raise AgentError(f"the registration is not this device's for these terms, by their registrar: {way}")


def _affordable(device: Device, terms: Terms) -> CohortContext:
    """The context under these terms.

    Raises `AgentError` for terms that cost more than a device gives, or leave too little of its promise.
    """
    try:
        check_settings(terms.shared, terms.rounds)
        context = device.context_in(Membership.of(terms))
        check_work(context.shared_layout, context.config)
        check_promise(context.config, terms.min_devices)
        if terms.distributed:
            check_sums(context.config, context.schema, terms.distributed, terms.seed)
    except (UserError, ValidationError) as error:
        why = "; ".join(e["msg"] for e in error.errors()) if isinstance(error, ValidationError) else str(error)
        raise AgentError(f"the terms of {terms.name!r} do not fit this device: {why}") from None
    except MemoryError:
        raise AgentError(f"the terms of {terms.name!r} need more memory than this device has") from None
    return context


def join(device: Device, terms: Terms, server: str, registration: Registration | None = None) -> None:
    """Agrees to a federation's terms: from now on its server is answered. Raises as `check_terms`."""
    check_terms(device, terms, registration)
    with device.busy:
        _go_over(device, terms.shared.pool_capacity, Membership.of(terms, server, registration))


def leave(device: Device) -> None:
    """Answers no server from now on, and learns anew without the shared adapter."""
    device.vault.set_fact("federation", None)  # at once: a round that is being worked on is not sent
    device.vault.set_fact(SESSION, None)
    with device.busy:
        _go_over(device, device.config.device.shared.pool_capacity, None)


def _go_over(device: Device, capacity: int, membership: Membership | None) -> None:
    """Goes over to another federation, or to none, with as many slots in the pool as it wants."""
    state = device.state()

    def also(connection: sqlite3.Connection) -> None:
        write_fact(connection, "federation", membership and membership.model_dump(mode="json"))
        forget_shared(connection)

    pool = state.pool if state.pool.capacity == capacity else state.pool.resized(capacity, state.secret)
    device.save(replace(state, pool=pool, sent=None, asked=""), also)


# -- a round ----------------------------------------------------------------------------------------------------------


def contribution(device: Device, received: torch.Tensor, plan: RoundPlan) -> Sendable | None:
    """The release of a round, stored before it is handed out; None where consent, budget or order forbid one."""
    with device.busy:
        began = time.monotonic()
        release = released(device, received, plan)
        keep_pace(device, time.monotonic() - began)
        return release


def released(device: Device, received: torch.Tensor, plan: RoundPlan) -> Sendable | None:
    """The release of a round, by one that has the device to itself."""
    there = device.membership
    if there is None or not device.federating or not 1 <= plan.round <= there.rounds:
        return None
    answered: dict[str, list[int]] = device.vault.fact(ANSWERED, {})
    state, context, rounds = device.state(), device.context_in(there), answered.get(there.name, [])
    if plan.round in rounds:  # in any order: none of them ends another
        return resend(state, received, plan, context) if plan.round == rounds[-1] else None
    if 0 < there.largest_norm_l2 < release_limits(context.config, context.schema)[0]:  # its owner has changed it since
        _note_unanswered(device, state, Sent(time.time(), there.name, plan.round, "too-large", 0, None))
        return None
    before = gathered(device, _with_spent_head(device, state), context)
    (state,), (release,), (seen,) = contribute([before], [[]], received, plan, context)
    if release is None and not _has_paid(device, state, there.name, plan.round):
        _note_unanswered(device, replace(state, sent=before.sent, asked=before.asked), _sent(there, plan, seen, 0))
        return None
    if state.head:
        replace_file(device.folder.spent, state.head)
    if not device.federating:  # any more
        return None
    told = _sent(there, plan, seen, context.upload_bytes(state.id, plan) if release else 0)

    def also(connection: sqlite3.Connection) -> None:
        write_fact(connection, ANSWERED, {**answered, there.name: [*rounds, plan.round]})
        write_sent(connection, told)

    device.save(state, also)
    retire(device, state)
    return release


def _sent(there: Membership, plan: RoundPlan, seen: Observation, size: int) -> Sent:
    """What has left in a round: a release of so many bytes, or a refusal."""
    kind = "release" if size else seen.refusal or "no-release"
    return Sent(time.time(), there.name, plan.round, kind, size, seen.epsilon)


def _has_paid(device: Device, state: DeviceState, federation: str, number: int) -> bool:
    account = device.ledger.account(state.id, state.genesis)
    return account is not None and any((e.experiment, e.round) == (federation, number) for e in account.entries)


def _note_unanswered(device: Device, state: DeviceState, told: Sent) -> None:
    """A question that is not paid for, for a wrong head say: noted once, and the round may be asked for again."""
    known = {(s.federation, s.round, s.kind) for s in device.vault.sent()}

    def also(connection: sqlite3.Connection) -> None:
        if (told.federation, told.round, told.kind) not in known:
            write_sent(connection, told)

    device.save(state, also)


def _with_spent_head(device: Device, state: DeviceState) -> DeviceState:
    """A vault that was put back from a copy lacks the head that was written beside it: it pays for nothing."""
    try:
        return replace(state, head=device.folder.spent.read_text(encoding="utf-8").strip() or LOST)
    except FileNotFoundError:
        return replace(state, head=LOST) if state.head else state


def adopt(device: Device, received: torch.Tensor, plan: RoundPlan) -> None:
    """Keeps the aggregated adapter for the next learning, whatever its version: one too high would end others."""
    with device.busy:
        there = device.membership
        if there is None or not device.federating or not 1 <= plan.version <= there.rounds:
            return
        with device.vault.open() as connection:
            write_adapter(connection, "newest", received, plan.version)


# -- the pace of its answers ------------------------------------------------------------------------------------------


def pace_of(device: Device) -> float:
    """Seconds after a question at which its answer leaves; 0 without a server. Rehearsed once for a federation."""
    if not device.federating:
        return 0.0
    known = device.vault.fact("pace", 0.0)
    if not known:
        with device.busy:
            known = rehearsed(device.context)
            device.vault.set_fact("pace", known)
    return known


def keep_pace(device: Device, worked: float) -> None:
    """Doubles the pace for good where the work alone, without waiting for the owner, took longer."""
    known = device.vault.fact("pace", 0.0)
    if known and doubled(known, worked) != known:
        device.vault.set_fact("pace", doubled(known, worked))
