"""Whether what was learned is kept: each new adapter is tried on replies that were held back, and can be taken back.

A coin for each dialogue holds the owner's reply back for a few learnings: it is not asked for meanwhile, so that no
adapter learns it, and no other dialogue is learned with it in sight. What is tried is all that changes with a learning,
the personal adapter and the shared one beneath it, which has been tried by itself (`shared_trial`). Nothing is held
back of what comes before the first learning. The adapter before the last one that was kept is there to go back to.
Which prompts are shown does not depend on how they came out.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from florilegium.client.agent.conversation import said_before, with_lines
from florilegium.client.agent.device import Device, write_adapter
from florilegium.client.agent.errors import AgentError
from florilegium.client.agent.vault import HELD_BACK, Turn, write_fact
from florilegium.client.dialogue import Dialogue, Echo
from florilegium.client.lm.adapter import Adapters
from florilegium.client.personalization.acceptance import Verdict, is_held_back, judged
from florilegium.client.phases import frozen_adapters
from florilegium.client.state import DeviceState

MOST_REPLIES, SHOWN = 32, 3  # that a trial looks at, that it shows
KEPT, TAKEN_BACK, UNTRIED, UNDONE = "kept", "taken back", "untried", "undone by its owner"
PERSONAL_BEFORE, SHARED_BEFORE, LEARNINGS = "personal before", "used before", "learnings"
SHARED_TRIALS = "shared trials"  # of server's adapters


@dataclass(frozen=True)
class Learned:
    """What a device talks with: a shared adapter (P,), if any, its version, and the personal one (P',)."""

    shared: torch.Tensor | None
    version: int
    personal: torch.Tensor


@dataclass(frozen=True)
class Shown:
    """One held-back reply before and after a learning; likelihoods in nats a token, lower is likelier."""

    dialogue: str
    said_before: str
    said_after: str
    nll_before: float
    nll_after: float


@dataclass(frozen=True)
class Trial:
    """A learning's trial."""

    verdict: Verdict
    shown: tuple[Shown, ...]

    @property
    def decision(self) -> str:
        if not self.verdict.accepted:
            return TAKEN_BACK
        return KEPT if np.isfinite(self.verdict.error) else UNTRIED

    def told(self) -> dict[str, object]:
        """Its figures, as JSON has them."""
        v = self.verdict
        return {"decision": self.decision, "replies": v.replies, "before": finite(v.before), "after": finite(v.after)}


def finite(number: float) -> float | None:
    """As JSON and SQL have it: nothing in place of what is no number."""
    return number if np.isfinite(number) else None


def hold_back(device: Device, turns: Sequence[Turn]) -> None:
    """Holds back those of the dialogues that have just been taken up whose coin says so; again, the same ones."""
    rules, learnings = device.config.acceptance, device.vault.fact(LEARNINGS, 0)
    seed = device.vault.fact("seed", 0)
    held = [t.id for t in turns if learnings and is_held_back(seed, t.id, rules.share)]
    if held:
        with device.vault.open() as connection:
            until = learnings + rules.learnings
            connection.executemany("INSERT OR IGNORE INTO held VALUES (?, ?)", [(i, until) for i in held])


def try_out(device: Device, before: Learned, after: Learned) -> Trial:
    """The trial of what was learned, on the newest held-back replies in their owner's own words."""
    turns = held_back_turns(device)[-MOST_REPLIES:]
    if not turns:
        return Trial(judged([], [], device.config.acceptance.risk), ())
    device.tell("try")
    first, second = (nll_of(device, turns, adapters_of(device, learned)) for learned in (before, after))
    shown = turns[-SHOWN:]
    said = [_said(device, shown, adapters_of(device, learned)) for learned in (before, after)]
    figures = zip(shown, *said, first[-SHOWN:], second[-SHOWN:], strict=True)
    found = tuple(Shown(turn.id, *rest) for turn, *rest in figures)
    return Trial(judged(first, second, device.config.acceptance.risk), found)


def held_replies(device: Device) -> int:
    """How many replies of the owner's are held back now."""
    return len(held_back_turns(device))


def held_back_turns(device: Device) -> list[Turn]:
    """What is held back, in its owner's own words, oldest first."""
    return answered_turns(device, f"WHERE id IN ({HELD_BACK})")


def answered_turns(device: Device, which: str = "") -> list[Turn]:
    """What has a reply in its owner's own words, oldest first."""
    return [t for t in device.vault.turns(which) if t.reply and not isinstance(t.reply, Echo)]


def adapters_of(device: Device, learned: Learned) -> list[Adapters]:
    """The shared adapter, if any, and the personal one over it."""
    context = device.context
    shared = [] if learned.shared is None else frozen_adapters(learned.shared, [device.config.name], context)
    return [*shared, device.lm.adapters(context.personal_layout, learned.personal)]


def _asked(device: Device, turn: Turn) -> str:
    """A prompt as it was asked, with what was said before it."""
    return with_lines(turn.prompt, [line for line in [said_before(device, turn.conversation, turn.number)] if line])


def nll_of(device: Device, turns: Sequence[Turn], on: Sequence[Adapters]) -> list[float]:
    """Nats a token of each reply."""
    examples = device.lm.format.dialogues([Dialogue(t.id, _asked(device, t), t.reply) for t in turns])
    return [score.nll / score.tokens for score in device.lm.score(examples, [0] * len(turns), on)]


def _said(device: Device, turns: Sequence[Turn], on: Sequence[Adapters]) -> list[str]:
    """The likeliest replies of the model."""
    sampling = device.config.chat.model_copy(update={"temperature": 0.0})
    prompts = [_asked(device, t) for t in turns]
    return device.lm.generate(prompts, [0] * len(turns), on, sampling, [0] * len(turns))


# -- what is written of it --------------------------------------------------------------------------------------------


def write_trial(connection: sqlite3.Connection, trial: Trial, cycle: int, before: Learned) -> None:
    """Notes a trial, and where it was kept the adapters before it, within a transaction of its caller's."""
    v = trial.verdict
    number = connection.execute(
        "INSERT INTO trial (time, cycle, replies, before, after, error, decision) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (time.time(), cycle, v.replies, *map(finite, (v.before, v.after, v.error)), trial.decision),
    ).lastrowid
    connection.execute("DELETE FROM shown")
    rows = [(number, *asdict(s).values()) for s in trial.shown]
    connection.executemany("INSERT INTO shown VALUES (?, ?, ?, ?, ?, ?)", rows)
    if v.accepted:
        write_fact(connection, PERSONAL_BEFORE, cycle, before.personal.numpy().tobytes())
        write_adapter(connection, SHARED_BEFORE, before.shared, before.version)


def forget_trials(connection: sqlite3.Connection, *, figures: bool = False) -> None:
    """Forgets what models said in trials and the adapters before, within a transaction of its caller's.

    `figures`: the numbers too, which are another model's.
    """
    connection.execute("DELETE FROM shown")
    for name in (PERSONAL_BEFORE, SHARED_BEFORE):
        write_fact(connection, name, 0)
    if figures:
        connection.execute("DELETE FROM trial")
        write_fact(connection, SHARED_TRIALS, [])


def can_go_back(device: Device) -> bool:
    """Whether the adapter before is still there."""
    return bool(device.vault.fact_bytes(PERSONAL_BEFORE))


def go_back(device: Device) -> None:
    """Takes the last learning that was kept back: the adapters before it are used. Raises `AgentError` without any."""
    with device.busy:
        state, stored = device.state(), device.vault.fact_bytes(PERSONAL_BEFORE)
        row = torch.from_numpy(np.frombuffer(stored, np.float32).copy())
        if not stored:
            raise AgentError("there is no adapter to go back to: one is kept of the learning before the last")
        if row.shape != state.personal.shape:
            raise AgentError("the adapter before has another form than the settings want now")
        shared, version = device.shared(SHARED_BEFORE)

        def also(connection: sqlite3.Connection) -> None:
            write_adapter(connection, "used", shared, version)
            forget_trials(connection)
            connection.execute(
                "UPDATE trial SET decision = ? WHERE number = (SELECT max(number) FROM trial WHERE decision IN (?, ?))",
                (UNDONE, KEPT, UNTRIED),
            )

        device.save(replace(state, personal=row), also)


def history(device: Device) -> dict[str, object]:
    """All trials, oldest first, those of servers' adapters too, and what the last learning's showed.

    That is the prompt, the owner's reply, the model's before and after. As JSON has it, for the owner's eyes.
    """
    with device.vault.open() as connection:
        names = ("number", "time", "cycle", "replies", "before", "after", "error", "decision")
        trials = connection.execute(f"SELECT {', '.join(names)} FROM trial ORDER BY number").fetchall()
        shown = connection.execute(
            "SELECT prompt, wanted, said_before, said_after, nll_before, nll_after FROM shown "
            "JOIN dialogue ON dialogue.id = shown.dialogue ORDER BY dialogue.number"
        ).fetchall()
    parts = ("prompt", "wanted", "said_before", "said_after", "nll_before", "nll_after")
    return {
        "trials": [dict(zip(names, row, strict=True)) for row in trials],
        "shown": [dict(zip(parts, row, strict=True)) for row in shown],
        "shared": device.vault.fact(SHARED_TRIALS, []),
        "held_back": held_replies(device),
        "can_go_back": can_go_back(device),
    }


def learned_now(device: Device, state: DeviceState) -> Learned:
    """What the device talks with now."""
    return Learned(*device.used(), state.personal)
