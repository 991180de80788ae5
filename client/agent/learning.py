"""What a device makes of its dialogues: takes up what is new, selects, trains the personal adapter, keeps a profile."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from hashlib import sha256

import torch

from florilegium.client.agent import shared_trial, trial
from florilegium.client.agent.conversation import as_dialogues, check_length, mended
from florilegium.client.agent.device import Device, Progress, silent, write_adapter
from florilegium.client.agent.errors import AgentError
from florilegium.client.agent.vault import Turn, write_fact, write_learned
from florilegium.client.context import CohortContext
from florilegium.client.dialogue import Echo
from florilegium.client.personalization.config import ProfileConfig
from florilegium.client.personalization.profile import Profile, ProfileError
from florilegium.client.phases import annotate, observe
from florilegium.client.round import learn_alone
from florilegium.client.state import DeviceState
from florilegium.privacy.plan import RoundPlan


def learn(device: Device, progress: Progress = silent) -> dict[str, object]:
    """Takes up what is new, selects, synthesizes, trains the personal adapter, and keeps it if it passes its trial.

    Returns what was observed, as JSON has it.
    """
    if not device.consents["learn"]:
        raise AgentError("learning is not consented to: florilegium device consent learn yes")
    with device.working(progress):
        cycle = device.cycle + 1
        turns = taken_up(device, cycle)
        state, context = refreshed(device, device.state()), device.context
        before = trial.learned_now(device, state)
        received, version, met = shared_trial.tried_newest(device, before)
        began, plan = time.monotonic(), RoundPlan(cycle, version)
        (state,), (seen,) = learn_alone([state], [as_dialogues(device, turns)], received, plan, context)
        tried = trial.try_out(device, before, trial.Learned(received, version, state.personal))
        profile = profile_after(device, profile_of(device), turns)
        facts = {**seen.seen(), "seconds of all": time.monotonic() - began, "trial": tried.told()}
        if met:
            facts["shared trial"] = asdict(met)

        def also(connection: sqlite3.Connection) -> None:
            write_fact(connection, "cycle", cycle)
            write_fact(connection, "profile", profile.to_json())
            write_fact(connection, "learned", {"at": time.time(), "page": facts})
            write_fact(connection, trial.LEARNINGS, device.vault.fact(trial.LEARNINGS, 0) + 1)
            trial.write_trial(connection, tried, cycle, before)
            shared_trial.write_shared_trial(connection, device, met)
            if tried.verdict.accepted:
                write_adapter(connection, "used", received, version)
                write_learned(connection, (k.id for k in state.annotated), cycle)

        device.save(state if tried.verdict.accepted else replace(state, personal=before.personal), also)
        retire(device, state)
        device.vault.check()
        device.vault.copy_to(device.folder.good_copy)
        return facts


def taken_up(device: Device, cycle: int) -> list[Turn]:
    """The dialogues that are new, now of this cycle, some of their replies held back; asked again, the same ones."""
    turns = device.vault.take_up(cycle)
    trial.hold_back(device, turns)
    return turns


def due(device: Device, now: time.struct_time, plugged: bool | None) -> bool:
    """Whether the device would learn by itself at this local time, on this supply. Needs something new."""
    if not device.consents["learn"] or not device.vault.turns("WHERE cycle IS NULL"):
        return False
    first, last = device.config.night
    if device.learns == "night":
        return first <= now.tm_hour < last if first <= last else now.tm_hour >= first or now.tm_hour < last
    return device.learns == "charging" and plugged is True


def gathered(device: Device, state: DeviceState, context: CohortContext) -> DeviceState:
    """The state with all that has arrived, selected and asked for; trains nothing."""
    cycle = device.cycle + 1
    turns = taken_up(device, cycle)
    dialogues, plan = as_dialogues(device, turns), RoundPlan(cycle, 0)
    states, _ = observe([refreshed(device, state)], [dialogues], plan, context)
    states, _ = annotate(states, context)
    profile = profile_after(device, profile_of(device), turns)

    def also(connection: sqlite3.Connection) -> None:
        write_fact(connection, "cycle", cycle)
        write_fact(connection, "profile", profile.to_json())

    device.save(states[0], also)
    return states[0]


def refreshed(device: Device, state: DeviceState) -> DeviceState:
    """The state with the replies as the owner last wrote them; what was made from others goes."""
    now = {i: reply for i in state.replies if (reply := device.reply_to(state.id, i))}
    same = {i for i, reply in now.items() if reply == state.replies[i]}
    return replace(
        state,
        replies=now,
        echoes=frozenset(i for i, reply in now.items() if isinstance(reply, Echo)),
        synthetic={i: made for i, made in state.synthetic.items() if i in same},
        pool_synthetic={i: made for i, made in state.pool_synthetic.items() if i in same},
    )


def retire(device: Device, state: DeviceState) -> None:
    """Drops the oldest dialogues beyond what is kept, but for those that the device learns from."""
    over = device.vault.count() - device.config.keep
    if over <= 0:
        return
    used = held(state)
    old = [t.id for t in device.vault.turns("WHERE cycle IS NOT NULL") if t.id not in used]
    device.vault.forget(old[:over])


def held(state: DeviceState) -> set[str]:
    """The dialogues in its buffer and its pool."""
    return {k.id for k in state.buffer.bins} | {i for i, _ in state.pool.slots}


# -- the profile ------------------------------------------------------------------------------------------------------


def profile_of(device: Device) -> Profile:
    """What the device has noticed of its owner's interests, or was told of them."""
    told = device.vault.fact("profile", "")
    try:
        return Profile.from_json(mended(told)) if told else Profile()
    except ProfileError:  # of an earlier version, which took more; learning notices interests anew
        return Profile()


def edit_profile(device: Device, text: str) -> Profile:
    """The profile as its owner wants it; raises `ProfileError` for what is not one."""
    check_length(device, text)
    found = Profile.from_json(text)
    with device.busy:
        gone = {i.text for i in profile_of(device).interests} - {i.text for i in found.interests}
        device.vault.set_fact("removed interests", sorted(_removed(device).union(map(_hashed, gone))))
        device.vault.set_fact("profile", found.to_json())
    return found


def profile_after(device: Device, profile: Profile, turns: Iterable[Turn]) -> Profile:
    """A profile after what was said in these turns."""

    def embed(texts: Sequence[str]) -> torch.Tensor:
        return torch.stack([f.readings["mean"].vector for f in device.lm.embed(texts)])

    for turn in turns:
        profile = profile.after(turn.prompt, turn.feedback, embed, ProfileConfig())
    return profile


def without_removed(device: Device, profile: Profile) -> Profile:
    """A profile without the interests that its owner has taken out."""
    removed = _removed(device)
    return replace(profile, interests=tuple(i for i in profile.interests if _hashed(i.text) not in removed))


def _removed(device: Device) -> set[str]:
    hashes: list[str] = device.vault.fact("removed interests", [])
    return set(hashes)


def _hashed(text: str) -> str:
    return sha256(text.encode()).hexdigest()
