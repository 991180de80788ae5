"""Unlearning: dialogues go, and with them what they did to buffer, profile and adapter; these are made anew."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from florilegium.client.agent.conversation import as_dialogues
from florilegium.client.agent.device import Device, Progress, Write, forget_shared, silent
from florilegium.client.agent.errors import DeviceError
from florilegium.client.agent.learning import profile_after, refreshed, without_removed
from florilegium.client.agent.trial import forget_trials
from florilegium.client.agent.vault import Turn, forget_origins, unsay, write_fact, write_learned
from florilegium.client.lm.places import base_hash
from florilegium.client.personalization.profile import Profile
from florilegium.client.phases import observe
from florilegium.client.round import learn_alone
from florilegium.client.state import DeviceState, States
from florilegium.client.state_store import StoreError
from florilegium.privacy.common.registry import ExtensionError
from florilegium.privacy.plan import RoundPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MadeAnew:
    """A device after an erasure, for its owner."""

    retrained: bool
    dialogues: int  # that are left
    sent: int  # releases from before, which cannot be recalled
    replies: int = 0  # of the model that were erased too


def said_under(device: Device, identities: Sequence[str]) -> list[Turn]:
    """What the model may have said of these: its replies since it learned from them, or with them in sight.

    Raises KeyError for a dialogue that is not there.
    """
    for identity in identities:
        device.vault.turn(identity)
    return device.vault.said_under(identities)


def erase(
    device: Device, identities: Sequence[str], progress: Progress = silent, *, keep_replies: bool = False
) -> MadeAnew:
    """Removes dialogues, what was made from them, and what they did to the buffer, the profile and the adapter.

    With them go the model's replies that `said_under` finds, unless `keep_replies`: their words may be in them.
    What the owner wrote in those dialogues stays. What models said in trials goes, and the adapter before the last.

    The buffer and the profile are made anew from what remains, as if the erased had never been said; but for older
    dialogues that were dropped meanwhile, maybe in their favour. The personal adapter is trained anew from its
    start. What was sent cannot be recalled. Raises KeyError for a dialogue that is not there.
    """
    for identity in identities:
        device.vault.turn(identity)
    with device.working(progress):
        device.tell("forget")
        under = [] if keep_replies else device.vault.said_under(identities)

        def also(connection: sqlite3.Connection) -> None:
            write_fact(connection, "erasing", True)
            unsay(connection, [t.id for t in under])
            forget_trials(connection)
            forget_origins(connection, identities)

        device.vault.forget(identities, also)
        return replace(_erased(device), replies=len(under))


def finish(device: Device) -> None:
    """Ends an erasure that was stopped, by a power cut say."""
    if device.vault.fact("erasing", False):
        try:
            with device.busy:
                _erased(device)
        except (DeviceError, ExtensionError, StoreError, OSError) as error:
            told = type(error).__name__ if isinstance(error, ExtensionError) else error  # whose text may quote
            log.error("an erasure could not be ended, and is tried again at the next start: %s", told)


def _erased(device: Device) -> MadeAnew:
    """What comes after the dialogues are gone; begun anew where it was stopped."""
    device.folder.drop_copies()
    done = _made_anew(device, *device.used())
    device.vault.set_fact("erasing", False)
    return done


def rebase(device: Device, progress: Progress = silent) -> MadeAnew:
    """Makes buffer, profile and adapter anew, from the dialogues, on the model that the settings name now.

    The device leaves its federation, whose shared adapter is the other model's; what it has spent stays spent.
    """
    base = base_hash(device.config.device.model.name)

    def also(connection: sqlite3.Connection) -> None:
        write_fact(connection, "base", base)
        write_fact(connection, "federation", None)
        forget_shared(connection)
        forget_trials(connection, figures=True)

    with device.working(progress):
        return _made_anew(device, None, 0, also)


def _made_anew(
    device: Device, received: torch.Tensor | None, version: int, also: Write = lambda connection: None
) -> MadeAnew:
    """Saves the device as it would be, had it only met what is in the vault now; earlier ones go at once."""
    state, vault = _relived(device, device.state()), device.vault
    trained = bool(device.context.config.personal.epochs and state.annotated and device.consents["learn"])
    if trained:
        (state,), _ = learn_alone([state], [[]], received, RoundPlan(device.cycle, version), device.context)
    profile = without_removed(device, profile_after(device, Profile(), vault.turns("WHERE cycle IS NOT NULL")))

    def all_of_it(connection: sqlite3.Connection) -> None:
        write_fact(connection, "profile", profile.to_json())
        write_learned(connection, (k.id for k in state.annotated), device.cycle)
        also(connection)

    device.save(state, all_of_it, only=True)
    device.tell("compact")
    vault.compact()
    vault.check()
    vault.copy_to(device.folder.good_copy)
    return MadeAnew(trained, vault.count(), len(vault.releases()))


def _relived(device: Device, state: DeviceState) -> DeviceState:
    """The device if what is in the vault now were all that it ever met; its pool, secret and account stay."""
    context, cycles = device.context, dict[int, list[Turn]]()
    for turn in device.vault.turns("WHERE cycle IS NOT NULL"):
        cycles.setdefault(turn.cycle or 0, []).append(turn)
    states: States = [replace(context.new_state(state.id), secret=state.secret)]
    for cycle, turns in sorted(cycles.items()):
        states, _ = observe(states, [as_dialogues(device, turns)], RoundPlan(cycle, 0), context)
    left = {d.id: d for turns in cycles.values() for d in as_dialogues(device, turns)}
    slots = tuple((i, prompt) for i, prompt in state.pool.slots if i in left)
    same = {(k.id, k.prompt) for k in state.buffer.bins} & {(i, d.in_context.prompt) for i, d in left.items()}
    return refreshed(
        device,
        replace(
            state,
            buffer=states[0].buffer,
            pool=replace(state.pool, slots=slots),
            personal=states[0].personal,
            arrived=states[0].arrived,
            replies={i: reply for i, reply in state.replies.items() if i in left},
            synthetic={i: made for i, made in state.synthetic.items() if i in dict(same)},
            pool_synthetic={i: made for i, made in state.pool_synthetic.items() if i in dict(slots)},
            sent=None,
            asked="",
        ),
    )
