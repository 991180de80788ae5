"""`florilegium bench poison`: what devices that send what they like can do to the shared adapter, by the server's rule.

Honest devices learn from real people's dialogues under the default budget. False ones know each round's honest mean and
send the longest release that the terms let pass: against it, or all in one direction of their own. Not covered: attacks
made for one rule, backdoors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table

from florilegium.client.calibration import release_limits
from florilegium.client.context import CohortContext
from florilegium.client.lm.model import LanguageModel
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.release import Release
from florilegium.privacy.secure_aggregation.part import Sendable
from florilegium.privacy.seeds import derive_seed
from florilegium.server.config import ServerConfig
from florilegium.server.release_collector import Limits
from florilegium.simulation.benchmarks.engine import machine
from florilegium.simulation.config import ExperimentConfig, load_config
from florilegium.simulation.data.population import User, load_population
from florilegium.simulation.engines.in_memory import Federated, InMemory, federate_cohort, passing_ledger
from florilegium.simulation.evaluation.metrics import score_arms
from florilegium.simulation.settings import find_config

RULES = (
    ServerConfig(),
    ServerConfig(rule="trimmed-mean", trimmed_share=0.3),
    ServerConfig(rule="krum", byzantine=3, krum_keep=1),
)
WAYS = ("against", "aside", "unbounded")


@dataclass(frozen=True)
class Measured:
    """One federation; `nll` is the shared adapter's on held-out replies, beside the same people's without any."""

    rule: str
    false: int  # devices
    way: str
    refused: int  # releases, over all rounds
    norm_l2: float  # of what the rounds came to
    nll: float
    base: float


@dataclass
class Poisoned(InMemory):
    """A federation whose first `false` devices send what they like, no longer than `norm_l2`."""

    false: int = 0
    way: str = "against"
    norm_l2: float = 0.0

    def contribute(self, names: Sequence[str], received: torch.Tensor, plan: RoundPlan) -> list[Sendable | None]:
        honest = [r if isinstance(r, Release) else None for r in super().contribute(names, received, plan)]
        rows = [self._row(r, plan.round) for r in honest[self.false :] if r]
        aim = -np.mean(rows, axis=0) if self.way == "against" else np.ones(rows[0].size)
        length = 1e6 if self.way == "unbounded" else 0.999 * self.norm_l2
        row = (aim * length / np.linalg.norm(aim)).astype(np.float32)
        false = [r and Release.of(row, r.version, r.head, self.schema.of_round(plan.round)) for r in honest]
        return [*false[: self.false], *honest[self.false :]]


@dataclass(frozen=True)
class Outcome:
    """A row a rule, number and way of false devices, among so many devices."""

    devices: int
    rows: list[Measured]


def measure(devices: int, least_epsilon: float, seeds: int, tell: Callable[[str], object]) -> Outcome:
    """Each rule without false devices, with one and with three, in each way; of several seeds the mean."""
    config = load_config(find_config("quickstart"), [f"data.users={devices}", "data.min_pairs=60"])
    lm, users = LanguageModel.load(config.model), load_population(config.data, config.seed)
    cases = [(0, "none"), *((false, way) for false in (1, 3) for way in WAYS)]
    rows = []
    for rule in RULES:
        for false, way in cases:
            tell(f"{rule.rule}: {false} false, {way}")
            of_seeds = [_measured(lm, config, users, rule, false, way, least_epsilon, seed) for seed in range(seeds)]
            rows.append(_mean(of_seeds))
    return Outcome(devices, rows)


def _measured(
    lm: LanguageModel,
    config: ExperimentConfig,
    users: Sequence[User],
    rule: ServerConfig,
    false: int,
    way: str,
    least_epsilon: float,
    seed: int,
) -> Measured:
    streams = {f"device-{k:02d}": list(user.stream) for k, user in enumerate(users)}
    replies = {d.id: d.response for user in users for d in user.stream}
    loose = config.model_copy(update={"privacy": config.privacy.model_copy(update={"epsilon": least_epsilon})})
    with passing_ledger() as ledger:
        context = CohortContext.of(lm, config, seed, lambda device, dialogue: replies[dialogue], None, ledger)
        bound = release_limits(loose, context.schema)[0]
        cohort = Poisoned(context, streams, False, false=false, way=way, norm_l2=bound)
        seen = federate_cohort(cohort, rule, Limits(largest_norm_l2=bound))
    start = context.shared_layout.start(derive_seed(context.seed, "shared"))
    queries = [list(user.held_out) for user in users[3:]]  # of the honest ones, always the same
    arms: dict[str, Any] = {"base": [], "shared": [_repeated(lm, seen, len(queries))]}
    nll = {arm: float(np.mean(m.by_user)) for arm, m in score_arms(lm, queries, arms).items()}
    refused = sum(facts.refused.get("too-large", 0) for facts in seen.facts.values())
    return Measured(rule.rule, false, way, refused, float((seen.shared - start).norm()), nll["shared"], nll["base"])


def _repeated(lm: LanguageModel, seen: Federated, count: int) -> Any:
    return lm.adapters(seen.context.shared_layout, seen.shared.expand(count, -1))


def _mean(found: Sequence[Measured]) -> Measured:
    first, numbers = found[0], [[m.refused, m.norm_l2, m.nll, m.base] for m in found]
    refused, norm, nll, base = np.mean(numbers, axis=0)
    return Measured(first.rule, first.false, first.way, int(refused), float(norm), float(nll), float(base))


def as_json(found: Outcome) -> dict[str, Any]:
    """For programs."""
    return {"machine": machine("cpu"), "devices": found.devices, "rows": [asdict(r) for r in found.rows]}


def as_table(found: Outcome) -> Table:
    """For people."""
    table = Table(title=f"{found.devices} devices, three rounds, ε = 8", title_style="")
    for heading in ("rule", "false", "they send", "refused", "norm of the change", "shared − base, nats a token"):
        table.add_column(heading, justify="right")
    for r in found.rows:
        table.add_row(r.rule, str(r.false), r.way, str(r.refused), f"{r.norm_l2:.2f}", f"{r.nll - r.base:+.3f}")
    return table
