"""A real device: a cohort of one that talks with its owner, learns when it may, and answers a server if it has one.

What a simulation composes round after round happens here when it is time: dialogues arrive as they are had, their
owner answers for them days later or never, learning is a night's work, a release is made when a server asks. All of it
is the code of `client.round`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from secrets import token_urlsafe
from typing import Any, get_args

import numpy as np
import psutil
import torch
from pydantic import ValidationError

from florilegium.client.agent.acceptance import check_promise, check_settings, check_work, unprotected
from florilegium.client.agent.config import CONSENTS, AgentConfig, Consent, When
from florilegium.client.agent.folder import DeviceError, DeviceFolder, HomeError, replace_file
from florilegium.client.agent.pace import doubled, rehearsed
from florilegium.client.agent.terms import Terms
from florilegium.client.agent.vault import (
    Sent,
    Turn,
    Vault,
    forget_origins,
    unsay,
    write_fact,
    write_learned,
    write_sent,
)
from florilegium.client.calibration import release_limits
from florilegium.client.config import DeviceConfig
from florilegium.client.context import CohortContext
from florilegium.client.dialogue import Dialogue, Echo
from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.config import ModelConfig
from florilegium.client.lm.layers import UnsupportedModelError
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.peft_format import peft_files, shared_files
from florilegium.client.lm.places import BASE_FOLDER, ModelError, base_hash, base_of
from florilegium.client.personalization.config import ProfileConfig
from florilegium.client.personalization.profile import Profile, ProfileError
from florilegium.client.phases import annotate, frozen_adapters, observe
from florilegium.client.private_training import resend
from florilegium.client.round import contribute, live
from florilegium.client.selection.buffer import Buffer
from florilegium.client.state import DeviceState, States
from florilegium.client.state_store import DeviceStore, StoreError
from florilegium.privacy.common.errors import UserError
from florilegium.privacy.ledger import Account, Ledger
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.release import Release, Schema
from florilegium.privacy.seeds import fresh_secret

log = logging.getLogger(__name__)
LOST = "lost"  # in place of a head that should be there
Progress = Callable[[str], None]


class AgentError(DeviceError):
    """What was asked cannot be done; the message says why and what can."""


@dataclass(frozen=True)
class Membership:
    """A federation that this device has joined, and what its owner has agreed to spend there."""

    name: str
    server: str
    rounds: int
    public_seed: int  # of the shared adapter's start, the same on all its devices
    shared: dict[str, Any]  # a `SharedConfig`, in place of the device's own while it is in
    operator: str = ""  # public half of the key that signs its questions; without one none is answered

    def settings(self, device: DeviceConfig) -> DeviceConfig:
        """The device's own, where the federation's terms do not say otherwise. Raises ValueError."""
        told = device.model_dump(mode="json") | {"rounds": self.rounds, "shared": self.shared}
        return DeviceConfig.model_validate(told)


class Agent:
    """One device while it runs. One thing at a time touches the model and the states: others wait."""

    def __init__(
        self, home: DeviceFolder, config: AgentConfig, lm: LanguageModel, key: str, *, rebasing: bool = False
    ) -> None:
        """Raises `HomeError`, `VaultError` or `AgentError` for files that do not fit.

        `rebasing`: what was learned may belong to another model; `rebase` comes next.
        """
        self.home, self.config, self.lm = home, config, lm
        self.page_token = token_urlsafe(32)  # of this process: whoever saw an older one cannot open the page
        self.page_address = ""  # with it, while there is a page
        self.vault = Vault(home.vault, key)
        self.store, self.ledger = DeviceStore(home.vault, key), Ledger(home.vault, key)
        self._busy = threading.RLock()
        self.doing = ""  # the phase that is being worked on
        self.turned_away = Counter[str]()  # what a server sent that was not answered, since the start
        known = self.vault.fact("base")
        if known is None:
            self.vault.set_fact("base", base_hash(config.device.model.name))
            self.vault.set_fact("seed", fresh_secret() >> 65)
        elif known != base_hash(config.device.model.name) and not rebasing:
            raise AgentError(
                f"what this device has learned belongs to another model than {config.device.model.name!r} is now: "
                f"set the former one in {home.settings}, or begin anew on this one: florilegium device rebase"
            )

    @classmethod
    def open(cls, home: DeviceFolder, *, rebasing: bool = False) -> Agent:
        """With the model loaded and the vault found whole; the caller holds the lock of the home."""
        config = home.check()
        key = home.read_key(config)
        Vault(home.vault, key).check()
        agent = cls(home, config, loaded(config.device.model), key, rebasing=rebasing)
        agent.finish()
        return agent

    def finish(self) -> None:
        """Ends an erasure that was stopped, by a power cut say."""
        if self.vault.fact("erasing"):
            try:
                with self._busy:
                    self._erased()
            except (DeviceError, StoreError, OSError) as error:
                log.error("an erasure could not be ended, and is tried again at the next start: %s", error)

    # -- what its owner allows ----------------------------------------------------------------------------------------

    @property
    def consents(self) -> dict[Consent, bool]:
        found = self.vault.facts([f"consent to {item}" for item in CONSENTS])
        return {item: bool(found.get(f"consent to {item}")) for item in CONSENTS}

    def consent(self, item: Consent, given: bool) -> None:
        """Gives it, or takes it back; what was sent before cannot be."""
        if item not in CONSENTS:
            raise AgentError(f"{item!r} is not something to consent to: {', '.join(CONSENTS)}")
        self.vault.set_fact(f"consent to {item}", given)

    @property
    def learns(self) -> When:
        """When the device learns by itself."""
        found: When = self.vault.fact("learns", self.config.learn)
        return found

    def learn_when(self, when: When) -> None:
        if when not in get_args(When):
            raise AgentError(f"{when!r} is not one of {', '.join(get_args(When))}")
        self.vault.set_fact("learns", when)

    # -- talking ------------------------------------------------------------------------------------------------------

    def chat(self, prompt: str, conversation: str = "", told: Progress = lambda text: None) -> Turn:
        """A reply; `told` hears it grow. Kept only where its owner has consented to learning."""
        prompt = _mended(prompt)
        self._check_length(prompt)
        if not prompt.strip():
            raise AgentError("there is nothing to reply to")
        with self._busy:
            state, context = self._state(), self.context
            received, _ = self._used()
            on = [*([] if received is None else frozen_adapters(received, [state.id], context)), self._personal(state)]
            sight = self._in_sight(conversation)
            asked = Dialogue("", prompt, "", context="\n".join(line for _, line in sight)).in_context.prompt
            said = self.lm.reply(asked, on, self.config.chat, fresh_secret() >> 65, told)
            if not self.consents["learn"]:
                return Turn(0, "", time.time(), conversation, prompt, said, None, "", None)
            causes = list(dict.fromkeys(i for i, _ in sight))
            return self.vault.add(prompt, said, conversation, self._cycle(), causes)

    def rate(self, identity: str, liked: bool | None, wanted: str = "") -> Turn:
        """👍, 👎, and what the owner would have said. Raises KeyError for a dialogue that is not there."""
        wanted = _mended(wanted)
        self._check_length(wanted)
        if not self.consents["learn"]:
            raise AgentError("what you say of it is kept to learn from, which is not consented to")
        return self.vault.rate(identity, liked, wanted.strip())

    def _check_length(self, text: str) -> None:
        if len(text) > self.config.longest:
            raise AgentError(f"{len(text):,} characters are more than the {self.config.longest:,} of `longest`")

    def _context(self, conversation: str, before: int | None = None) -> str:
        """The last turns of a conversation, a line each."""
        return "\n".join(line for _, line in self._in_sight(conversation, before))

    def _in_sight(self, conversation: str, before: int | None = None) -> list[tuple[str, str]]:
        """The lines of `_context`, each with the dialogue that it is from."""
        turns = self.config.context_turns
        if not turns or not conversation:
            return []
        values: tuple[object, ...] = (conversation, before or math.inf)
        past = self.vault.turns("WHERE conversation = ? AND number < ?", values)
        lines = [(turn.id, line) for turn in past for line in (turn.prompt, turn.wanted or turn.said) if line]
        return lines[-turns:]

    # -- learning -----------------------------------------------------------------------------------------------------

    @property
    def context(self) -> CohortContext:
        """What the phases work with; the reply of a dialogue is what its owner has said of it so far."""
        return self._site_in(self.federation)

    def _site_in(self, federation: Membership | None) -> CohortContext:
        device, seed = self.config.device, self.vault.fact("seed")
        if federation is None:
            return CohortContext.of(self.lm, device, seed, self._reply, self._tell, self.ledger)
        found = CohortContext.of(self.lm, federation.settings(device), seed, self._reply, self._tell, self.ledger)
        layout = self.lm.lora_layout(found.config.shared.adapter, public_seed=federation.public_seed)
        return replace(found, shared_layout=layout, experiment=federation.name)

    def learn(self, progress: Progress = lambda phase: None) -> dict[str, Any]:
        """Takes up what is new, selects, synthesizes, and trains the personal adapter. Returns what came of it."""
        if not self.consents["learn"]:
            raise AgentError("learning is not consented to: florilegium device consent learn yes")
        with self._busy, self._telling(progress):
            cycle = self._cycle() + 1
            turns = self.vault.take_up(cycle)
            state, context = self._refreshed(self._state()), self.context
            received, version = self._newest()
            began = time.monotonic()
            (state,), (page,) = live([state], [self._dialogues(turns)], received, RoundPlan(cycle, version), context)
            profile = self._profile_after(self.profile, turns)
            page["seconds of all"] = time.monotonic() - began

            def also(connection: Any) -> None:
                write_fact(connection, "cycle", cycle)
                write_fact(connection, "profile", profile.to_json())
                write_fact(connection, "learned", {"at": time.time(), "page": page})
                write_fact(connection, "used", version, _bytes(received))
                write_learned(connection, (k.id for k in state.annotated), cycle)

            self._save(state, also)
            self._retire(state)
            self.vault.check()
            self.vault.copy_to(self.home.good_copy)
            return page

    def due(self, now: time.struct_time, plugged: bool | None) -> bool:
        """Whether the device would learn by itself at this local time, on this supply. Needs something new."""
        if not self.consents["learn"] or not self.vault.turns("WHERE cycle IS NULL"):
            return False
        first, last = self.config.night
        if self.learns == "night":
            return first <= now.tm_hour < last if first <= last else now.tm_hour >= first or now.tm_hour < last
        return self.learns == "charging" and plugged is True

    def _gathered(self, state: DeviceState, context: CohortContext) -> DeviceState:
        """With all that has arrived, selected and asked for; trains nothing."""
        cycle = self._cycle() + 1
        turns = self.vault.take_up(cycle)
        states, _ = observe([self._refreshed(state)], [self._dialogues(turns)], RoundPlan(cycle, 0), context)
        states, _ = annotate(states, context)
        profile = self._profile_after(self.profile, turns)

        def also(connection: Any) -> None:
            write_fact(connection, "cycle", cycle)
            write_fact(connection, "profile", profile.to_json())

        self._save(states[0], also)
        return states[0]

    def _dialogues(self, turns: Iterable[Turn]) -> list[Dialogue]:
        return [
            Dialogue(t.id, t.prompt, t.reply, t.time, context=self._context(t.conversation, t.number)) for t in turns
        ]

    def _reply(self, device: str, dialogue: str) -> str:
        try:
            return self.vault.turn(dialogue).reply
        except KeyError:
            return ""

    def _refreshed(self, state: DeviceState) -> DeviceState:
        """With the replies as the owner last wrote them; what was made from others goes."""
        now = {i: reply for i in state.replies if (reply := self._reply(state.id, i))}
        same = {i for i, reply in now.items() if reply == state.replies[i]}
        return replace(
            state,
            replies=now,
            echoes=frozenset(i for i, reply in now.items() if isinstance(reply, Echo)),
            synthetic={i: made for i, made in state.synthetic.items() if i in same},
            pool_synthetic={i: made for i, made in state.pool_synthetic.items() if i in same},
        )

    def _retire(self, state: DeviceState) -> None:
        """Drops the oldest dialogues beyond what is kept, but for those that the device learns from."""
        over = self.vault.count() - self.config.keep
        if over <= 0:
            return
        used = _held(state)
        old = [t.id for t in self.vault.turns("WHERE cycle IS NOT NULL") if t.id not in used]
        self.vault.forget(old[:over])

    # -- the profile --------------------------------------------------------------------------------------------------

    @property
    def profile(self) -> Profile:
        told = self.vault.fact("profile")
        try:
            return Profile.from_json(_mended(told)) if told else Profile()
        except ProfileError:  # of an earlier version, which took more; learning notices interests anew
            return Profile()

    def edit_profile(self, text: str) -> Profile:
        """As its owner wants it; raises `ProfileError` for what is not one."""
        self._check_length(text)
        found = Profile.from_json(text)
        with self._busy:
            gone = {i.text for i in self.profile.interests} - {i.text for i in found.interests}
            removed = {*self.vault.fact("removed interests", []), *map(_hashed, gone)}
            self.vault.set_fact("removed interests", sorted(removed))
            self.vault.set_fact("profile", found.to_json())
        return found

    def _profile_after(self, profile: Profile, turns: Iterable[Turn]) -> Profile:
        for turn in turns:
            profile = profile.after(turn.prompt, turn.feedback, self._embed, ProfileConfig())
        return profile

    def _embed(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.stack([f.readings["mean"].vector for f in self.lm.embed(texts)])

    # -- what is kept -------------------------------------------------------------------------------------------------

    def kept(self) -> list[dict[str, Any]]:
        """What the device holds in its buffer and its pool, and why: scores, replies, what was made from it."""
        state = self._state()
        bins, pool = {k.id: k for k in state.buffer.bins}, dict(state.pool.slots)
        return [
            {
                "id": i,
                "prompt": bins[i].prompt if i in bins else pool[i],
                "reply": state.replies.get(i, ""),
                "in": [name for name, place in (("buffer", bins), ("pool", pool)) if i in place],
                "scores": {n: getattr(bins[i], n) for n in ("eoe", "dss", "idd")} if i in bins else {},
                "domain": bins[i].domain if i in bins else "",
                "made": [list(pair) for pair in (*state.synthetic.get(i, ()), *state.pool_synthetic.get(i, ()))],
            }
            for i in dict.fromkeys([*bins, *pool])
        ]  # fmt: skip

    def said_under(self, identities: Sequence[str]) -> list[Turn]:
        """What the model may have said of these: its replies since it learned from them, or with them in sight.

        Raises KeyError for a dialogue that is not there.
        """
        for identity in identities:
            self.vault.turn(identity)
        return self.vault.said_under(identities)

    def erase(
        self, identities: Sequence[str], progress: Progress = lambda phase: None, *, keep_replies: bool = False
    ) -> dict[str, Any]:
        """Removes dialogues, what was made from them, and what they did to the buffer, the profile and the adapter.

        With them go the model's replies that `said_under` finds, unless `keep_replies`: their words may be in them.
        What the owner wrote in those dialogues stays.

        The buffer and the profile are made anew from what remains, as if the erased had never been said; but for older
        dialogues that were dropped meanwhile, maybe in their favour. The personal adapter is trained anew from its
        start. What was sent cannot be recalled. Raises KeyError for a dialogue that is not there.
        """
        for identity in identities:
            self.vault.turn(identity)
        with self._busy, self._telling(progress):
            self._tell("forget")
            under = [] if keep_replies else self.vault.said_under(identities)

            def also(connection: Any) -> None:
                write_fact(connection, "erasing", True)
                unsay(connection, [t.id for t in under])
                forget_origins(connection, identities)

            self.vault.forget(identities, also)
            return {**self._erased(), "replies": len(under)}

    def _erased(self) -> dict[str, Any]:
        """What comes after the dialogues are gone; begun anew where it was stopped."""
        self.home.drop_copies()
        done = self._made_anew(*self._used())
        self.vault.set_fact("erasing", False)
        return done

    def rebase(self, progress: Progress = lambda phase: None) -> dict[str, Any]:
        """Makes buffer, profile and adapter anew, from the dialogues, on the model that the settings name now.

        The device leaves its federation, whose shared adapter is the other model's; what it has spent stays spent.
        """
        base = base_hash(self.config.device.model.name)

        def also(connection: Any) -> None:
            write_fact(connection, "base", base)
            write_fact(connection, "federation", None)
            _no_shared(connection)

        with self._busy, self._telling(progress):
            return self._made_anew(None, 0, also)

    def _made_anew(
        self, received: torch.Tensor | None, version: int, also: Callable[[Any], None] = lambda connection: None
    ) -> dict[str, Any]:
        """Saves the device as it would be, had it only met what is in the journal now; earlier ones go at once."""
        state = self._relived(self._state())
        trained = self.context.config.personal.epochs and state.annotated and self.consents["learn"]
        if trained:
            (state,), _ = live([state], [[]], received, RoundPlan(self._cycle(), version), self.context)
        profile = self._profile_after(Profile(), self.vault.turns("WHERE cycle IS NOT NULL"))
        removed = self.vault.fact("removed interests", [])
        profile = replace(profile, interests=tuple(i for i in profile.interests if _hashed(i.text) not in removed))

        def all_of_it(connection: Any) -> None:
            write_fact(connection, "profile", profile.to_json())
            write_learned(connection, (k.id for k in state.annotated), self._cycle())
            also(connection)

        self._save(state, all_of_it, only=True)
        self._tell("compact")
        self.vault.compact()
        self.vault.check()
        self.vault.copy_to(self.home.good_copy)
        return {
            "retrained": bool(trained),
            "dialogues": self.vault.count(),
            "cannot be recalled": len(self.releases),
        }

    def _relived(self, state: DeviceState) -> DeviceState:
        """The device if what is in the journal now were all that it ever met; its pool, secret and account stay."""
        context, cycles = self.context, dict[int, list[Turn]]()
        for turn in self.vault.turns("WHERE cycle IS NOT NULL"):
            cycles.setdefault(turn.cycle or 0, []).append(turn)
        states: States = [replace(context.new_state(state.id), secret=state.secret)]
        for cycle, turns in sorted(cycles.items()):
            states, _ = observe(states, [self._dialogues(turns)], RoundPlan(cycle, 0), context)
        left = {d.id: d for turns in cycles.values() for d in self._dialogues(turns)}
        slots = tuple((i, prompt) for i, prompt in state.pool.slots if i in left)
        same = {(k.id, k.prompt) for k in state.buffer.bins} & {(i, d.in_context.prompt) for i, d in left.items()}
        buffer: Buffer = states[0].buffer
        return self._refreshed(
            replace(
                state,
                buffer=buffer,
                pool=replace(state.pool, slots=slots),
                personal=states[0].personal,
                arrived=states[0].arrived,
                replies={i: reply for i, reply in state.replies.items() if i in left},
                synthetic={i: made for i, made in state.synthetic.items() if i in dict(same)},
                pool_synthetic={i: made for i, made in state.pool_synthetic.items() if i in dict(slots)},
                sent=None,
                asked="",
            )
        )

    # -- the federation -----------------------------------------------------------------------------------------------

    @property
    def federation(self) -> Membership | None:
        told = self.vault.fact("federation")
        return Membership(**told) if told else None

    @property
    def federating(self) -> bool:
        """Whether a server is answered: by settings that its owner has changed since joining, maybe no more."""
        protects = not unprotected(self.config.device.privacy)
        return self.federation is not None and all(self.consents.values()) and protects

    def check_terms(self, terms: Terms) -> None:
        """Raises `AgentError` for terms that do not fit this device, or that its owner has not consented to."""
        missing = [item for item, given in self.consents.items() if not given]
        if missing:
            raise AgentError(f"not consented to: {' and '.join(missing)}; florilegium device consent {missing[0]} yes")
        if why := unprotected(self.config.device.privacy):
            raise AgentError(why)
        if terms.base != self.vault.fact("base"):
            raise AgentError(
                f"the federation is for the weights {terms.base[:12]!r} of {terms.model!r}; this device has "
                f"{self.lm.name!r} with others: ask the server's operator, or florilegium device rebase"
            )
        if not terms.operator:
            raise AgentError(f"the terms of {terms.name!r} name no key of its operator: whom would this device answer?")
        there = self.federation
        if there and there.name != terms.name:
            raise AgentError(f"this device is in {there.name!r}; leave it first: florilegium device leave")
        context = self._affordable_site(terms)
        longest = release_limits(context.config, context.schema)[0]
        if terms.largest_norm_l2 and longest > terms.largest_norm_l2:
            raise AgentError(
                f"{terms.name!r} refuses releases longer than {terms.largest_norm_l2:.3g}; with its noise this "
                f"device's are up to {longest:.3g}: ask the operator for terms with a smaller --least-epsilon"
            )

    def turn_away(self, what: str) -> None:
        """Counts something that was not answered, for its owner to see."""
        self.turned_away[what] += 1

    def _affordable_site(self, terms: Terms) -> CohortContext:
        """The site under these terms.

        Raises `AgentError` for terms that cost more than a device gives, or leave too little of its promise.
        """
        try:
            check_settings(terms.shared, terms.rounds)
            context = self._site_in(_federation(terms, ""))
            check_work(context.shared_layout, context.config)
            check_promise(context.config, terms.min_devices)
        except (UserError, ValidationError) as error:
            raise AgentError(f"the terms of {terms.name!r} do not fit this device: {error}") from None
        except MemoryError:
            raise AgentError(f"the terms of {terms.name!r} need more memory than this device has") from None
        return context

    def join(self, terms: Terms, server: str) -> None:
        """Agrees to a federation's terms: from now on its server is answered. Raises as `check_terms`."""
        self.check_terms(terms)
        joined = _federation(terms, server)
        with self._busy:
            self._resize(terms.shared.pool_capacity, joined)

    def leave(self) -> None:
        """Answers no server from now on, and learns anew without the shared adapter."""
        self.vault.set_fact("federation", None)  # at once: a round that is being worked on is not sent
        with self._busy:
            self._resize(self.config.device.shared.pool_capacity, None)

    def _resize(self, capacity: int, federation: Membership | None) -> None:
        """Goes over to another federation, or to none, with as many slots in the pool as it wants."""
        state = self._state()

        def also(connection: Any) -> None:
            write_fact(connection, "federation", asdict(federation) if federation else None)
            _no_shared(connection)

        pool = state.pool if state.pool.capacity == capacity else state.pool.resized(capacity, state.secret)
        self._save(replace(state, pool=pool, sent=None, asked=""), also)

    @property
    def schema(self) -> Schema:
        return self.context.schema

    def contribute(self, names: Sequence[str], received: torch.Tensor, plan: RoundPlan) -> list[Release | None]:
        """The release of a round, stored before it is handed out; None where consent, budget or order forbid one."""
        with self._busy:
            began = time.monotonic()
            release = self._released(received, plan)
            self._keep_pace(time.monotonic() - began)
            return [release]

    def _released(self, received: torch.Tensor, plan: RoundPlan) -> Release | None:
        federation = self.federation
        if federation is None or not self.federating or not 1 <= plan.round <= federation.rounds:
            return None
        state, context, answered = self._state(), self._site_in(federation), self.vault.fact("answered rounds", {})
        rounds = answered.get(federation.name, [])  # in any order: none of them ends another
        if plan.round in rounds:
            return resend(state, received, plan, context) if plan.round == rounds[-1] else None
        before = self._gathered(self._with_spent_head(state), context)
        (state,), (release,), (page,) = contribute([before], [[]], received, plan, context)
        if release is None and not self._has_paid(state, federation.name, plan.round):
            self._note_unanswered(replace(state, sent=before.sent, asked=before.asked), plan, page)
            return None
        if state.head:
            replace_file(self.home.spent, state.head)
        if not self.federating:  # any more
            return None
        size = context.upload_bytes(state.id, plan) if release else 0
        told = Sent(
            time.time(), federation.name, plan.round, "release" if release else page.get("refusal", "no-release"),
            size, page.get("epsilon"),
        )  # fmt: skip

        def also(connection: Any) -> None:
            write_fact(connection, "answered rounds", {**answered, federation.name: [*rounds, plan.round]})
            write_sent(connection, told)

        self._save(state, also)
        self._retire(state)
        return release

    def pace(self) -> float:
        """Seconds after a question at which its answer leaves; 0 without a server. Rehearsed once for a federation."""
        if not self.federating:
            return 0.0
        known: float = self.vault.fact("pace", 0.0)
        if not known:
            with self._busy:
                known = rehearsed(self.context)
                self.vault.set_fact("pace", known)
        return known

    def _keep_pace(self, worked: float) -> None:
        """Doubles it for good where the work alone, without waiting for the owner, took longer."""
        known = self.vault.fact("pace", 0.0)
        if known and doubled(known, worked) != known:
            self.vault.set_fact("pace", doubled(known, worked))

    def _has_paid(self, state: DeviceState, federation: str, number: int) -> bool:
        account = self.ledger.account(state.id, state.genesis)
        return account is not None and any((e.experiment, e.round) == (federation, number) for e in account.entries)

    def _note_unanswered(self, state: DeviceState, plan: RoundPlan, page: dict[str, Any]) -> None:
        """A question that the ledger refuses, by a wrong head say: noted once, and the round may be asked for again."""
        federation = self.federation
        if federation is None:
            return
        told = Sent(time.time(), federation.name, plan.round, page.get("refusal", "no-release"), 0, page.get("epsilon"))
        known = {(s.federation, s.round, s.kind) for s in self.vault.sent()}

        def also(connection: Any) -> None:
            if (told.federation, told.round, told.kind) not in known:
                write_sent(connection, told)

        self._save(state, also)

    def adopt(self, names: Sequence[str], received: torch.Tensor, plan: RoundPlan) -> None:
        """Keeps the aggregated adapter for the next learning, whatever its version: one too high would end others."""
        with self._busy:
            federation = self.federation
            if federation is None or not self.federating or not 1 <= plan.version <= federation.rounds:
                return
            with self.vault.open() as connection:
                write_fact(connection, "newest", plan.version, _bytes(received))

    def _with_spent_head(self, state: DeviceState) -> DeviceState:
        """A vault that was put back from a copy lacks the head that was written beside it: it pays for nothing."""
        try:
            return replace(state, head=self.home.spent.read_text(encoding="utf-8").strip() or LOST)
        except FileNotFoundError:
            return replace(state, head=LOST) if state.head else state

    # -- what it tells its owner --------------------------------------------------------------------------------------

    @property
    def account(self) -> Account | None:
        state = self._state()
        return self.ledger.account(state.id, state.genesis)

    @property
    def releases(self) -> list[Sent]:
        return [s for s in self.vault.sent() if s.kind == "release"]

    def epsilon(self) -> float | None:
        """Spent so far of the budget; None for an account that is broken."""
        account = self.account
        return account.spent(self.config.device.privacy.budget) if account else None

    def status(self) -> dict[str, Any]:
        """For its owner's eyes; nothing of it is sent."""
        state, privacy, federation = self._state(), self.config.device.privacy, self.federation
        return {
            "device": self.config.name,
            "model": self.lm.name,
            "doing": self.doing,
            "consents": self.consents,
            "learns": self.learns,
            "learned": self.vault.fact("learned"),
            "dialogues": self.vault.count(),
            "new": len(self.vault.turns("WHERE cycle IS NULL")),
            "buffered": len(state.buffer),
            "bins": self.config.device.selection.bins,
            "pooled": len(state.pool.slots),
            "unanswered": len(_held(state) - state.replies.keys()),
            "federation": asdict(federation) if federation else None,
            "unprotected": unprotected(privacy),
            "releases": len(self.releases),
            "turned away": dict(self.turned_away),
            "pace": self.vault.fact("pace", 0.0),
            "epsilon": self.epsilon(),
            "epsilon_budget": privacy.epsilon,
            "delta": privacy.delta,
            "unit": privacy.promise.unit,
            "vault_bytes": self.home.vault.stat().st_size,
            "memory_bytes": psutil.Process().memory_info().rss,
        }

    # -- its files ----------------------------------------------------------------------------------------------------

    def _state(self) -> DeviceState:
        found = self.store.find([self.config.name])[self.config.name]
        return found[1] if found else self._new_state()

    def _new_state(self) -> DeviceState:
        state = self.context.new_state(self.config.name)
        self.store.save([state], _stage(0))  # its secret, before anything is paid for with it
        return state

    def _save(self, state: DeviceState, also: Callable[[Any], None], *, only: bool = False) -> None:
        """The device as it is now; `only`: earlier ones go at once."""
        serial = int(self.store.stages([state.id])[state.id] or 0) + 1
        self.store.save([state], _stage(serial), also=also)
        if only:
            self.store.save([state], _stage(serial + 1))

    def _cycle(self) -> int:
        return int(self.vault.fact("cycle", 0))

    @property
    def personal_row(self) -> torch.Tensor:
        """(P,) of the personal adapter."""
        return self._state().personal

    def exported(self) -> dict[str, bytes]:
        """The adapters as plain `peft` reads them, by path: the personal one, the shared one beneath it, the base.

        Of bases those alone that are bundled: others are as large as a board's memory, and can be fetched.
        """
        base, context, (shared, _) = base_of(self.lm.name), self.context, self._used()
        files = {f"personal/{n}": c for n, c in peft_files(context.personal_layout, self.personal_row, base).items()}
        if shared is not None:
            files |= shared_files(context.shared_layout, shared, base)
        if self.lm.name == "nano":
            files |= {f"{BASE_FOLDER}/{path.name}": path.read_bytes() for path in base.files}
        return files

    def _personal(self, state: DeviceState) -> Adapters:
        return self.lm.adapters(self.context.personal_layout, state.personal)

    def _used(self) -> tuple[torch.Tensor | None, int]:
        """The shared adapter (P,) beneath the personal one, and its version."""
        return _row(self.vault.fact_bytes("used")), int(self.vault.fact("used", 0))

    def _newest(self) -> tuple[torch.Tensor | None, int]:
        """The last that a server has sent."""
        return _row(self.vault.fact_bytes("newest")), int(self.vault.fact("newest", 0))

    def _tell(self, phase: str) -> None:
        self.doing = phase
        self._progress(phase)

    _progress: Progress = staticmethod(lambda phase: None)

    @contextmanager
    def _telling(self, progress: Progress) -> Iterator[None]:
        """While it lasts, `progress` hears of the phases."""
        self._progress = progress
        try:
            yield
        finally:
            self._progress, self.doing = (lambda phase: None), ""


