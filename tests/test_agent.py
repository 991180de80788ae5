"""A real device: its files, its agent, its door."""

from __future__ import annotations

import io
import json
import math
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import httpx
import keyring
import numpy as np
import pytest
import torch
from conftest import Note
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from keyring.backend import KeyringBackend
from keyring.errors import KeyringLocked
from peft import AutoPeftModelForCausalLM
from scipy.stats import kstest, spearmanr
from typer.testing import CliRunner

from florilegium.client import coins, shared_training
from florilegium.client.agent import erasure, membership, memory_limits
from florilegium.client.agent.agent import Agent
from florilegium.client.agent.cli import app as device_app
from florilegium.client.agent.config import new_config
from florilegium.client.agent.conversation import said_before
from florilegium.client.agent.daemon import listening, showing
from florilegium.client.agent.device import Device, restore
from florilegium.client.agent.erasure import MadeAnew
from florilegium.client.agent.errors import AgentError, HomeError, VaultError
from florilegium.client.agent.folder import DeviceFolder
from florilegium.client.agent.membership import keep_pace
from florilegium.client.agent.owner_client import OwnerClient
from florilegium.client.agent.pace import LEAST_S, doubled
from florilegium.client.agent.signature import new_key, public_half, sealed
from florilegium.client.agent.supernode import SuperNode, answered
from florilegium.client.agent.terms import Membership, Terms
from florilegium.client.agent.vault import Turn, Vault, write_fact
from florilegium.client.calibration import release_limits, release_noise
from florilegium.client.config import SharedConfig
from florilegium.client.flower_arrays import to_record
from florilegium.client.lm.config import ModelConfig, TextLimits
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.places import base_hash
from florilegium.client.personalization.acceptance import AcceptanceConfig
from florilegium.client.personalization.profile import ProfileError
from florilegium.client.phases import synthesize_pool
from florilegium.client.shared_training import clipped_change, noisy_steps
from florilegium.client.state_store import StoreError
from florilegium.privacy.common import database
from florilegium.privacy.dpsgd import PrivateRow
from florilegium.privacy.plan import RoundPlan

SAID = (
    ("Do you like apples?", "Only the green ones from my aunt's orchard."),
    ("What shall we cook tonight?", "Pumpkin soup with ginger, as always."),
    ("How was the concert?", "Loud, but the drummer was a marvel."),
    ("Tell me about your dog.", "Bruno sleeps all day and snores."),
    ("Where do you want to travel?", "To the sea, in a slow train."),
    ("Any plans for the weekend?", "Repairing my old bicycle."),
)
OPERATOR = new_key()
TERMS = Terms(name="orchard", rounds=3, seed=1, base=base_hash("nano"), operator=public_half(OPERATOR))
SERVER = "127.0.0.1:9092"
PAGE = 4096  # bytes


@pytest.fixture
def home(tmp_path: Path) -> DeviceFolder:
    return DeviceFolder(tmp_path / "device")


def made(home: DeviceFolder, lm: LanguageModel, **changes: Any) -> Agent:
    """A new device with both consents."""
    everything = {"acceptance": AcceptanceConfig(share=0)}  # is learned, nothing held back
    config = new_config(ModelConfig(name="nano")).model_copy(update={"port": 0, **everything, **changes})
    agent = Agent(Device(home, config, lm, home.make(config)))
    agent.consent("learn", True)
    agent.consent("federate", True)
    return agent


def reopened(agent: Agent) -> Agent:
    return Agent(
        Device(
            agent.device.folder, agent.device.config, agent.device.lm, agent.device.folder.read_key(agent.device.config)
        )
    )


def told(home: DeviceFolder, *command: str) -> subprocess.CompletedProcess[str]:
    """What `florilegium device` prints, in a process of its own as its owner starts it."""
    line = [sys.executable, "-m", "florilegium", "device", *command, "--home", str(home.path)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300)


def talked(agent: Agent, said: tuple[tuple[str, str], ...] = SAID) -> list[str]:
    """Dialogues whose owner said what they would have said; their ids."""
    turns = [agent.device.vault.add(prompt, "hm", "") for prompt, _ in said]
    for turn, (_, wanted) in zip(turns, said, strict=True):
        agent.rate(turn.id, False, wanted)
    return [t.id for t in turns]


