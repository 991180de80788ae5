"""`florilegium bench selection`: what each policy costs a device in one round, with its buffer full.

One round of a device: as many dialogues arrive as there are bins; they are read in one batched forward pass, each is
scored and offered, and the personal adapter is trained on what is kept. Synthesis is left out: it would only make a
round longer. All policies meet the same dialogues, real ones of chitchat's development users.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
from rich.console import Group

from florilegium.client.config import PersonalConfig
from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.batching import schedule
from florilegium.client.lm.config import ModelConfig
from florilegium.client.lm.model import Features, LanguageModel
from florilegium.client.lm.training_data import TrainingSet
from florilegium.client.selection.buffer import Buffer, candidate
from florilegium.client.selection.config import SelectionConfig
from florilegium.client.selection.lexicons import load_lexicons
from florilegium.client.selection.policies import POLICIES
from florilegium.client.terminal import Figures
from florilegium.simulation.benchmarks.engine import machine
from florilegium.simulation.data.population import DataConfig, load_population

DEVICES = 4


@dataclass(frozen=True)
class Measured:
    """Seconds of one device in one round; medians over repeats."""

    policy: str
    reading: str
    forward_s: float  # reading the dialogues that arrived
    scores_s: float  # lexicons and entropies
    policy_s: float  # what it remembers and whom it lets go
    learn_s: float  # one epoch over the bins, without synthetic dialogues
    replaced: float  # bins with another dialogue than before the round

    @property
    def share(self) -> float:
        """Of the round that the policy itself takes."""
        return self.policy_s / (self.forward_s + self.scores_s + self.policy_s + self.learn_s)


@dataclass(frozen=True)
class Outcome:
    """A row a policy, all of the same model and as many bins."""

    model: str
    bins: int
    rows: list[Measured]


def measure(model: str, bins: int, policies: Sequence[str], repeats: int, tell: Callable[[str], object]) -> Outcome:
    """Raises `DataError` where no user has said enough."""
    tell("loading")
    lm = LanguageModel.load(ModelConfig(name=model))
    pairs = -(-8 * bins // 3)  # of which a quarter is held out
    data = DataConfig(users=DEVICES, split="development", min_pairs=pairs, max_pairs=pairs)
    streams = [user.stream[: 2 * bins] for user in load_population(data, seed=0)]
    tell("learning")
    learn_s = median(_learning(lm, streams, bins) for _ in range(repeats))
    rows = []
    for policy in policies:
        tell(policy)
        rows.append(_measured(lm, policy, bins, streams, learn_s, repeats))
    return Outcome(model, bins, rows)


def _measured(
    lm: LanguageModel, policy: str, bins: int, streams: Sequence[Sequence[Dialogue]], learn_s: float, repeats: int
) -> Measured:
    reading, rounds, replaced = POLICIES[policy].reading, [], 0
    for _ in range(repeats):
        before = [d for stream in streams for d in stream[:bins]]
        arrived = [d for stream in streams for d in stream[bins:]]
        old = lm.embed([d.prompt for d in before], [reading])
        began = time.perf_counter()
        new = lm.embed([d.prompt for d in arrived], [reading])
        forward = time.perf_counter() - began
        spent, replaced = np.zeros(2), 0
        for k, stream in enumerate(streams):
            mine = slice(k * bins, (k + 1) * bins)
            times, changed = _offered(policy, bins, stream, [*old[mine], *new[mine]])
            spent, replaced = spent + times, replaced + changed
        rounds.append((forward, *spent))
    forward_s, scores_s, policy_s = (median(r[i] for r in rounds) / DEVICES for i in range(3))
    return Measured(policy, reading, forward_s, scores_s, policy_s, learn_s, replaced / DEVICES)


def _offered(policy: str, bins: int, stream: Sequence[Dialogue], features: Sequence[Features]) -> tuple[Any, int]:
    """Seconds of scoring and of the policy in the second half of a stream, and how many bins changed hands."""
    config = SelectionConfig(policy=policy, bins=bins)
    buffer, lexicons, dice = Buffer(config), load_lexicons(config.lexicons), np.random.default_rng(0)
    for dialogue, feature in zip(stream[:bins], features[:bins], strict=True):
        buffer, _ = buffer.offer(candidate(dialogue, feature, lexicons, config), dice)
    held = {k.id for k in buffer.bins}
    began = time.perf_counter()
    newcomers = [candidate(d, f, lexicons, config) for d, f in zip(stream[bins:], features[bins:], strict=True)]
    scored = time.perf_counter()
    for newcomer in newcomers:
        buffer, _ = buffer.offer(newcomer, dice)
    ended = time.perf_counter()
    return np.array([scored - began, ended - scored]), len(held - {k.id for k in buffer.bins})


def _learning(lm: LanguageModel, streams: Sequence[Sequence[Dialogue]], bins: int) -> float:
    """Seconds a device of one epoch over as many dialogues as there are bins, all devices in one pass."""
    personal = PersonalConfig()
    layout = lm.layout(personal.adapter)
    sets = [
        TrainingSet(lm.format.dialogues(stream[:bins]), schedule(bins, personal.batch_size, 1, k))
        for k, stream in enumerate(streams)
    ]
    rates = [[personal.learning_rate] * len(training_set.batches) for training_set in sets]
    rows = layout.start(0).expand(len(streams), -1)
    began = time.perf_counter()
    lm.engine.finetune(lm.adapters(layout, rows), [], sets, rates)
    return (time.perf_counter() - began) / len(streams)


def as_json(found: Outcome) -> dict[str, Any]:
    """For programs."""
    return {
        "machine": machine("cpu"),
        "model": found.model,
        "bins": found.bins,
        "arrived": found.bins,
        "policies": [{**asdict(row), "share": row.share} for row in found.rows],
    }


def as_table(found: Outcome) -> Group:
    """For people."""
    title = f"{found.model}, {found.bins} bins, {found.bins} dialogues arrive; seconds of one device in one round"
    table = Figures(title=title, title_style="")
    for heading in ("policy", "reads", "forward", "scores", "policy", "learn", "policy's share", "replaced"):
        table.add_column(heading, justify="left" if heading in ("policy", "reads") else "right")
    for r in found.rows:
        seconds = (f"{x:.3f}" for x in (r.forward_s, r.scores_s, r.policy_s, r.learn_s))
        table.add_row(r.policy, r.reading, *seconds, f"{r.share:.1%}", f"{r.replaced:.0f}")
    return Group(table)