def loaded(model: ModelConfig) -> LanguageModel:
    """Raises `HomeError` with the way out."""
    try:
        return LanguageModel.load(model)
    except (ModelError, UnsupportedModelError) as error:
        raise HomeError(str(error)) from error


def restore(home: DeviceFolder) -> None:
    """Goes back to the last good copy. Consents and the federation are not taken from it: they may be withdrawn ones.

    Raises `HomeError` and `VaultError`; the damaged file is kept beside.
    """
    key = home.read_key(home.check_copy())
    copy = Vault(home.good_copy, key)
    copy.check()
    home.set_aside()
    copy.copy_to(home.vault)
    vault = Vault(home.vault, key)
    vault.check()
    with vault.open() as connection:
        for item in CONSENTS:
            write_fact(connection, f"consent to {item}", False)
        write_fact(connection, "federation", None)
        _no_shared(connection)


def _federation(terms: Terms, server: str) -> Membership:
    return Membership(
        terms.name, server, terms.rounds, terms.seed, terms.shared.model_dump(mode="json"), terms.operator
    )


def _held(state: DeviceState) -> set[str]:
    """The dialogues in its buffer and its pool."""
    return {k.id for k in state.buffer.bins} | {i for i, _ in state.pool.slots}


def _hashed(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _mended(text: str) -> str:
    """With a "?" for half a character: a terminal can give one, an earlier version took them, nothing can write one."""
    return text.encode("utf-8", "replace").decode()


def _no_shared(connection: Any) -> None:
    """Another federation's, or none."""
    for name in ("used", "newest", "pace"):
        write_fact(connection, name, 0)


def _stage(serial: int) -> str:
    return f"{serial:012d}"


def _bytes(row: torch.Tensor | None) -> bytes:
    return b"" if row is None else row.numpy().tobytes()


def _row(stored: bytes) -> torch.Tensor | None:
    return torch.from_numpy(np.frombuffer(stored, np.float32).copy()) if stored else None
