"""A shared adapter that a server sent is tried by itself before anything is built on it.

It is compared with the one that the device talks with, on replies of its owner's that were held back, beneath the
personal adapter as it is; where fewer than two are held back, on the newest replies without the personal adapter, which
was fitted to them. One that makes them less likely beyond chance is refused, and so is one with a weight or a
likelihood that is no number: chat and learning go on with the one before, and it is not tried again. With fewer than
two replies it waits. Rounds do not ask: what is computed at an adapter, with noise, is no use of it.
"""

from __future__ import annotations

import sqlite3
from dataclasses import asdict, dataclass
from hashlib import sha256

import torch

from florilegium.client.agent.device import Device
from florilegium.client.agent.trial import (
    KEPT,
    MOST_REPLIES,
    SHARED_TRIALS,
    UNTRIED,
    Learned,
    adapters_of,
    answered_turns,
    finite,
    held_back_turns,
    nll_of,
)
from florilegium.client.agent.vault import write_fact
from florilegium.client.personalization.acceptance import LEAST, Verdict, judged
from florilegium.client.phases import frozen_adapters

REFUSED, WAITS = "refused", "waits for replies"
REMEMBERED = 50  # trials


@dataclass(frozen=True)
class SharedTrial:
    """What came of one; likelihoods in nats a token, none where nothing was compared."""

    federation: str
    version: int
    digest: str  # SHA-256 of the weights
    decision: str
    replies: int = 0
    before: float | None = None
    after: float | None = None

    @property
    def is_used(self) -> bool:
        return self.decision in (KEPT, UNTRIED)


def tried_newest(device: Device, now: Learned) -> tuple[torch.Tensor | None, int, SharedTrial | None]:
    """The shared adapter (P,) to learn and talk with, its version, and the newest one's trial, if there was one."""
    newest, version = device.newest()
    if newest is None or (now.shared is not None and torch.equal(newest, now.shared)):
        return newest, version, None
    there, digest = device.membership, sha256(newest.numpy().tobytes()).hexdigest()
    if any(t["digest"] == digest and t["decision"] == REFUSED for t in told(device)):
        return now.shared, now.version, None
    decision, verdict = _judged(device, now, newest)
    figures = (verdict.replies, finite(verdict.before), finite(verdict.after)) if verdict else ()
    found = SharedTrial(there.name if there else "", version, digest, decision, *figures)
    return (newest, version, found) if found.is_used else (now.shared, now.version, found)


def _judged(device: Device, now: Learned, newest: torch.Tensor) -> tuple[str, Verdict | None]:
    rules = device.config.acceptance
    if not newest.isfinite().all():
        return REFUSED, None
    if not rules.share:  # its owner wants nothing tried
        return UNTRIED, None
    turns, alone = held_back_turns(device), False
    if len(turns) < LEAST:
        turns, alone = answered_turns(device), True
    turns = turns[-MOST_REPLIES:]
    if len(turns) < LEAST:
        return WAITS, None
    device.tell("try the server's adapter")

    def nll(shared: torch.Tensor | None) -> list[float]:
        on = [] if shared is None else frozen_adapters(shared, [device.config.name], device.context)
        return nll_of(device, turns, on if alone else adapters_of(device, Learned(shared, 0, now.personal)))

    verdict = judged(nll(now.shared), nll(newest), rules.risk)
    return KEPT if verdict.accepted else REFUSED, verdict


def write_shared_trial(connection: sqlite3.Connection, device: Device, found: SharedTrial | None) -> None:
    """Notes a trial, within a transaction of its caller's; one that waits each time anew is noted once."""
    before = told(device)
    if found and asdict(found) not in before[-1:]:
        write_fact(connection, SHARED_TRIALS, [*before, asdict(found)][-REMEMBERED:])


def told(device: Device) -> list[dict[str, object]]:
    """All that are remembered, oldest first, as JSON has them."""
    found: list[dict[str, object]] = device.vault.fact(SHARED_TRIALS, [])
    return found