def decrypted(path: Path, key: str) -> bytes:
    """All pages of a vault, the free ones too, by its key."""
    raw, pages = path.read_bytes(), []
    for start in range(0, len(raw), PAGE):
        page = raw[start : start + PAGE]
        content = page[16 if start == 0 else 0 : PAGE - 80]
        iv = page[PAGE - 80 : PAGE - 64]
        pages.append(Cipher(algorithms.AES(bytes.fromhex(key)), modes.CBC(iv)).decryptor().update(content))
    return b"".join(pages)


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_home_is_for_its_owner_alone(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = made(home, lm)
    assert home.path.stat().st_mode & 0o777 == 0o700 and (home.path / "key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(HomeError, match="holds a device already"):
        home.make(agent.device.config)
    (home.path / "key").chmod(0o644)
    with pytest.raises(HomeError, match="chmod 600"):
        home.read_key(agent.device.config)
    (home.path / "key").unlink()
    with pytest.raises(HomeError, match="put it back"):
        home.read_key(agent.device.config)
    home.path.chmod(0o755)
    with pytest.raises(HomeError, match="chmod 700"), home.locked():
        pass


class Ring(KeyringBackend):
    """A keyring as a desktop has one, in this process' memory; locked, it gives nothing away."""

    priority = 1  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[tuple[str, str], str] = {}
        self.locked = False

    def get_password(self, service: str, username: str) -> str | None:
        if self.locked:
            raise KeyringLocked("the collection is locked")
        return self.kept.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self.kept[service, username] = password

    def delete_password(self, service: str, username: str) -> None:
        del self.kept[service, username]


def test_a_key_may_lie_in_the_keyring(home: DeviceFolder, lm: LanguageModel) -> None:
    before, ring = keyring.get_keyring(), Ring()
    keyring.set_keyring(ring)
    try:
        agent = made(home, lm, key="keyring")
        talked(agent)
        assert not (home.path / "key").exists() and len(reopened(agent).device.vault.turns()) == 6
        ring.locked = True
        with pytest.raises(HomeError, match="unlock it"):
            home.read_key(agent.device.config)
        ring.locked = False
        home.erase()
        assert ring.kept == {}
        with pytest.raises(HomeError, match="has no key"):
            home.read_key(agent.device.config)
    finally:
        keyring.set_keyring(before)


def test_a_clock_that_jumps_changes_no_order(
    home: DeviceFolder, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dialogues are taken up as they were had, rounds answered in their order, whatever year the clock shows."""
    agent, now = made(home, lm), [1.8e9]
    monkeypatch.setattr(time, "time", lambda: now[0])
    agent.join(TERMS, SERVER)
    first = talked(agent, SAID[:3])
    row = agent.device.context.shared_layout.start(0)
    before = asked(agent, 1, row)
    now[0] = 0.0  # a battery that was empty
    later = talked(agent, SAID[3:])
    agent.learn()
    assert [t.id for t in agent.device.vault.turns()] == [*first, *later] and len(agent.kept()) == 6
    assert asked(agent, 1, row)[0] == before[0]
    now[0] = 4e9
    asked(agent, 2, row, version=1)
    assert [s.round for s in agent.device.vault.releases()] == [1, 2] and [
        s.time for s in agent.device.vault.releases()
    ] == [1.8e9, 4e9]
    assert agent.account and [e.round for e in agent.account.entries] == [1, 2]
    agent.erase(first[:1])
    assert agent.device.state().arrived == 5


def test_one_agent_at_a_time(home: DeviceFolder, lm: LanguageModel) -> None:
    made(home, lm)
    code = "import sys, pathlib, florilegium.client.agent.folder as h\n"
    code += "with h.DeviceFolder(pathlib.Path(sys.argv[1])).locked(): pass"
    command = [sys.executable, "-c", code, str(home.path)]
    with home.locked():
        other = subprocess.run(command, capture_output=True, text=True)
    assert other.returncode and "an agent is running" in other.stderr
    assert subprocess.run(command).returncode == 0


def test_settings_that_are_wrong_are_told(home: DeviceFolder, lm: LanguageModel) -> None:
    made(home, lm)
    assert home.config().device.privacy.secret == "os"
    home.settings.write_text(home.settings.read_text().replace("context_turns", "context_turn"))
    with pytest.raises(HomeError, match="did you mean 'context_turns'"):
        home.config()
    with pytest.raises(HomeError, match="florilegium device init"):
        DeviceFolder(home.path / "nowhere").config()


def test_a_vault_is_encrypted_and_wants_its_key(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = made(home, lm)
    talked(agent)
    agent.learn()
    key = home.read_key(agent.device.config)
    raw, plain = home.vault.read_bytes(), decrypted(home.vault, key)
    assert b"orchard" in plain and b"orchard" not in raw and b"orchard" not in home.good_copy.read_bytes()
    with pytest.raises(VaultError, match="if the key is right"):
        Vault(home.vault, "0" * 64)
    with pytest.raises(sqlite3.DatabaseError):
        sqlite3.connect(home.vault).execute("SELECT * FROM dialogue")


def test_a_damaged_vault_is_refused_and_restored(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = made(home, lm)
    talked(agent)
    agent.learn()
    whole = agent.device.vault.turns()
    raw = bytearray(home.vault.read_bytes())
    raw[5 * PAGE + 100] ^= 1
    home.vault.write_bytes(raw)
    with pytest.raises(VaultError, match="device restore"):
        Vault(home.vault, home.read_key(agent.device.config)).check()
    home.write_config(agent.device.config)
    done = told(home, "restore", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert reopened(agent).device.vault.turns() == whole


def test_a_vault_that_is_empty_is_damaged(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = made(home, lm)
    talked(agent)
    agent.learn()
    home.vault.write_bytes(b"")
    with pytest.raises(VaultError, match="device restore"):
        Agent.open(home)
    restore(home)
    assert len(reopened(agent).device.vault.turns()) == 6


def test_restoring_is_of_the_copy_alone_and_brings_no_consent_back(home: DeviceFolder, lm: LanguageModel) -> None:
    """What SQLite left beside the damaged file is not played into the copy; what was set aside stays."""
    agent = made(home, lm)
    agent.join(TERMS, SERVER)
    talked(agent)
    agent.learn()
    before = agent.device.vault.turns()
    for number in (1, 2):
        home.vault.write_bytes(home.vault.read_bytes()[:-PAGE] + b"x" * PAGE)
        home.vault.with_name("device.db-journal").write_bytes(b"left behind" * 1000)
        restore(home)
        assert (home.path / f"device.damaged-{number}.db").exists()
    agent = reopened(agent)
    agent.device.vault.check()
    assert (
        agent.device.vault.turns() == before
        and not any(agent.device.consents.values())
        and agent.device.membership is None
    )


def test_what_is_not_the_devices_is_left_alone(home: DeviceFolder, lm: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.odt").write_text("years")
    with pytest.raises(HomeError, match="is not empty"):
        DeviceFolder(tmp_path).make(new_config(ModelConfig(name="nano")))
    made(home, lm)
    (home.path / "thesis.odt").write_text("years")
    home.settings.write_text("nonsense")
    home.erase()
    assert {p.name for p in home.path.iterdir()} <= {"thesis.odt", "agent.lock"}


# -- talking and learning ---------------------------------------------------------------------------------------------


def test_a_reply_grows_and_is_kept_with_consent_alone(home: DeviceFolder, lm: LanguageModel) -> None:
    agent, heard = made(home, lm), list[str]()
    turn = agent.chat("Do you like music?", "c", heard.append)
    assert len(heard) > 1 and heard[-1].strip() == turn.said
    assert all(later.startswith(sooner) for sooner, later in pairwise(heard))
    assert agent.device.vault.turns() == [turn]
    agent.consent("learn", False)
    assert agent.chat("And films?").id == "" and agent.device.vault.count() == 1
    with pytest.raises(AgentError, match="not consented"):
        agent.learn()
    with pytest.raises(AgentError, match="nothing to reply to"):
        agent.chat("  ")
    with pytest.raises(AgentError, match="100,000 characters"):
        agent.chat("x" * 100_000)


def test_a_conversation_is_seen_as_far_as_its_context_goes(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = made(home, lm, context_turns=2)
    for prompt, said in (("a", "b"), ("c", "d")):
        agent.device.vault.add(prompt, said, "talk")
    agent.device.vault.add("other", "talk", "elsewhere")
    assert said_before(agent.device, "talk") == "c\nd" and said_before(agent.device, "") == ""
    agent.learn()
    assert {k["prompt"] for k in agent.kept()} == {"a", "a\nb\nc", "other"}
    assert [prompt for _, prompt in agent.device.state().pool.slots] == ["a", "c", "other"]  # each in one slot alone


def test_learning_is_what_the_owner_said(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = made(home, lm)
    ids = talked(agent)
    silent = agent.device.vault.add("What is the time?", "I do not know.", "").id
    liked = agent.device.vault.add("Good night!", "Sleep well, dear.", "").id
    agent.rate(liked, True)
    phases: list[str] = []
    page = agent.learn(phases.append)
    assert phases == ["observe", "annotate", "synthesize", "learn_personal"] and agent.device.doing == ""
    kept = {k["id"]: k for k in agent.kept()}
    assert kept[ids[1]]["reply"] == SAID[1][1] and kept[liked]["reply"] == "Sleep well, dear."
    assert kept[silent]["reply"] == "" and kept[ids[0]]["scores"]["eoe"] > 0
    assert page["personal_examples"] >= 7 and page["personal_loss_last"] < page["personal_loss_first"]
    before = agent.device.state().personal.clone()
    agent.rate(silent, None, "Ten past four.")
    agent.learn()
    assert {k["id"]: k["reply"] for k in agent.kept()}[silent] == "Ten past four."
    assert not torch.equal(before, agent.device.state().personal)
    agent.rate(ids[0], False, "None at all.")
    agent.learn()
    assert {k["id"]: k["reply"] for k in agent.kept()}[ids[0]] == "None at all."


class PowerCut(BaseException):
    """Nothing after it is done."""


class Cut:
    """A connection that ends the process before one of its writes."""

    def __init__(self, connection: Any, writes: list[str], limit: int) -> None:
        self.connection, self.writes, self.limit = connection, writes, limit

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)

    def execute(self, sql: str, *values: Any) -> Any:
        if sql.split()[0] in ("INSERT", "UPDATE", "DELETE", "BEGIN", "COMMIT", "VACUUM"):
            if len(self.writes) == self.limit:
                raise PowerCut
            self.writes.append(sql)
        return self.connection.execute(sql, *values)


def with_connections(monkeypatch: pytest.MonkeyPatch, changed: Callable[[Any], Any]) -> None:
    """Every connection of the vault that is opened from now on is changed."""
    true = database._encrypted

    @contextmanager
    def opened(path: Path, key: str) -> Iterator[Any]:
        with true(path, key) as connection:
            yield changed(connection) if path.name == "device.db" else connection

    monkeypatch.setattr(database, "_encrypted", opened)


def all_after_each_cut(agent: Agent, work: Callable[[Agent], Any], monkeypatch: pytest.MonkeyPatch) -> Agent:
    """Does the work with a power cut before each of its writes in turn, the agent opened anew after each."""
    for limit in range(200):
        writes: list[str] = []
        with monkeypatch.context() as patch:
            with_connections(patch, lambda connection: Cut(connection, writes, limit))  # noqa: B023
            patch.setattr(Vault, "copy_to", lambda self, path: None)  # which needs a real connection
            try:
                work(agent)
            except PowerCut:
                agent = reopened(agent)
                agent.device.vault.check()
                continue
        assert limit > 3
        return agent
    raise AssertionError("it never ends")


def test_a_power_cut_leaves_what_was_before_or_after(
    home: DeviceFolder, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies before each write of a cycle; the next one goes on, with nothing lost or taken up twice."""
    agent = made(home, lm)
    ids = talked(agent)
    agent = all_after_each_cut(agent, lambda a: a.learn(), monkeypatch)
    assert agent.device.vault.fact("cycle", 0) == 1 and agent.device.state().arrived == 6
    assert {k["id"] for k in agent.kept()} == set(ids) and all(k["reply"] for k in agent.kept())


def test_a_power_cut_while_erasing_leaves_nothing_behind(
    home: DeviceFolder, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = made(home, lm)
    ids = talked(agent)
    agent.learn()

    def erase(again: Agent) -> None:
        erasure.finish(again.device)
        if again.device.vault.count() == len(ids):
            again.erase(ids[:2])

    agent = all_after_each_cut(agent, erase, monkeypatch)
    assert {k["id"] for k in agent.kept()} == set(ids[2:]) and agent.device.vault.count() == 4
    assert agent.device.state().arrived == 4 and agent.profile.interactions == 4
    assert SAID[0][1].encode() not in decrypted(home.vault, home.read_key(agent.device.config))


def test_a_power_cut_in_a_round_sends_nothing_twice(
    home: DeviceFolder, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = made(home, lm)
    agent.join(TERMS, SERVER)
    talked(agent)
    row, answers = agent.device.context.shared_layout.start(0), list[Any]()
    agent = all_after_each_cut(agent, lambda a: answers.append(asked(a, 1, row)), monkeypatch)
    assert [header for header, _ in answers] == [{"error": "no-release"}]  # paid for, and cut before it was kept
    assert agent.account and len(agent.account.entries) == 1 and not agent.device.vault.releases()
    header, _ = asked(agent, 2, row)
    assert "error" not in header and len(agent.account.entries) == 2


def test_a_full_disk_is_told_and_loses_nothing(
    home: DeviceFolder, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = made(home, lm)
    talked(agent)

    def full(connection: Any) -> Any:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 1}")
        return connection

    with monkeypatch.context() as patch:
        with_connections(patch, full)
        with pytest.raises(VaultError, match="make room"):
            agent.device.vault.add("x" * 30_000, "y" * 30_000, "")
        with pytest.raises((VaultError, StoreError), match="full"):
            for _ in range(20):
                agent.learn()
                agent.device.vault.add("x" * 3000, "y" * 3000, "")
    there = agent.device.vault.count()
    agent.learn()
    assert there >= 6 and agent.device.state().arrived == there


def test_dialogues_beyond_what_is_kept_go_unless_they_are_learned_from(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = made(home, lm, keep=8)
    device = agent.device.config.device.model_copy(
        update={
            "selection": agent.device.config.device.selection.model_copy(update={"bins": 2}),
            "shared": agent.device.config.device.shared.model_copy(update={"pool_capacity": 2}),
        }
    )
    agent.device.config = agent.device.config.model_copy(update={"device": device})
    for k in range(20):
        agent.device.vault.add(f"What is {k} and {k}?", "hm", "")
    agent.learn()
    assert agent.device.vault.count() == 8
    assert {k["id"] for k in agent.kept()} <= {t.id for t in agent.device.vault.turns()}
    assert len(agent.kept()) <= 4


def test_when_it_learns_by_itself(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = made(home, lm)
    night, day = (time.struct_time((2026, 1, 1, hour, *[0] * 5)) for hour in (2, 12))
    assert not agent.due(night, True)  # nothing new
    talked(agent)
    assert not agent.due(night, True)
    agent.learn_when("night")
    assert agent.due(night, None) and not agent.due(day, True)
    agent.device.config = agent.device.config.model_copy(update={"night": (22, 3)})
    assert agent.due(night, None) and not agent.due(day, True)
    agent.learn_when("charging")
    assert agent.due(day, True) and not agent.due(day, False) and not agent.due(day, None)
    agent.consent("learn", False)
    assert not agent.due(day, True)
    with pytest.raises(AgentError, match="asked, night, charging"):
        agent.learn_when("always")  # type: ignore[arg-type]


def test_an_adapter_is_bound_to_its_base(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = made(home, lm)
    agent.join(TERMS, SERVER)
    ids = talked(agent)
    agent.learn()
    learned = agent.kept()
    agent.device.vault.set_fact("base", "0" * 64)
    with pytest.raises(AgentError, match="device rebase"):
        reopened(agent)
    agent = Agent(Device(home, agent.device.config, lm, home.read_key(agent.device.config), rebasing=True))
    assert agent.rebase().retrained
    agent = reopened(agent)
    assert agent.device.membership is None and {k["id"] for k in agent.kept()} == {k["id"] for k in learned} == set(ids)
    assert not torch.equal(
        agent.device.state().personal, agent.device.context.new_state(agent.device.config.name).personal
    )


def test_a_profile_is_read_and_edited(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = made(home, lm)
    talked(agent)
    agent.learn()
    told = json.loads(agent.profile.to_json())
    assert SAID[1][0] in [i["text"] for i in told["interests"]] and told["interactions"] == 6
    told["interests"] = told["interests"][:1]
    assert len(agent.edit_profile(json.dumps(told)).interests) == 1 == len(agent.profile.interests)
    with pytest.raises(ProfileError):
        agent.edit_profile("{}")


def test_a_device_talks_on_the_shared_adapter_that_its_own_was_learned_on(
    home: DeviceFolder, lm: LanguageModel, noted: Note
) -> None:
    """A newer one waits until the device learns again; an erasure learns on the old one."""
    agent = made(home, lm)
    ids, width = talked(agent, SAID[:3]), agent.device.context.shared_layout.width
    first, second = (0.05 * torch.randn(width, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    said, learned = noted(lm, "reply"), noted(lm.engine, "finetune")

    def sent(version: int, row: torch.Tensor) -> None:
        with agent.device.vault.open() as connection:
            write_fact(connection, "newest", version, row.numpy().tobytes())

    def beneath() -> list[torch.Tensor]:
        agent.chat("Hello")
        return [adapters.rows[0] for adapters in said[-1]["adapters"]]

    assert [len(row) for row in beneath()] == [agent.device.context.personal_layout.width]  # nothing was sent yet
    sent(1, first)
    agent.learn()
    sent(2, second)
    shared, own = beneath()
    assert torch.equal(shared, first) and torch.equal(own, agent.device.state().personal)
    agent.erase(ids[:1])
    assert [torch.equal(call["frozen"][0].rows[0], first) for call in learned] == [True, True]
    talked(agent, SAID[3:4])
    agent.learn()
    assert torch.equal(learned[-1]["frozen"][0].rows[0], second) and torch.equal(beneath()[0], second)


# -- erasure ----------------------------------------------------------------------------------------------------------


def test_what_is_erased_was_never_said(home: DeviceFolder, lm: LanguageModel, tmp_path: Path) -> None:
    """Text, descendants, buffer, profile and adapter are those of a device that never had the dialogue."""
    agent = made(home, lm)
    marker = "xylophone-7731"
    talked(agent, SAID[:3])
    planted = talked(agent, ((f"Remember {marker} please", f"My secret is {marker}"),))[0]
    talked(agent, SAID[3:])
    agent.learn()
    agent.learn()
    assert marker.encode() in decrypted(home.vault, home.read_key(agent.device.config))
    erased = agent.erase([planted])
    assert erased == MadeAnew(retrained=True, dialogues=6, sent=0, replies=0)
    for path in home.path.iterdir():
        if path.is_file():
            assert marker.encode() not in path.read_bytes()
            if path.suffix == ".db":
                assert marker.encode() not in decrypted(path, home.read_key(agent.device.config)), path
    other = made(DeviceFolder(tmp_path / "other"), lm)
    other.device.vault.set_fact("seed", agent.device.vault.fact("seed", 0))
    other.device.config = other.device.config.model_copy(update={"name": agent.device.config.name})
    for turn in agent.device.vault.turns():
        with other.device.vault.open() as connection:
            connection.execute(
                "INSERT INTO dialogue (id, time, conversation, prompt, said, liked, wanted) "
                f"VALUES ({', '.join('?' * 7)})",
                (turn.id, turn.time, turn.conversation, turn.prompt, turn.said, turn.liked, turn.wanted),
            )
    other.learn()
    assert agent.profile == other.profile
    mine, never = agent.device.state(), other.device.state()
    assert [k.id for k in mine.buffer.bins] == [k.id for k in never.buffer.bins]
    assert mine.synthetic.keys() == never.synthetic.keys() and mine.arrived == never.arrived
    assert mine.synthetic != {} and marker not in str(mine)


def test_erasing_reaches_what_quoted_it(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = made(home, lm)
    first = agent.device.vault.add("My pin is 4711-zebra", "ok", "talk")
    agent.device.vault.add("And now?", "what?", "talk")
    agent.learn()
    assert "4711-zebra" in str(agent.kept())
    agent.erase([first.id])
    assert "4711-zebra" not in str(agent.kept()) and [k["prompt"] for k in agent.kept()] == ["And now?"]
    assert b"4711-zebra" not in decrypted(home.vault, home.read_key(agent.device.config))
    with pytest.raises(KeyError):
        agent.erase([first.id])


def test_erasing_reaches_what_was_made_from_what_quoted_it(home: DeviceFolder, lm: LanguageModel) -> None:
    """The second dialogue is kept with the first before it, and learned from: what was made of it quotes the first."""
    agent = made(home, lm)
    first, second = (agent.device.vault.add(said, "ok", "talk") for said in ("My pin is 4711-zebra", "And now?"))
    agent.rate(second.id, False, "Go to bed.")
    agent.learn()
    state = agent.device.state()
    planted = {second.id: (("Is the pin 4711-zebra now?", "Go to bed."),)}
    agent.device.save(replace(state, synthetic=planted), lambda _: None)
    assert "4711-zebra" in str(agent.device.state().synthetic) and second.id in {k.id for k in state.annotated}
    agent.erase([first.id])
    assert agent.device.state().replies == {second.id: "Go to bed."} and "4711-zebra" not in str(agent.device.state())
    for path in home.path.glob("*.db"):
        assert b"4711-zebra" not in decrypted(path, home.read_key(agent.device.config)), path


def parrot(home: DeviceFolder, lm: LanguageModel) -> Agent:
    """A device whose model soon says again what its owner has taught it, and always the same."""
    agent = made(home, lm)
    device = agent.device.config.device
    personal = device.personal.model_copy(update={"epochs": 40, "learning_rate": 5e-3})
    synthesis = device.synthesis.model_copy(update={"per_dialogue": 0})
    device = device.model_copy(update={"personal": personal, "synthesis": synthesis})
    chat = agent.device.config.chat.model_copy(update={"temperature": 0.0, "max_new_tokens": 24})
    agent.device.config = agent.device.config.model_copy(update={"chat": chat, "device": device})
    return agent


def taught(agent: Agent, secret: str, conversation: str = "") -> str:
    """Its owner corrects one reply; the dialogue's id."""
    turn = agent.chat("Where is the key?", conversation)
    agent.rate(turn.id, None, secret)
    agent.learn()
    return turn.id


LATER = ("Do you know where the key is?", "Where do I keep it?")


def test_what_the_model_said_is_no_users_own_word(home: DeviceFolder, lm: LanguageModel, tmp_path: Path) -> None:
    """One correction changed, the same questions and 👍 after it: of the pool that dialogue alone is another."""
    pooled, said = [], []
    for number, secret in enumerate(("It is under the blue flower pot.", "My brother has it in Lisbon.")):
        agent = parrot(DeviceFolder(tmp_path / str(number)), lm)
        taught(agent, secret)
        later = [agent.chat(question) for question in LATER]
        for turn in later:
            agent.rate(turn.id, True)
        agent.learn()
        state = reopened(agent).device.state()
        assert {state.replies[t.id] for t in later} == {t.said for t in later}  # the personal adapter learns from them
        said.append([t.said for t in later])
        pooled.append([[d.response for d in texts] for texts in shared_training._pooled(state)])
    assert said[0] != said[1]
    assert pooled == [[["It is under the blue flower pot."], [], []], [["My brother has it in Lisbon."], [], []]]


@pytest.mark.parametrize("own", ["", "hm"])
def test_a_reply_is_the_owners_own_where_its_owner_wrote_it(home: DeviceFolder, lm: LanguageModel, own: str) -> None:
    """Not where the model's is liked, or sent back as it was; a correction afterwards makes it so."""
    agent = made(home, lm)
    turn = agent.device.vault.add("Hello", "hm", "")
    agent.rate(turn.id, True, own)
    agent.learn()
    assert agent.device.state().replies == {turn.id: "hm"} and agent.device.state().own == {}
    config = agent.device.context.config
    synthetic = config.model_copy(update={"shared": config.shared.model_copy(update={"synthetic": 2})})
    [after], _ = synthesize_pool([agent.device.state()], replace(agent.device.context, config=synthetic))
    assert after.pool_synthetic == {}  # nor is anything written like it for the shared adapter
    agent.rate(turn.id, True, "Good morning.")
    agent.learn()
    assert agent.device.state().own == agent.device.state().replies == {turn.id: "Good morning."}


@pytest.mark.parametrize("liked", [True, None])
def test_what_went_through_a_reply_is_erased_with_it(home: DeviceFolder, lm: LanguageModel, liked: bool | None) -> None:
    """By what the adapter had learned, or by what stood before it: in no file, in nothing that is kept, not said."""
    agent = parrot(home, lm)
    planted = taught(agent, "It is under the blue flower pot.")
    for question in LATER:
        turn = agent.chat(question)
        agent.rate(turn.id, liked)
    agent.rate(turn.id, liked, "In the drawer.")
    agent.learn()
    assert any("flower pot" in t.said for t in agent.device.vault.turns() if t.id != planted)
    under = agent.said_under([planted])
    assert [t.prompt for t in under] == list(LATER)
    assert agent.erase([planted]).replies == 2
    assert agent.device.state().replies == {turn.id: "In the drawer."}  # what the owner wrote stays
    assert agent.said_under([turn.id]) == []
    for path in home.path.glob("*.db"):
        assert b"flower pot" not in decrypted(path, home.read_key(agent.device.config)), path
    assert (
        "flower pot" not in str(agent.device.state()) + agent.chat("Where is the key?").said + agent.chat(LATER[0]).said
    )


def test_provenance_goes_through_replies_and_is_kept_where_a_dialogue_grew_old(
    home: DeviceFolder, lm: LanguageModel
) -> None:
    agent = made(home, lm)
    first = agent.device.vault.add("a", "b", "talk")
    second = agent.chat("And then?", "talk")
    elsewhere = agent.chat("What is new?")
    third = agent.chat("And then?", "talk")  # two lines of context: the second alone
    agent.device.vault.forget([second.id])  # dropped, not erased
    assert [t.id for t in agent.said_under([first.id])] == [third.id]
    assert agent.said_under([elsewhere.id]) == []
    agent.rate(elsewhere.id, None, "Nothing.")
    agent.learn()
    fourth = agent.chat("Hello")
    assert [t.id for t in agent.said_under([elsewhere.id])] == [fourth.id]
    done = agent.erase([elsewhere.id], keep_replies=True)
    assert done.replies == 0 and agent.device.vault.turn(fourth.id).said == fourth.said


def test_an_erasure_that_cannot_end_is_tried_again(
    home: DeviceFolder, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk without room for the good copy: the device lives on, and nothing holds what was to go."""
    agent = made(home, lm)
    ids = talked(agent)
    agent.learn()

    def full(vault: Vault, path: Path) -> None:
        raise VaultError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Vault, "copy_to", full)
        with pytest.raises(VaultError):
            agent.erase(ids[:1])
        agent = reopened(agent)
        erasure.finish(agent.device)
        assert agent.chat("Hello") and not home.good_copy.exists()
    erasure.finish(agent.device)
    assert home.good_copy.exists() and SAID[0][1].encode() not in decrypted(
        home.vault, home.read_key(agent.device.config)
    )


def test_an_interest_that_its_owner_removed_stays_away(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = made(home, lm)
    ids = talked(agent)
    agent.learn()
    told = json.loads(agent.profile.to_json())
    gone = told["interests"].pop(0)["text"]
    agent.edit_profile(json.dumps(told))
    agent.erase([ids[-1]])
    assert gone not in [i.text for i in agent.profile.interests] and agent.profile.interests


def test_erasing_all_leaves_a_device_that_knows_nothing(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = made(home, lm)
    ids = talked(agent)
    agent.learn()
    agent.erase(ids)
    start = agent.device.context.new_state(agent.device.config.name).personal
    assert torch.equal(agent.device.state().personal, start) and not agent.kept() and not agent.profile.interests
    assert agent.chat("Hello").said is not None
    home.erase()
    assert not [p for p in home.path.iterdir() if p.name != "agent.lock"]


# -- the federation ---------------------------------------------------------------------------------------------------


def at_once(seconds: float) -> None:
    """Instead of waiting until an answer may leave."""


def sent(agent: Agent, kind: str, content: RecordDict) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and arrays of what the agent answers to a message of a server's."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    if set(content) == {"plan", "arrays"} and agent.device.membership:
        content = sealed(content, kind, agent.device.membership.name, OPERATOR)
    message = Message(content, dst_node_id=1, message_type=kind)
    reply = answered(message, agent, at_once).content
    arrays = reply.array_records.get("arrays", {})
    return dict(reply.config_records["header"]), {name: array.numpy() for name, array in arrays.items()}


def asked(agent: Agent, number: int, row: torch.Tensor, kind: str = "train", **more: Any) -> tuple[dict[str, Any], Any]:
    plan = ConfigRecord({"round": number, "version": number - 1, "head": "", **more})
    return sent(agent, kind, RecordDict({"plan": plan, "arrays": to_record(agent.schema.split(row.numpy()))}))


@pytest.fixture
def joined(home: DeviceFolder, lm: LanguageModel) -> tuple[Agent, torch.Tensor]:
    agent = made(home, lm)
    agent.join(TERMS, SERVER)
    talked(agent)
    return agent, agent.device.context.shared_layout.start(0)


def test_a_round_is_answered_once_and_repeated_bit_by_bit(joined: tuple[Agent, torch.Tensor]) -> None:
    agent, row = joined
    header, arrays = asked(agent, 1, row)
    assert set(header) == {"protocol", "version", "head"} and set(arrays) == {n for n, _ in agent.schema.shapes}
    again_header, again = asked(reopened(agent), 1, row)
    assert again_header == header and all(np.array_equal(arrays[n], again[n]) for n in arrays)
    spent = agent.epsilon()
    assert spent and len(agent.account.entries) == 1  # type: ignore[union-attr]
    assert asked(agent, 1, row + 1)[0] == {"error": "no-release"}  # the same round with something else
    assert asked(agent, 2, row, "evaluate")[0] == {"adopted": 1}
    header, other = asked(agent, 2, row)
    assert "error" not in header and not np.array_equal(other[next(iter(other))], arrays[next(iter(arrays))])
    assert asked(agent, 1, row)[0] == {"error": "no-release"}  # nor one before the last any more
    assert asked(agent, 4, row)[0] == {"error": "no-release"}  # more rounds than agreed to
    assert [s.kind for s in agent.device.vault.sent()] == ["release", "release"]
    assert agent.learn()["personal_examples"] and agent.device.used()[1] == 1
    assert {"personal/adapter_config.json", "shared/adapter_config.json", "base/config.json"} <= agent.exported().keys()
    more = agent.exported(gguf=True).keys() - agent.exported().keys()
    assert more == {f"gguf/{name}.gguf" for name in ("personal", "shared", "merged", "base")}


def question(agent: Agent, number: int, row: torch.Tensor) -> Message:
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    plan = ConfigRecord({"round": number, "version": number - 1, "head": ""})
    content = RecordDict({"plan": plan, "arrays": to_record(agent.schema.split(row.numpy()))})
    return Message(sealed(content, "train", "orchard", OPERATOR), dst_node_id=1, message_type="train")


def test_an_answer_leaves_at_the_pace_and_its_envelope_tells_no_time(joined: tuple[Agent, torch.Tensor]) -> None:
    agent, row = joined
    pace, waits = agent.pace(), list[float]()
    assert pace >= LEAST_S and math.log2(pace).is_integer() and agent.status()["pace"] == pace == reopened(agent).pace()
    asked = question(agent, 1, row)
    began = time.monotonic()
    reply = answered(asked, agent, waits.append)
    spent = time.monotonic() - began
    assert len(waits) == 1 and 0 <= doubled(pace, spent) - waits[0] <= spent  # the rest of it
    assert reply.metadata.created_at == asked.metadata.created_at and reply.metadata.ttl == asked.metadata.ttl
    began = time.monotonic()
    assert answered(question(agent, 2, row), agent).has_content()
    assert time.monotonic() - began >= pace
    answered(question(agent, 3, row), agent, lambda seconds: agent.consent("federate", False))
    again = answered(question(agent, 3, row), agent, at_once).content
    assert again.config_records["header"]["error"] == "no-device"  # withdrawn while it waited


def test_a_pace_that_was_too_short_for_the_work_is_doubled_for_good(
    joined: tuple[Agent, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting for the owner is not work; a phase that fails is answered no sooner."""
    agent, row = joined
    assert [doubled(0.25, s) for s in (0.0, 0.25, 0.26, 0.5, 1.1)] == [0.25, 0.25, 0.5, 0.5, 2.0]
    pace, waits = agent.pace(), list[float]()
    with monkeypatch.context() as patch:
        patch.setattr(membership, "released", lambda *_: 1 / 0)
        reply = answered(question(agent, 1, row), agent, waits.append).content
    assert reply.config_records["header"]["error"] == "failed" and waits[0] > 0
    holding, done = Event(), Event()

    def talk() -> None:
        with agent.device.busy:
            holding.set()
            done.wait(1.5 * pace)

    thread = Thread(target=talk)
    thread.start()
    holding.wait()
    answered(question(agent, 1, row), agent, waits.append)
    thread.join()
    assert waits[1] > 0 and agent.pace() == pace
    keep_pace(agent.device, 3 * pace)
    assert 4 * pace == agent.pace() == reopened(agent).pace()
    agent.leave()
    assert agent.pace() == 0
    agent.join(TERMS, SERVER)
    assert agent.pace() < 4 * pace  # of other terms, anew


def test_looking_and_paying_at_once_wait_for_each_other(joined: tuple[Agent, torch.Tensor]) -> None:
    """A thread with the vault's turn asks the ledger while another one pays."""
    agent, _ = joined
    state = agent.device.state()

    def look() -> None:
        for _ in range(20):
            with agent.device.vault.open():
                agent.device.ledger.account(state.id, state.genesis)

    def pay() -> None:
        for _ in range(20):
            agent.device.ledger.accounts([(state.id, state.genesis)])

    threads = [Thread(target=work, daemon=True) for work in (look, pay)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.slow
def test_a_rounds_seconds_do_not_tell_what_was_drawn(home: DeviceFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred rounds of half a pool of short and long dialogues; the control is the work itself."""
    lm = LanguageModel.load(ModelConfig(dtype="float32", limits=TextLimits(prompt_tokens=12, reply_tokens=12)))
    agent, rounds, drawn_tokens, work, seconds = made(home, lm), 200, list[int](), list[float](), list[float]()
    settings = SharedConfig(steps_per_round=2, pool_capacity=16, sampling_rate=0.5, adapter=TERMS.shared.adapter)
    agent.join(TERMS.model_copy(update={"rounds": rounds, "shared": settings}), SERVER)
    talked(agent, tuple((f"Number {k}? " + "and " * (k % 8), "yes " * (1 + k % 8)) for k in range(16)))
    row, gradients = agent.device.context.shared_layout.start(0), lm.engine.dp_gradients

    def noting(trained: Any, frozen: Any, batches: Any) -> Any:
        drawn_tokens[-1] += sum(e.length for batch in batches for e in batch)
        return gradients(trained, frozen, batches)

    agent.pace()
    monkeypatch.setattr(lm.engine, "dp_gradients", noting)
    for number in range(1, rounds + 1):
        drawn_tokens.append(0)
        asked, began, worked = question(agent, number, row), time.monotonic(), time.process_time()

        def leave(left: float, began: float = began, worked: float = worked) -> None:
            """Notes when the reply leaves, and does not sit the time out."""
            work.append(time.process_time() - worked)
            seconds.append(time.monotonic() - began + left)

        assert "error" not in answered(asked, agent, leave).content.config_records["header"]
    assert len(set(drawn_tokens)) > rounds / 4
    assert spearmanr(work, drawn_tokens).pvalue < 0.01  # what would be told; other work on the machine blurs it
    assert spearmanr(seconds, drawn_tokens).pvalue > 1e-4


def test_a_question_uses_up_its_own_round_and_no_other(joined: tuple[Agent, torch.Tensor]) -> None:
    """The last round first, by mistake say: those before it are still there, each once."""
    agent, row = joined
    assert "error" not in asked(agent, 3, row)[0]
    assert asked(agent, 3, row, "evaluate", version=3)[0] == {"adopted": 3}
    header, arrays = asked(agent, 1, row)
    assert "error" not in header
    again_header, again = asked(reopened(agent), 1, row)
    assert again_header == header and all(np.array_equal(arrays[n], again[n]) for n in arrays)
    assert asked(agent, 3, row)[0] == {"error": "no-release"}  # though it was asked with the same adapter
    assert asked(agent, 1, row + 1, "evaluate", version=1)[0] == {"adopted": 1}
    assert agent.device.newest()[1] == 1 and torch.equal(agent.device.newest()[0], row + 1)  # type: ignore[arg-type]
    assert "error" not in asked(agent, 2, row)[0] and asked(agent, 1, row)[0] == {"error": "no-release"}
    assert agent.account and [e.round for e in agent.account.entries] == [3, 1, 2]


def test_nothing_leaves_without_consent_budget_or_ledger(joined: tuple[Agent, torch.Tensor]) -> None:
    agent, row = joined
    agent.consent("federate", False)
    assert asked(agent, 1, row)[0] == {"error": "no-device"}
    with pytest.raises(AgentError, match="not consented"):
        agent.join(TERMS, SERVER)
    agent.consent("federate", True)
    agent.leave()
    for kind in ("train", "evaluate", "query"):
        assert asked(agent, 1, row, kind)[0] == {"error": "no-device"} and agent.device.membership is None
    agent.join(TERMS, SERVER)
    agent.consent("learn", False)
    assert asked(agent, 1, row)[0] == {"error": "no-device"} and not agent.kept()
    agent.consent("learn", True)
    agent.device.vault.copy_to(agent.device.folder.good_copy)  # before anything is paid for
    assert "error" not in asked(agent, 1, row)[0]
    agent.device.folder.good_copy.replace(agent.device.folder.vault)
    old = reopened(agent)
    assert asked(old, 1, row)[0] == {"error": "no-release"} and asked(old, 2, row)[0] == {"error": "no-release"}
    assert old.device.vault.sent()[-1].kind == "ledger-missing"


def test_a_question_with_a_wrong_head_uses_nothing_up(joined: tuple[Agent, torch.Tensor]) -> None:
    """Neither the round that it was for, nor the release of the round before, which may be asked for again."""
    agent, row = joined
    header, first = asked(agent, 1, row)
    for _ in range(3):
        assert asked(agent, 2, row, head="ab" * 32)[0] == {"error": "no-release"}
    assert [s.kind for s in agent.device.vault.sent()] == ["release", "ledger-behind"]  # told once
    again_header, again = asked(agent, 1, row)
    assert again_header == header and all(np.array_equal(first[n], again[n]) for n in first)
    assert "error" not in asked(agent, 2, row, head=header["head"])[0]
    assert agent.account and [e.round for e in agent.account.entries] == [1, 2]


def test_a_home_that_was_set_back_is_noticed_by_the_head_of_the_other_payment(
    joined: tuple[Agent, torch.Tensor], tmp_path: Path
) -> None:
    agent, row = joined
    asked(agent, 1, row)
    shutil.copytree(agent.device.folder.path, tmp_path / "old")
    header, _ = asked(agent, 2, row)
    old = Agent(
        Device(
            DeviceFolder(tmp_path / "old"),
            agent.device.config,
            agent.device.lm,
            agent.device.folder.read_key(agent.device.config),
        )
    )
    other, _ = asked(old, 2, row)
    assert other["head"] != header["head"]
    assert asked(old, 3, row, head=header["head"])[0] == {"error": "no-release"}
    assert (
        old.device.vault.sent()[-1].kind == "ledger-behind"
        and "error" not in asked(agent, 3, row, head=header["head"])[0]
    )


def test_a_budget_that_is_spent_stays_spent(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = made(home, lm)
    device = agent.device.config.device.model_copy(
        update={"privacy": agent.device.config.device.privacy.model_copy(update={"mode": "user-local", "releases": 1})}
    )
    agent.device.config = agent.device.config.model_copy(update={"device": device})
    agent.join(TERMS, SERVER)
    talked(agent)
    row = agent.device.context.shared_layout.start(0)
    assert "error" not in asked(agent, 1, row)[0]
    before = agent.device.state().personal
    assert asked(agent, 2, row)[0] == {"error": "no-release"} and agent.device.vault.sent()[-1].kind == "budget-spent"
    agent.leave()
    agent.join(TERMS.model_copy(update={"name": "another"}), "x:1")
    assert asked(agent, 1, row)[0] == {"error": "no-release"}
    assert torch.equal(before, agent.device.state().personal)


def test_a_round_is_released_once_whatever_was_joined_between(joined: tuple[Agent, torch.Tensor]) -> None:
    agent, row = joined
    assert "error" not in asked(agent, 1, row)[0]
    agent.leave()
    agent.join(TERMS.model_copy(update={"name": "another"}), SERVER)
    assert "error" not in asked(agent, 1, row)[0]
    agent.leave()
    agent.join(TERMS, SERVER)
    assert asked(agent, 1, row)[0] == {"error": "no-release"}
    assert "error" not in asked(agent, 2, row)[0]
    assert [(e.experiment, e.round) for e in agent.account.entries] == [("orchard", 1), ("another", 1), ("orchard", 2)]  # type: ignore[union-attr]


@pytest.mark.parametrize("item", ["federate", "learn", "leave"])
def test_a_round_that_is_being_worked_on_is_not_sent_after_a_no(joined: tuple[Agent, torch.Tensor], item: Any) -> None:
    agent, row = joined

    def no(phase: str) -> None:
        if phase == "learn_shared":
            agent.device.vault.set_fact("federation", None) if item == "leave" else agent.consent(item, False)

    with agent.device.working(no):
        assert asked(agent, 1, row)[0] == {"error": "no-device"}
    assert not agent.device.vault.sent() and agent.device.state().sent is None


@pytest.mark.parametrize(
    ("shared", "told"),
    [
        ({"source": "buffer"}, "use 'pool'"),
        ({"proximal": 5.0}, "shared.proximal"),
        ({"pool_capacity": 0}, "pool_capacity"),
        ({"adapter": {"rank": 4, "targets": ("nonsense",), "factors": "b"}}, "match no adapted layer"),
        ({"adapter": {"rank": 100_000, "factors": "b"}}, "above 256"),
    ],
)
def test_terms_that_do_not_fit_are_told_and_change_nothing(
    home: DeviceFolder, lm: LanguageModel, shared: dict[str, Any], told: str
) -> None:
    agent = made(home, lm)
    before = home.settings.read_text()
    terms = Terms.model_validate({**TERMS.model_dump(), "shared": {**TERMS.shared.model_dump(), **shared}})
    with pytest.raises(AgentError, match=told):
        agent.join(terms, SERVER)
    with pytest.raises(AgentError, match="other"):
        agent.join(TERMS.model_copy(update={"base": ""}), SERVER)
    assert agent.device.membership is None and home.settings.read_text() == before and agent.chat("Hello")


def test_a_pool_has_the_slots_that_a_federation_wants(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = made(home, lm)
    talked(agent)
    agent.learn()
    small = TERMS.shared.model_copy(update={"pool_capacity": 2})
    agent.join(TERMS.model_copy(update={"shared": small}), SERVER)
    assert len(agent.device.state().pool.slots) == 2 == agent.device.state().pool.capacity
    assert (
        "error" not in asked(agent, 1, agent.device.context.shared_layout.start(0))[0]
        and len(agent.device.state().pool.slots) == 2
    )
    agent.leave()
    assert agent.device.state().pool.capacity == agent.device.config.device.shared.pool_capacity


def test_only_the_supernode_that_was_started_is_listened_to(tmp_path: Path) -> None:
    with socket.socket() as foreign, subprocess.Popen(["sleep", "60"]) as sleeping:
        foreign.bind(("127.0.0.1", 0))
        foreign.listen()
        node = SuperNode(sleeping, foreign.getsockname()[1], b"", tmp_path / "log")
        assert not node.listens
        sleeping.terminate()


GARBAGE = Array("float32", (3,), "numpy.ndarray", b"garbage")
PLAN = {"round": 1, "version": 0, "head": ""}


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"plan": ConfigRecord(PLAN)}),
        RecordDict({"plan": ConfigRecord(), "arrays": ArrayRecord()}),
        RecordDict({"plan": ConfigRecord(PLAN), "arrays": ArrayRecord()}),
        RecordDict({"plan": ConfigRecord(PLAN), "arrays": to_record({"x": np.zeros(3, np.float32)})}),
        RecordDict({"plan": ConfigRecord({**PLAN, "round": b"1"}), "arrays": to_record({})}),
        RecordDict(
            {
                "plan": ConfigRecord(PLAN),
                "arrays": ArrayRecord({"x": Array("float32", (3,), "numpy.ndarray", b"garbage")}),
            }
        ),
        RecordDict({"plan": ConfigRecord(PLAN), "arrays": to_record({"x": np.zeros(40_000_000, np.float32)})}),
        RecordDict({"plan": ConfigRecord(PLAN), "more": to_record({"x": np.zeros(40_000_000, np.float32)})}),
    ],
)
def test_what_is_no_question_is_refused(joined: tuple[Agent, torch.Tensor], content: RecordDict) -> None:
    assert sent(joined[0], "train", content)[0]["error"] in ("bad-message", "failed")
    assert joined[0].account and not joined[0].account.entries


def forged(agent: Agent, content: RecordDict, kind: str = "train") -> dict[str, Any]:
    """Header of the answer to a message that is sent as it is."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    message = Message(content, dst_node_id=1, message_type=kind)
    return dict(answered(message, agent, at_once).content.config_records["header"])


def test_only_the_operators_questions_are_answered(joined: tuple[Agent, torch.Tensor]) -> None:
    """A stranger's, whatever of a true one is in it, costs nothing: not a round, not a bit of the budget."""
    agent, row = joined
    plan = ConfigRecord({"round": 1, "version": 0, "head": ""})
    arrays = to_record(agent.schema.split(row.numpy()))
    plain = RecordDict({"plan": plan, "arrays": arrays})
    true = sealed(plain, "train", "orchard", OPERATOR)
    other = to_record(agent.schema.split((row + 1).numpy()))
    strange = [
        plain,
        sealed(plain, "train", "orchard", new_key()),
        sealed(plain, "train", "meadow", OPERATOR),
        sealed(plain, "evaluate", "orchard", OPERATOR),
        RecordDict({**true, "plan": ConfigRecord({**plan, "round": 3})}),
        RecordDict({**true, "plan": ConfigRecord({**plan, "head": "0" * 64})}),
        RecordDict({**true, "arrays": other}),
        RecordDict({**true, "more": other}),
        RecordDict({**true, "seal": ConfigRecord({"seal": b"x" * 64})}),
        RecordDict({**true, "seal": ConfigRecord({"seal": "x"})}),
        RecordDict({**true, "seal": ConfigRecord()}),
        RecordDict(),
    ]
    for content in strange:
        assert forged(agent, content) == {"error": "bad-message"}
    for kind, content in (("query", true), ("query", RecordDict()), ("evaluate", true), ("train.other", true)):
        assert forged(agent, content, kind) == {"error": "bad-message"}
    assert (
        agent.account and not agent.account.entries and not agent.device.vault.sent() and agent.device.newest()[1] == 0
    )
    assert agent.status()["turned away"] == {"a question that its operator did not sign": len(strange) + 4}
    assert "error" not in forged(agent, true) and forged(agent, true) == forged(agent, true)  # the round is there


def test_terms_without_an_operator_or_with_a_bound_below_its_noise_are_not_joined(
    home: DeviceFolder, lm: LanguageModel
) -> None:
    agent = made(home, lm)
    with pytest.raises(AgentError, match="no key of its operator"):
        agent.join(TERMS.model_copy(update={"operator": ""}), SERVER)
    bound = release_limits(agent.device.context_in(Membership.of(TERMS)).config, agent.schema)[0]
    with pytest.raises(AgentError, match="refuses releases longer than"):
        agent.join(TERMS.model_copy(update={"largest_norm_l2": bound / 2}), SERVER)
    agent.join(TERMS.model_copy(update={"largest_norm_l2": 2 * bound}), SERVER)
    assert agent.device.membership and agent.device.membership.operator == public_half(OPERATOR)


def test_a_server_cannot_ask_for_more(joined: tuple[Agent, torch.Tensor]) -> None:
    agent, row = joined
    for more in ({"epsilon": 100.0}, {"noise_multiplier": 0.0}, {"round": -1}, {"round": "1e9"}, {"version": 2**40}):
        assert asked(agent, 1, row, **more)[0] == {"error": "bad-message"}
    assert asked(agent, 1, torch.full_like(row, float("nan")))[0] == {"error": "bad-message"}
    assert agent.account and not agent.account.entries


@pytest.mark.parametrize("mode", ["example-local", "user-local"])  # no other one answers a server
def test_a_release_is_noise_on_what_was_learned(
    mode: str, home: DeviceFolder, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The payload less its replay without noise, over the noise's scale: a standard normal."""
    agent = made(home, lm)
    privacy = agent.device.config.device.privacy.model_copy(update={"mode": mode})
    device = agent.device.config.device.model_copy(update={"privacy": privacy})
    agent.device.config = agent.device.config.model_copy(update={"device": device})
    agent.join(TERMS, SERVER)
    talked(agent)
    row, original = agent.device.context.shared_layout.start(0), PrivateRow.__init__
    learn = noisy_steps if mode == "example-local" else clipped_change

    def silent(self: PrivateRow, *args: Any, **settings: Any) -> None:
        original(self, *args, **{**settings, "noise_multiplier": 0.0})

    def replayed(secret: int, number: int, *, quiet: bool) -> np.ndarray:
        with monkeypatch.context() as patch:
            patch.setattr(coins, "fresh_secret", lambda: secret)  # else drawn by the system, anew each time
            if quiet:
                patch.setattr(PrivateRow, "__init__", silent)
            found = learn([agent.device.state()], row, RoundPlan(number, 0), agent.device.context)
            return found[agent.device.config.name].numpy()

    with monkeypatch.context() as patch:
        patch.setattr(coins, "fresh_secret", lambda: 7)
        _, arrays = asked(agent, 1, row)
    scale = release_noise(agent.device.context.config, 1, 0).on_device
    payload = np.concatenate([arrays[name].ravel() for name, _ in agent.schema.shapes])
    quiet = {k: replayed(k, 1, quiet=True) for k in (7, *range(5))}
    rest = [(payload - quiet[7]) / scale]
    rest += [(replayed(k, 1, quiet=False) - quiet[k]) / scale for k in range(5)]
    drawn = np.concatenate(rest)
    assert abs(rest[0].std() - 1) < 0.04 and abs(drawn.std() - 1) < 0.02 and kstest(drawn, "norm").pvalue > 1e-3
    assert quiet[1].any()  # there was something to hide


# -- the door ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def door(home: DeviceFolder, lm: LanguageModel) -> Iterator[SimpleNamespace]:
    """An agent behind its socket and its page."""
    agent = made(home, lm)
    with home.locked(), listening(agent), showing(agent, 0) as address:
        url, token = address.rstrip("/"), agent.page_token
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(home.socket)), timeout=60) as client:
            yield SimpleNamespace(agent=agent, remote=OwnerClient(client), client=client, url=url, token=token)


def test_the_socket_is_its_owners(door: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert door.agent.device.folder.socket.stat().st_mode & 0o077 == 0
    *grown, last = door.remote.stream("chat", prompt="Do you like music?", conversation="c")
    assert grown and last["done"]["said"] == grown[-1]["text"].strip()
    assert door.remote.write("rate", id=last["done"]["id"], liked=True, wanted="")["liked"] == 1
    assert [t for t in door.remote.stream("learn")][-1]["done"]["personal_examples"] >= 1
    assert door.remote.read("status")["dialogues"] == 1 and door.remote.read("kept")[0]["reply"]
    packed = zipfile.ZipFile(io.BytesIO(door.remote.export(gguf=True)))
    adapters = {"adapters/personal/adapter_model.safetensors", "adapters/gguf/personal.gguf"}
    assert adapters | {"dialogues.jsonl", "profile.json", "ledger.json"} <= set(packed.namelist())
    assert all(not Path(name).is_absolute() and ".." not in name for name in packed.namelist())
    packed.extractall(tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    model = AutoPeftModelForCausalLM.from_pretrained("adapters/personal", dtype="float32")  # without us
    assert any(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize(("answer", "left"), [("y", ["", ""]), ("n", ["Green ones, a.", "Green ones, b."])])
def test_the_command_lists_the_replies_that_may_hold_what_is_erased_and_asks(
    door: SimpleNamespace, answer: str, left: list[str]
) -> None:
    agent, (first, *_) = door.agent, talked(door.agent, SAID[:2])
    agent.learn()
    quoting = [agent.device.vault.add("Which ones?", f"Green ones, {k}.", "", after=1).id for k in "ab"]
    asked = ["erase", first, "--home", str(agent.device.folder.path)]
    done = CliRunner().invoke(device_app, asked, input=f"{answer}\n")
    assert done.exit_code == 0 and "Erase these 2 replies of the model too?" in done.output, done.output
    assert all(f"{i} Green ones, {k}." in done.output for i, k in zip(quoting, "ab", strict=True))
    assert [agent.device.vault.turn(i).said for i in quoting] == left
    with pytest.raises(KeyError):
        agent.device.vault.turn(first)


@pytest.mark.parametrize(
    ("path", "body", "status", "told"),
    [
        ("chat", b'{"prompt": "' + b"x" * 100_000 + b'"}', 200, "100,000 characters"),
        ("chat", bytes(range(128, 256)), 400, "not JSON"),
        ("chat", b"[1]", 400, "object"),
        ("chat", b"x" * 300_000, 413, "at most"),
        ("chat", b"{}", 200, "expected form"),
        ("rate", b'{"id": "nobody", "liked": true}', 404, "no such dialogue"),
        ("rate", b'{"id": "nobody", "liked": "yes"}', 400, "expected form"),
        ("erase", b'{"ids": "all"}', 200, "expected form"),
        ("consent", b'{"item": "everything", "given": true}', 400, "not something to consent to"),
        ("learns", b'{"when": "always"}', 400, "not one of"),
        ("profile", b'{"interests": 3}', 400, "not a profile"),
    ],
)
def test_bad_input_is_told_and_changes_nothing(
    door: SimpleNamespace, path: str, body: bytes, status: int, told: str
) -> None:
    before = door.remote.read("status")
    reply = door.client.post(f"http://agent/api/{path}", content=body)
    assert reply.status_code == status and told in reply.json()["error"]
    after = door.remote.read("status")
    assert {**after, "memory_bytes": 0} == {**before, "memory_bytes": 0}


def test_the_page_is_for_its_owner_alone(door: SimpleNamespace) -> None:
    page = httpx.Client(base_url=door.url)
    own = {"authorization": f"Bearer {door.token}"}
    assert page.get("/").status_code == 200 and door.token not in page.get("/").text  # there is nothing in it
    assert page.get("/api/status").status_code == 401
    for guess in ("guess", "", "Bearer", "Bearer é", f"Basic {door.token}", f"Bearer {door.token}x"):
        assert page.get("/api/status", headers={"authorization": guess.encode()}).status_code == 401
    assert page.get(f"/api/status?token={door.token}").status_code == 401
    assert (
        page.get("/api/status", headers={"cookie": f"florilegium={door.token}; token={door.token}"}).status_code == 401
    )
    answer = page.get("/api/status", headers=own)
    assert answer.json()["consents"]["learn"] and "set-cookie" not in answer.headers
    assert page.get("/api/../../key", headers=own).status_code == 404
    assert page.get("/page.py", headers=own).status_code == 404
    no = {"item": "learn", "given": False}
    for foreign in (
        {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": door.url.replace("http:", "https:")},
        {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}, {"host": "evil.example"},
        {"host": "127.0.0.1"},
    ):  # fmt: skip
        assert page.post("/api/consent", json=no, headers={**own, **foreign}).status_code == 403
        assert page.get("/", headers=foreign).status_code == 403
    assert door.agent.device.consents["learn"]


def test_every_answer_has_the_headers_that_keep_other_pages_out(door: SimpleNamespace) -> None:
    own = {"authorization": f"Bearer {door.token}"}
    with httpx.Client(base_url=door.url) as page:
        answers = [page.get("/"), page.get("/api/status"), page.get("/nothing", headers=own), page.get("/page.js"),
                   page.put("/api/consent", headers=own), page.get("/api/status", headers={"host": "x"}),
                   page.get("/api/export", headers=own)]  # fmt: skip
    assert [a.status_code for a in answers] == [200, 401, 404, 200, 405, 403, 200]
    for answer in answers:
        assert answer.headers["content-security-policy"].count("'none'") == 2 and "set-cookie" not in answer.headers
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-store"
        assert answer.headers["referrer-policy"] == "no-referrer"


def port_of(door: SimpleNamespace) -> int:
    return int(door.url.rpartition(":")[2])


def until_closed(connection: socket.socket) -> bytes:
    found = b""
    with suppress(ConnectionError):
        while part := connection.recv(65536):
            found += part
    return found


def test_idle_connections_do_not_shut_the_owner_out(door: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's, more than the page takes: the newest are refused, the owner's socket does not notice."""
    silent = [socket.create_connection(("127.0.0.1", port_of(door)), timeout=20) for _ in range(250)]
    for connection in silent[::2]:
        connection.sendall(b"GET / HTTP/1.1\r\nx: ")
    refused = sum(until_closed(connection) == b"" for connection in silent[150:])
    assert refused == 100  # at once: the first 128 are still there
    assert door.remote.read("status")["dialogues"] == 0
    door.remote.write("consent", item="federate", given=False)
    assert not door.agent.device.consents["federate"]
    assert all(until_closed(connection) == b"" for connection in silent)  # and those in time
    assert httpx.get(door.url + "/").status_code == 200
    for connection in silent:
        connection.close()


def test_a_head_without_end_is_ended(door: SimpleNamespace) -> None:
    with socket.create_connection(("127.0.0.1", port_of(door)), timeout=20) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nx: ")
        sent = 0
        with suppress(ConnectionError):
            while sent < 200_000_000:
                sent += connection.send(b"a" * 65536)
        assert sent < 50_000_000
    assert httpx.get(door.url + "/").status_code == 200


def test_what_is_no_http_writes_no_traceback(door: SimpleNamespace, capfd: pytest.CaptureFixture[str]) -> None:
    upgrade = (
        "GET / HTTP/1.1\r\nhost: {}\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
        "sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    ).format(door.url.removeprefix("http://"))
    half = "POST /api/chat HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {}\r\ncontent-length: 100\r\n\r\n{{".format(
        door.url.removeprefix("http://"), door.token
    )
    for text in (upgrade, half, "\0\0\0\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port_of(door)), timeout=20) as connection:
            connection.sendall(text.encode())
            connection.shutdown(socket.SHUT_WR)
            answered = until_closed(connection)
            assert answered.startswith(b"HTTP/1.1 200" if text is upgrade else b"HTTP/1.1 4") or not answered
    assert httpx.get(door.url + "/").status_code == 200
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat", b'{"prompt": "a", "conversation": "' + b"x" * 65 + b'"}'),
        ("chat", b'{"prompt": "a", "conversation": "<b>"}'),
        ("profile", b'{"interests": [], "interactions": Infinity}'),
        ("profile", b'{"interests": [], "interactions": 1e999}'),
        ("profile", b'{"interests": [], "interactions": -1}'),
        ("profile", b'{"interests": [], "interactions": 2147483648}'),
        ("profile", b'{"interests": [], "interactions": 1' + b"0" * 400 + b"}"),
        ("profile", b'{"interests": [{"text": "a", "feedback": NaN}], "interactions": 0}'),
        ("profile", b'{"interests": [{"text": "a", "count": 99999999999}], "interactions": 0}'),
    ],
)
def test_what_could_not_be_written_again_is_refused_before(door: SimpleNamespace, path: str, body: bytes) -> None:
    reply = door.client.post(f"http://agent/api/{path}", content=body)
    last = json.loads(reply.text.splitlines()[-1])
    assert reply.status_code in (200, 400) and "error" in last and "done" not in last
    assert door.remote.read("profile") == {"interests": [], "interactions": 0} and door.agent.device.vault.count() == 0
    assert door.remote.export()


def test_half_a_character_is_cleaned_wherever_a_text_comes_in(door: SimpleNamespace) -> None:
    door.agent.consent("learn", True)
    said = door.client.post("http://agent/api/chat", content=b'{"prompt": "\\ud83d tea?"}').text.splitlines()
    turn = json.loads(said[-1])["done"]
    assert turn["prompt"] == "? tea?" == door.agent.device.vault.turn(turn["id"]).prompt
    assert door.agent.chat("\udcff tea?").prompt == "? tea?"  # as a terminal that is not UTF-8 gives it
    assert door.agent.rate(turn["id"], False, "green \ud83d").wanted == "green ?"
    door.client.post("http://agent/api/profile", content=b'{"interests": [{"text": "\\ud800 x"}], "interactions": 0}')
    assert [i.text for i in door.agent.profile.interests] == ["? x"]
    assert door.agent.learn()["arrived"] == 2


def test_a_vault_with_half_a_surrogate_is_repaired(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = made(home, lm)
    agent.device.vault.set_fact("profile", '{"interests": [{"text": "\ud800 apples"}], "interactions": 3}')
    assert [i.text for i in agent.profile.interests] == ["? apples"] and agent.profile.interactions == 3
    agent.device.vault.set_fact("profile", '{"interests": [{"text": "apples"}], "interactions": -3}')
    assert not agent.profile.interests
    agent.edit_profile('{"interests": [{"text": "pears"}], "interactions": 3}')
    assert [i.text for i in reopened(agent).profile.interests] == ["pears"]


def test_consents_do_not_wait_for_talk(door: SimpleNamespace) -> None:
    """Sixty talks at once, of which one is answered at a time: consent is taken back meanwhile."""
    own = {"authorization": f"Bearer {door.token}"}
    over = Event()

    def talk(*_: Any, **__: Any) -> Turn:
        over.wait(60)
        raise AgentError("too late")

    door.agent.chat = talk
    talks = [Thread(target=lambda: httpx.post(f"{door.url}/api/chat", json={"prompt": "a"}, headers=own, timeout=60))
             for _ in range(50)]  # fmt: skip
    for one in talks:
        one.start()
    time.sleep(1)
    no = {"item": "learn", "given": False}
    assert httpx.post(f"{door.url}/api/consent", json=no, headers=own, timeout=20).status_code == 200
    assert not door.agent.device.consents["learn"] and all(one.is_alive() for one in talks)
    over.set()
    for one in talks:
        one.join()


def test_a_request_that_does_not_end_does_not_hold_up_a_stop(home: DeviceFolder, lm: LanguageModel) -> None:
    agent = made(home, lm)
    with home.locked(), listening(agent), showing(agent, 0) as address:
        port = int(address.rstrip("/").rpartition(":")[2])
        connection = socket.create_connection(("127.0.0.1", port), timeout=60)
        heads = f"host: 127.0.0.1:{port}\r\nauthorization: Bearer {agent.page_token}\r\ncontent-length: 100"
        connection.sendall(f"POST /api/chat HTTP/1.1\r\n{heads}\r\n\r\n{{".encode())
        over = Event()
        agent.chat = lambda *_: over.wait(60)  # type: ignore[method-assign,assignment,return-value]
        talking = Thread(target=lambda: _talk(address, agent.page_token))
        talking.start()
        time.sleep(0.5)
    assert not over.is_set() and b"200" not in until_closed(connection)[:12]  # closed, with both still under way
    over.set()
    talking.join()
    connection.close()


def _talk(address: str, token: str) -> None:
    with suppress(httpx.TransportError):
        httpx.post(f"{address}api/chat", json={"prompt": "a"}, headers={"authorization": f"Bearer {token}"}, timeout=60)


@pytest.mark.parametrize(
    ("gib", "name", "dtype", "thrifty"),
    [(16, "smollm2-135m", "auto", False), (4, "smollm2-135m", "auto", True), (1.5, "smollm2-135m", "bfloat16", True),
     (1, "nano", "auto", True)],
)  # fmt: skip
def test_a_model_is_chosen_that_fits(
    gib: float, name: str, dtype: str, thrifty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_limits, "has_weights", lambda folder: True)
    found = memory_limits.fitting(int(gib * memory_limits.GIB))
    assert (found.name, found.dtype, found.checkpointing) == (name, dtype, thrifty)
    monkeypatch.setattr(memory_limits, "has_weights", lambda folder: False)
    assert memory_limits.fitting(int(gib * memory_limits.GIB)).name == "nano"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux'")
def test_a_limit_of_memory_is_kept_to_and_told(home: DeviceFolder) -> None:
    """Too little for the model is told; with enough the settings are thrifty, and the agent learns."""
    done = told(home, "init", "--model", "nano", "--memory-limit", "200MiB", "--learn", "--no-federate")
    assert done.returncode == 2 and "memory" in done.stderr and not home.exists
    assert told(home, "init", "--memory-limit", "much").returncode == 2
    done = told(home, "init", "--model", "nano", "--memory-limit", "1GiB", "--learn", "--no-federate")
    assert done.returncode == 0, done.stdout + done.stderr
    model = home.config().device.model
    assert model.checkpointing and model.max_batch_tokens == 512 and home.config().memory_limit == 2**30
    assert told(home, "learn").returncode == 0


@pytest.mark.slow
def test_the_commands_reach_an_agent_that_runs(home: DeviceFolder) -> None:
    """The whole of it as its owner does it: a process that serves, killed and started again."""
    done = told(home, "init", "--model", "nano", "--learn", "--no-federate")
    assert done.returncode == 0, done.stdout + done.stderr
    again = told(home, "init")
    assert again.returncode == 2 and "holds a device already" in again.stderr
    for _ in range(2):
        command = [sys.executable, "-m", "florilegium", "device", "serve", "--home", str(home.path), "--port", "0"]
        serving = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert serving.stdout and "http://127.0.0.1:" in serving.stdout.readline()
        assert told(home, "chat", "Hello").returncode == 0
        assert told(home, "learn").returncode == 0
        assert "ε 0.000 of 8" in told(home, "ledger").stdout
        serving.send_signal(signal.SIGKILL)
        serving.wait()
    status = told(home, "status")  # an agent for this command alone
    assert status.returncode == 0 and "│ dialogues" in status.stdout
    file = home.path.parent / "mine.zip"
    assert (
        told(home, "export", str(file), "--gguf").returncode == 0
        and "adapters/gguf/personal.gguf" in zipfile.ZipFile(file).namelist()
    )
    assert told(home, "erase", "--yes").returncode == 0 and not home.exists
