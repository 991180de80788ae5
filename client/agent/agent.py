"""A real device: a cohort of one that talks with its owner, learns when it may, and answers a server if it has one.

What a simulation composes round after round happens here when it is time: dialogues arrive as they are had, their
owner answers for them days later or never, learning is a night's work, a release is made when a server asks. All of it
is the code of `client.round`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from secrets import token_urlsafe
from typing import get_args

import psutil
import torch

from florilegium.client.agent import conversation, erasure, generation, learning, membership, trial
from florilegium.client.agent.api_tokens import ApiTokens
from florilegium.client.agent.config import CONSENTS, Consent, When
from florilegium.client.agent.device import Device, Progress, silent
from florilegium.client.agent.erasure import MadeAnew
from florilegium.client.agent.errors import AgentError
from florilegium.client.agent.folder import DeviceFolder
from florilegium.client.agent.gguf_export import gguf_files
from florilegium.client.agent.registration import Registration, public_identity
from florilegium.client.agent.terms import Terms
from florilegium.client.agent.vault import Turn
from florilegium.client.agent.vault_sessions import VaultSessions
from florilegium.client.lm.config import SamplingConfig
from florilegium.client.lm.peft_format import peft_files, shared_files
from florilegium.client.lm.places import BASE_FOLDER, base_of
from florilegium.client.personalization.profile import Profile
from florilegium.client.secure_sessions import Sessions
from florilegium.privacy.ledger import Account
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.release import Schema
from florilegium.privacy.secure_aggregation.part import Sendable


class Agent:
    """What the owner's commands, the page and a server may ask of an open device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.page_token = token_urlsafe(32)  # of this process: whoever saw an older one cannot open the page
        self.page_address = ""  # with it, while there is a page
        self.tokens = ApiTokens(device.vault)  # of programs that may use the endpoint
        self.turned_away = Counter[str]()  # what a server sent that was not answered, since the start

    @classmethod
    def open(cls, folder: DeviceFolder, *, rebasing: bool = False) -> Agent:
        """The agent of a folder whose lock the caller holds; ends an erasure that was stopped. Raises as `Device`."""
        device = Device.open(folder, rebasing=rebasing)
        erasure.finish(device)
        return cls(device)

    # -- what its owner decides ---------------------------------------------------------------------------------------

    def consent(self, item: Consent, given: bool) -> None:
        """Gives a consent, or takes it back; what was sent before cannot be."""
        if item not in CONSENTS:
            raise AgentError(f"{item!r} is not something to consent to: {', '.join(CONSENTS)}")
        self.device.vault.set_fact(f"consent to {item}", given)

    def learn_when(self, when: When) -> None:
        """Sets when the device learns by itself."""
        if when not in get_args(When):
            raise AgentError(f"{when!r} is not one of {', '.join(get_args(When))}")
        self.device.vault.set_fact("learns", when)

    def chat(
        self,
        prompt: str,
        conversation_id: str = "",
        told: Progress = silent,
        *,
        before: Sequence[str] | None = None,
        causes: Sequence[str] = (),
        temporary: bool = False,
        sampling: SamplingConfig | None = None,
        seed: int | None = None,
        recalls: Callable[[list[Turn]], None] = lambda turns: None,
    ) -> Turn:
        """A reply; see `conversation.chat`."""
        return conversation.chat(
            self.device, prompt, conversation_id, told, before=before, causes=causes, temporary=temporary,
            sampling=sampling, seed=seed, recalls=recalls,
        )  # fmt: skip

    def rate(self, identity: str, liked: bool | None, wanted: str = "") -> Turn:
        """What the owner thinks of a reply; see `conversation.rate`."""
        return conversation.rate(self.device, identity, liked, wanted)

    def learn(self, progress: Progress = silent) -> dict[str, object]:
        """Learns from what is new; see `learning.learn`."""
        with generation.settled(self.device):
            return learning.learn(self.device, progress)

    def trials(self) -> dict[str, object]:
        """What came of each learning's trial; see `trial.history`."""
        return trial.history(self.device)

    def go_back(self) -> None:
        """Takes the last learning back; see `trial.go_back`."""
        with generation.settled(self.device):
            trial.go_back(self.device)

    def due(self, now: time.struct_time, plugged: bool | None) -> bool:
        """Whether it is time to learn; see `learning.due`."""
        return learning.due(self.device, now, plugged)

    @property
    def profile(self) -> Profile:
        """The owner's interests, as far as they are known."""
        return learning.profile_of(self.device)

    def edit_profile(self, text: str) -> Profile:
        """The profile as its owner wants it; see `learning.edit_profile`."""
        return learning.edit_profile(self.device, text)

    def said_under(self, identities: Sequence[str]) -> list[Turn]:
        """What the model may have said of these dialogues; see `erasure.said_under`."""
        return erasure.said_under(self.device, identities)

    def erase(self, identities: Sequence[str], progress: Progress = silent, *, keep_replies: bool = False) -> MadeAnew:
        """Removes dialogues and what they did to the device; see `erasure.erase`."""
        with generation.settled(self.device):
            return erasure.erase(self.device, identities, progress, keep_replies=keep_replies)

    def rebase(self, progress: Progress = silent) -> MadeAnew:
        """Begins anew on the model that the settings name; see `erasure.rebase`."""
        return erasure.rebase(self.device, progress)

    # -- its federation -----------------------------------------------------------------------------------------------

    def identity(self, terms: Terms) -> str:
        """What a registrar signs of this device for a federation: a public key, in hexadecimal digits."""
        return public_identity(self.device.vault, terms.federation)

    def check_terms(self, terms: Terms, registration: Registration | None = None) -> None:
        """Raises `AgentError` for terms that do not fit; see `membership.check_terms`."""
        membership.check_terms(self.device, terms, registration)

    def join(self, terms: Terms, server: str, registration: Registration | None = None) -> None:
        """Agrees to a federation's terms; see `membership.join`."""
        membership.join(self.device, terms, server, registration)

    def leave(self) -> None:
        """Answers no server from now on; see `membership.leave`."""
        membership.leave(self.device)

    def settle(self) -> None:
        """Between two things to do; see `generation.settle`."""
        generation.settle(self.device)

    def close(self) -> None:
        """Ends what writes its replies; see `generation.close`."""
        generation.close(self.device)

    def turn_away(self, what: str) -> None:
        """Counts something that was not answered, for its owner to see."""
        self.turned_away[what] += 1

    def pace(self) -> float:
        """Seconds after a question at which its answer leaves; see `membership.pace_of`."""
        return membership.pace_of(self.device)

    @property
    def schema(self) -> Schema:
        """The form of a release."""
        return self.device.context.schema

    @property
    def sessions(self) -> Sessions | None:
        """Those of secure aggregation, in a federation that has sums."""
        there = self.device.membership
        return VaultSessions(self.device) if there and there.distributed else None

    def contribute(self, names: Sequence[str], received: torch.Tensor, plan: RoundPlan) -> list[Sendable | None]:
        """The release of a round, of the one device there is; see `membership.contribution`."""
        return [membership.contribution(self.device, received, plan)]

    def adopt(self, names: Sequence[str], received: torch.Tensor, plan: RoundPlan) -> None:
        """Keeps the aggregated adapter; see `membership.adopt`."""
        membership.adopt(self.device, received, plan)

    # -- what it tells its owner --------------------------------------------------------------------------------------

    @property
    def account(self) -> Account | None:
        """What the device has spent; None for an account that is broken."""
        state = self.device.state()
        return self.device.ledger.account(state.id, state.genesis)

    def epsilon(self) -> float | None:
        """Spent so far of the budget; None for an account that is broken."""
        account = self.account
        return account.spent(self.device.config.device.privacy.budget) if account else None

    def status(self) -> dict[str, object]:
        """For its owner's eyes; nothing of it is sent."""
        device, state, there = self.device, self.device.state(), self.device.membership
        config, vault, privacy = device.config, device.vault, device.config.device.privacy
        return {
            "device": config.name,
            "model": config.device.model.name,
            "doing": device.doing,
            "consents": device.consents,
            "learns": device.learns,
            "learned": vault.fact("learned", None),
            "dialogues": vault.count(),
            "new": len(vault.turns("WHERE cycle IS NULL")),
            "buffered": len(state.buffer),
            "bins": config.device.selection.bins,
            "pooled": len(state.pool.slots),
            "unanswered": len(learning.held(state) - state.replies.keys() - vault.held()),
            "held_back": trial.held_replies(device),
            "federation": there.model_dump(mode="json") if there else None,
            "unprotected": device.objection,
            "releases": len(vault.releases()),
            "turned away": dict(self.turned_away),
            "pace": vault.fact("pace", 0.0),
            "epsilon": self.epsilon(),
            "epsilon_budget": privacy.epsilon,
            "delta": privacy.delta,
            "unit": privacy.promise.unit,
            "vault_bytes": device.folder.vault.stat().st_size,
            "memory_bytes": psutil.Process().memory_info().rss,
        }

    def kept(self) -> list[dict[str, object]]:
        """What the device holds in its buffer and its pool, and why: scores, replies, what was made from it."""
        state = self.device.state()
        bins, pool = {k.id: k for k in state.buffer.bins}, dict(state.pool.slots)
        held = self.device.vault.held()
        return [
            {
                "id": i,
                "prompt": bins[i].prompt if i in bins else pool[i],
                "reply": state.replies.get(i, ""),
                "held_back": i in held,
                "in": [name for name, place in (("buffer", bins), ("pool", pool)) if i in place],
                "scores": {n: getattr(bins[i], n) for n in ("eoe", "dss", "idd")} if i in bins else {},
                "domain": bins[i].domain if i in bins else "",
                "made": [list(pair) for pair in (*state.synthetic.get(i, ()), *state.pool_synthetic.get(i, ()))],
            }
            for i in dict.fromkeys([*bins, *pool])
        ]  # fmt: skip

    def exported(self, *, gguf: bool = False) -> dict[str, bytes]:
        """The adapters as plain `peft` reads them, by path: the personal one, the shared one beneath it, the base.

        Of bases those alone that are bundled: others are as large as a board's memory, and can be fetched. With `gguf`
        all of it as llama.cpp reads it too; raises `AdapterFormatError` for adapters that it does not know.
        """
        lm, context, row = self.device.lm, self.device.context, self.device.state().personal
        base, (shared, _) = base_of(lm.name), self.device.used()
        files = {f"personal/{n}": c for n, c in peft_files(context.personal_layout, row, base).items()}
        if shared is not None:
            files |= shared_files(context.shared_layout, shared, base)
        if lm.name == "nano":
            files |= {f"{BASE_FOLDER}/{path.name}": path.read_bytes() for path in base.files}
        return files | (gguf_files(self.device) if gguf else {})
