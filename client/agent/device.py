"""A device that is open: its folder, settings, model, vault, states and ledger, and the lock for whoever works on them.

What is done with it is in functions over a `Device`: `conversation`, `learning`, `erasure`, `membership`.
"""

from __future__ import annotations

import gc
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from pydantic import ValidationError

from florilegium.client.agent.acceptance import disagreement, unprotected
from florilegium.client.agent.api_tokens import API_TOKENS
from florilegium.client.agent.config import CONSENTS, AgentConfig, Consent, When
from florilegium.client.agent.errors import AgentError, HomeError
from florilegium.client.agent.folder import DeviceFolder
from florilegium.client.agent.terms import Membership
from florilegium.client.agent.vault import Vault, write_fact
from florilegium.client.context import CohortContext
from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.config import ModelConfig
from florilegium.client.lm.layers import UnsupportedModelError
from florilegium.client.lm.llamacpp import LlamaCpp
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.places import ModelError, base_hash
from florilegium.client.lm.token_budget import return_freed_memory
from florilegium.client.state import DeviceState
from florilegium.client.state_store import DeviceStore
from florilegium.privacy.ledger import Ledger
from florilegium.privacy.seeds import fresh_secret

SESSION = "sum session"  # the fact with the session of secure aggregation that is going on
Progress = Callable[[str], None]
Write = Callable[[sqlite3.Connection], None]  # within a transaction


def silent(told: str) -> None:
    """No progress is told."""


class Device:
    """One device while it runs. One thing at a time touches the model and the states: others wait for `busy`."""

    def __init__(
        self, folder: DeviceFolder, config: AgentConfig, lm: LanguageModel, key: str, *, rebasing: bool = False
    ) -> None:
        """Raises `HomeError`, `VaultError` or `AgentError` for files that do not fit.

        `rebasing`: what was learned may belong to another model; `erasure.rebase` comes next.
        """
        self.folder, self.config, self.format = folder, config, lm.format
        self._lm: LanguageModel | None = lm
        self.server: LlamaCpp | None = None  # where replies are llama.cpp's
        self.served = ""  # a hash of the adapters that it has on
        self.vault = Vault(folder.vault, key)
        self.store, self.ledger = DeviceStore(folder.vault, key), Ledger(folder.vault, key)
        self.busy = threading.RLock()
        self.doing = ""  # the phase that is being worked on
        self._progress: Progress = silent
        base, known = base_hash(config.device.model.name), self.vault.fact("base", "")
        if not known:
            self.vault.set_fact("base", base)
            self.vault.set_fact("seed", fresh_secret() >> 65)
        elif known != base and not rebasing:
            raise AgentError(
                f"what this device has learned belongs to another model than {config.device.model.name!r} is now: "
                f"set the former one in {folder.settings}, or begin anew on this one: florilegium device rebase"
            )

    @classmethod
    def open(cls, folder: DeviceFolder, *, rebasing: bool = False) -> Device:
        """The device with its model loaded and its vault found whole; the caller holds the folder's lock."""
        config = folder.check()
        key = folder.read_key(config)
        Vault(folder.vault, key).check()
        return cls(folder, config, loaded(config.device.model), key, rebasing=rebasing)

    # -- its model ----------------------------------------------------------------------------------------------------

    @property
    def lm(self) -> LanguageModel:
        """The model in PyTorch; loaded again where it was put away."""
        if self._lm is None:
            self._lm = loaded(self.config.device.model)
        return self._lm

    @property
    def has_weights(self) -> bool:
        """Whether PyTorch's weights are in memory."""
        return self._lm is not None

    def put_away(self) -> None:
        """Gives back the memory of PyTorch's weights until they are needed."""
        self._lm = None
        gc.collect()  # modules refer to each other
        return_freed_memory()

    # -- what its owner allows ----------------------------------------------------------------------------------------

    @property
    def consents(self) -> dict[Consent, bool]:
        """What is consented to, item by item."""
        found = self.vault.facts([f"consent to {item}" for item in CONSENTS])
        return {item: bool(found.get(f"consent to {item}")) for item in CONSENTS}

    @property
    def learns(self) -> When:
        """When the device learns by itself."""
        return self.vault.fact("learns", self.config.learn)

    # -- the federation -----------------------------------------------------------------------------------------------

    @property
    def membership(self) -> Membership | None:
        """The federation that the device is in."""
        told: dict[str, object] | None = self.vault.fact("federation", None)
        try:
            return Membership.model_validate(told) if told else None
        except ValidationError as error:
            raise AgentError(
                f"the federation that this device is in has settings that are not known here "
                f"({error.error_count()} of them): florilegium device leave"
            ) from None

    @property
    def federating(self) -> bool:
        """Whether a server is answered: by settings that its owner has changed since joining, maybe no more."""
        return self.membership is not None and all(self.consents.values()) and not self.objection

    @property
    def objection(self) -> str:
        """Why these settings answer no server, or not the one that was joined; empty where they do."""
        there, config = self.membership, self.config.device
        return unprotected(config.privacy) or (disagreement(config, there.distributed) if there else "")

    # -- what the phases work with ------------------------------------------------------------------------------------

    @property
    def context(self) -> CohortContext:
        """A cohort of one; the reply of a dialogue is what its owner has said of it so far."""
        return self.context_in(self.membership)

    def context_in(self, membership: Membership | None) -> CohortContext:
        """The context under a federation's terms, or under none."""
        config, seed = self.config.device, self.vault.fact("seed", 0)
        if membership is None:
            return CohortContext.of(self.lm, config, seed, self.reply_to, self.tell, self.ledger)
        config = membership.settings(config)
        found = CohortContext.of(self.lm, config, seed, self.reply_to, self.tell, self.ledger)
        layout = self.lm.lora_layout(config.shared.adapter, public_seed=membership.public_seed)
        return replace(found, shared_layout=layout, experiment=membership.name, public_seed=membership.public_seed)

    def reply_to(self, device: str, dialogue: str) -> str:
        """What there is to learn from a dialogue; empty where it is gone, and while it is held back."""
        if self.vault.is_held(dialogue):
            return ""
        try:
            return self.vault.turn(dialogue).reply
        except KeyError:
            return ""

    def tell(self, phase: str) -> None:
        """A phase begins."""
        self.doing = phase
        self._progress(phase)

    @contextmanager
    def working(self, progress: Progress = silent) -> Iterator[None]:
        """Alone with the device while this lasts; `progress` hears of the phases."""
        with self.busy:
            self._progress = progress
            try:
                yield
            finally:
                self._progress, self.doing = silent, ""

    # -- its state ----------------------------------------------------------------------------------------------------

    def state(self) -> DeviceState:
        """The device as it was saved last, or a new one."""
        found = self.store.find([self.config.name])[self.config.name]
        return found[1] if found else self._new_state()

    def _new_state(self) -> DeviceState:
        state = self.context.new_state(self.config.name)
        self.store.save([state], _stage(0))  # its secret, before anything is paid for with it
        return state

    def save(self, state: DeviceState, also: Write, *, only: bool = False) -> None:
        """Keeps the device as it is now, and what `also` writes, at once; `only`: earlier ones go at once."""
        serial = int(self.store.stages([state.id])[state.id] or 0) + 1
        self.store.save([state], _stage(serial), also=also)
        if only:
            self.store.save([state], _stage(serial + 1))

    @property
    def cycle(self) -> int:
        """How often it has taken up what was new."""
        return self.vault.fact("cycle", 0)

    # -- its adapters -------------------------------------------------------------------------------------------------

    def personal(self, state: DeviceState) -> Adapters:
        """The personal adapter."""
        return self.lm.adapters(self.context.personal_layout, state.personal)

    def used(self) -> tuple[torch.Tensor | None, int]:
        """The shared adapter (P,) beneath the personal one, and its version."""
        return self.shared("used")

    def newest(self) -> tuple[torch.Tensor | None, int]:
        """The shared adapter (P,) that a server has sent last, and its version."""
        return self.shared("newest")

    def shared(self, name: str) -> tuple[torch.Tensor | None, int]:
        """The shared adapter (P,) that was written under a name, and its version."""
        return _row(self.vault.fact_bytes(name)), self.vault.fact(name, 0)


