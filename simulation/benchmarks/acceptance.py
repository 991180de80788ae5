"""`florilegium bench acceptance`: what testing each update of a personal adapter saves and costs real people.

People learn cycle after cycle with the settings of a real device. A share of their replies is held back by a coin, and
an update that fails on these is taken back. Whether it truly was better or worse is read off later replies, which
nothing learns from and no test sees. Troubles: `none`; `hot`, a learning rate ten times as high; `guest`, in two cycles
the replies are somebody else's; `server`, from the third cycle on a shared adapter of noise lies beneath. Not covered:
synthetic dialogues, and a person's own choice to go back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.table import Table

from florilegium.client.agent.config import new_config
from florilegium.client.context import CohortContext
from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.config import ModelConfig
from florilegium.client.lm.model import LanguageModel
from florilegium.client.personalization.acceptance import AcceptanceConfig, Verdict, is_held_back, judged
from florilegium.client.round import learn_alone
from florilegium.client.state import DeviceState
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.seeds import derive_seed
from florilegium.simulation.benchmarks.engine import machine
from florilegium.simulation.data.population import DataConfig, Split, User, load_population
from florilegium.simulation.evaluation.metrics import interval

CYCLES, GUESTS, SERVER_FROM = 6, (2, 4), 2
HOTTER, NOISE = 10.0, 0.05
NEVER = 0.0  # a risk at which nothing is ever taken back


@dataclass(frozen=True)
class Arm:
    """How updates are dealt with; nothing is held back at a share of 0."""

    share: float
    risk: float = NEVER

    @property
    def name(self) -> str:
        if not self.share:
            return "all learned, no test"
        return f"{self.share:g} held back, " + (f"risk {self.risk:g}" if self.risk else "all kept")


@dataclass(frozen=True)
class Measured:
    """One arm under one trouble: counts are of updates of all people, after the first."""

    trouble: str
    arm: str
    people: int
    updates: int
    worse: int  # on later replies
    saved: int  # of the worse, taken back
    better: int
    cost: int  # of the better, taken back
    nll: float  # of later replies at the end, nats a token, mean over people
    gain: float  # nll less that of "all learned, no test", paired by person
    interval: tuple[float, float]


@dataclass(frozen=True)
class Outcome:
    """All rows, and what they are of."""

    data: str
    split: str
    rows: list[Measured]


def measure(
    name: str, split: Split, people: int, shares: Sequence[float], risks: Sequence[float], troubles: Sequence[str],
    seed: int, tell: Callable[[str], object],
) -> Outcome:  # fmt: skip
    """Each arm under each trouble, with the same people, coins and orders."""
    data = DataConfig(name=name, split=split, users=people, min_pairs=80, max_pairs=120, queries_per_user=30)
    lm, users = LanguageModel.load(ModelConfig(name="nano")), load_population(data, seed)
    arms = [Arm(0.0), *(Arm(share, risk) for share in shares for risk in (NEVER, *risks))]
    rows = []
    for trouble in troubles:
        plain: list[float] = []
        for arm in arms:
            tell(f"{trouble}: {arm.name}")
            life = Life(lm, users, arm, trouble, seed)
            counted, nll = life.lived()
            plain = plain or nll
            gains = [mine - theirs for mine, theirs in zip(nll, plain, strict=True)]
            around = interval(gains) if arm.share else (0.0, 0.0)
            rows.append(
                Measured(trouble, arm.name, len(users), *counted, float(np.mean(nll)), float(np.mean(gains)), around)
            )
    return Outcome(name, split, rows)


class Life:
    """A cohort that learns for `CYCLES`, each person with an adapter of their own."""

    def __init__(self, lm: LanguageModel, users: Sequence[User], arm: Arm, trouble: str, seed: int) -> None:
        config = new_config(ModelConfig(name="nano")).device
        rate = config.personal.learning_rate * (HOTTER if trouble == "hot" else 1)
        personal = config.personal.model_copy(update={"learning_rate": rate})
        synthesis = config.synthesis.model_copy(update={"per_dialogue": 0})
        privacy = config.privacy.model_copy(update={"secret": "seed"})
        update = {"personal": personal, "synthesis": synthesis, "privacy": privacy}
        self.lm, self.users, self.arm, self.trouble, self.seed = lm, users, arm, trouble, seed
        self.arrived = [self._streams(cycle) for cycle in range(CYCLES)]
        self.met = {(u.id, d.id): (cycle, d) for cycle, of in enumerate(self.arrived)
                    for u, some in zip(users, of, strict=True) for d in some}  # fmt: skip
        self.cycle, self.rules = 0, AcceptanceConfig(share=arm.share)
        self.context = CohortContext.of(lm, config.model_copy(update=update), seed, self._reply)
        start = self.context.shared_layout.start(derive_seed(seed, "shared"))
        noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
        self.bare, self.noisy = start, start + NOISE * noise  # B is 0 at the start: nothing is changed
        self.used = torch.stack([self.bare] * len(users))  # (K, P)
        self.states = [self.context.new_state(user.id) for user in users]

    def _streams(self, cycle: int) -> list[list[Dialogue]]:
        """What each person says in a cycle."""
        parts = [np.array_split(np.arange(len(u.stream)), CYCLES)[cycle] for u in self.users]
        found = [[u.stream[i] for i in part] for u, part in zip(self.users, parts, strict=True)]
        if self.trouble == "guest" and cycle in GUESTS:
            guests = [*found[1:], found[0]]
            return [[replace(d, id=f"guest-{d.id}") for d in of] for of in guests]
        return found

    def _reply(self, device: str, dialogue: str) -> str:
        return "" if self._held(device, dialogue) else self.met[device, dialogue][1].response

    def _held(self, device: str, dialogue: str) -> bool:
        """As on a device: nothing of the first learning, and each for so many."""
        since = self.met[device, dialogue][0]
        if not 0 < since <= self.cycle < since + self.rules.learnings:
            return False
        return is_held_back(self.seed, f"{device}/{dialogue}", self.rules.share)

    def lived(self) -> tuple[tuple[int, int, int, int, int], list[float]]:
        """Updates, worse ones, of these taken back, better ones, of these taken back; NLL of later replies."""
        counted = np.zeros(5, int)
        for self.cycle in range(CYCLES):
            counted += self._learned()
        return tuple(map(int, counted)), self._nll(self.states, self.used, [u.held_out for u in self.users])[1]  # type: ignore[return-value]

    def _learned(self) -> Any:
        received = self.noisy if self.trouble == "server" and self.cycle >= SERVER_FROM else None
        states, _ = learn_alone(self.states, self.arrived[self.cycle], received, RoundPlan(self.cycle, 0), self.context)
        used = self.used if received is None else torch.stack([received] * len(states))
        later = [user.held_out for user in self.users]
        truth = np.subtract(self._nll(states, used, later)[1], self._nll(self.states, self.used, later)[1])
        accepted = np.array([v.accepted for v in self._verdicts(states, used)])
        for k, good in enumerate(accepted):
            if not good:
                states[k] = replace(states[k], personal=self.states[k].personal)
                used[k] = self.used[k]
        self.states, self.used = states, used
        if not self.cycle:
            return np.zeros(5, int)
        worse, better = truth > 0, truth < 0
        return np.array([len(truth), worse.sum(), (worse & ~accepted).sum(), better.sum(), (better & ~accepted).sum()])

    def _verdicts(self, states: Sequence[DeviceState], used: torch.Tensor) -> list[Verdict]:
        held = [[d for (device, i), (_, d) in self.met.items() if device == u.id and self._held(device, i)]
                for u in self.users]  # fmt: skip
        before, after = self._nll(self.states, self.used, held)[0], self._nll(states, used, held)[0]
        return [judged(b, a, self.arm.risk) if self.arm.risk else Verdict(len(b), 0, 0, 0, accepted=True)
                for b, a in zip(before, after, strict=True)]  # fmt: skip

    def _nll(
        self, states: Sequence[DeviceState], used: torch.Tensor, asked: Sequence[Sequence[Dialogue]]
    ) -> tuple[list[list[float]], list[float]]:
        """Nats a token of each person's replies, and their means."""
        slots = [k for k, of in enumerate(asked) for _ in of]
        examples = self.lm.format.dialogues([d for of in asked for d in of])
        on: list[Adapters] = [
            self.lm.adapters(self.context.shared_layout, used),
            self.lm.adapters(self.context.personal_layout, torch.stack([s.personal for s in states])),
        ]
        found: list[list[float]] = [[] for _ in asked]
        for slot, score in zip(slots, self.lm.score(examples, slots, on), strict=True):
            found[slot].append(score.nll / score.tokens)
        return found, [float(np.mean(of)) if of else float("nan") for of in found]


def as_json(found: Outcome) -> dict[str, Any]:
    """For programs."""
    return {"machine": machine("cpu"), **asdict(found)}


def as_table(found: Outcome) -> Table:
    """For people."""
    people = found.rows[0].people
    table = Table(title=f"{people} people of {found.data} ({found.split}), {CYCLES} cycles, nano", title_style="")
    for heading in ("trouble", "updates are", "worse", "of them saved", "better", "of them lost", "NLL at the end",
                    "less that of no test"):  # fmt: skip
        table.add_column(heading, justify="right")
    for r in found.rows:
        low, high = r.interval
        table.add_row(
            r.trouble, r.arm, f"{r.worse} of {r.updates}", str(r.saved), f"{r.better} of {r.updates}", str(r.cost),
            f"{r.nll:.3f}", f"{r.gain:+.3f} [{low:+.3f}, {high:+.3f}]",
        )  # fmt: skip
    return table