def write_adapter(connection: sqlite3.Connection, name: str, row: torch.Tensor | None, version: int) -> None:
    """A shared adapter (P,) as the one `used` or the `newest`, within a transaction of its caller's."""
    write_fact(connection, name, version, b"" if row is None else row.numpy().tobytes())


def forget_shared(connection: sqlite3.Connection) -> None:
    """No shared adapter, as of another federation or of none, within a transaction of its caller's."""
    for name in ("used", "newest", "pace"):
        write_fact(connection, name, 0)
    write_fact(connection, SESSION, None)  # a round that is going on goes on without this device


def loaded(model: ModelConfig) -> LanguageModel:
    """The model; raises `HomeError` with the way out."""
    try:
        return LanguageModel.load(model)
    except (ModelError, UnsupportedModelError) as error:
        raise HomeError(str(error)) from error


def restore(folder: DeviceFolder) -> None:
    """Goes back to the last good copy, but for what may have been withdrawn since.

    Consents, the federation and programs' tokens are not taken from it. Raises `HomeError` and `VaultError`; the
    damaged file is kept beside.
    """
    key = folder.read_key(folder.check_copy())
    copy = Vault(folder.good_copy, key)
    copy.check()
    folder.set_aside()
    copy.copy_to(folder.vault)
    vault = Vault(folder.vault, key)
    vault.check()
    with vault.open() as connection:
        for item in CONSENTS:
            write_fact(connection, f"consent to {item}", False)
        write_fact(connection, "federation", None)
        write_fact(connection, API_TOKENS, {})
        forget_shared(connection)


def _stage(serial: int) -> str:
    return f"{serial:012d}"


def _row(stored: bytes) -> torch.Tensor | None:
    return torch.from_numpy(np.frombuffer(stored, np.float32).copy()) if stored else None
