"""`florilegium bench votes`: votes for candidate dialogues beside noised gradients, at the same ε for the same people.

The server trains the shared adapter on the candidates that won, for as many steps as it likes: what comes after the
noise costs nothing. How much that is worth hangs on the candidates, so there are three kinds: dialogues of people like
the devices' (an oracle: the best that a generator could write), public ones of another kind, and what the model itself
makes of these. Controls: candidates drawn without votes, and votes without noise. The gradients are releases in
`example-local` by the configuration as it stands. Not covered: resampling and varying the winners round by round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table

from florilegium.client.context import CohortContext
from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.batching import schedule_steps
from florilegium.client.lm.training_data import TrainingSet
from florilegium.client.phases import annotate, observe
from florilegium.client.private_training import release, train_shared
from florilegium.client.votes import VotingContext, cast_votes
from florilegium.privacy.noise import ReleaseNoise
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.secure_aggregation.part import Sendable
from florilegium.privacy.seeds import derive_seed
from florilegium.server.config import ServerConfig
from florilegium.server.strategy import ReleaseStrategy
from florilegium.simulation.benchmarks.engine import machine
from florilegium.simulation.config import ExperimentConfig, load_config
from florilegium.simulation.data.population import User, load_population
from florilegium.simulation.engines.in_memory import InMemory, RecordingGrid, federate_in_memory, passing_ledger
from florilegium.simulation.evaluation.caching_model import CachingModel
from florilegium.simulation.evaluation.metrics import Measured, compare, score_arms
from florilegium.simulation.rounds import Recorder, federate
from florilegium.simulation.settings import ConfigError, find_config

PUBLIC = "self_dialogue"
SIGNIFICANT = 2.0  # standard deviations of the sum's noise: what has fewer votes has none
BATCH, STEPS, RATE = 16, 200, 1e-3  # of the server's training


class Voters(InMemory):
    """Devices that are asked for votes: they meet all of their stream at once."""

    def contribute(self, names: Sequence[str], received: torch.Tensor, plan: RoundPlan) -> list[Sendable | None]:
        states, arrived = [self.states[n] for n in names], [self.streams[n] for n in names]
        states, _ = observe(states, arrived, plan, self.context)
        states, _ = annotate(states, self.context)
        states, votes, seen = train_shared(states, received, plan, self.context, cast_votes)
        states, releases = release(votes, states, received, plan, self.context)
        self.observations.append(dict(zip(names, seen, strict=True)))
        return releases


@dataclass(frozen=True)
class Row:
    """One way to a shared adapter, on the held-out replies of the evaluated people."""

    epsilon: float  # infinite without noise
    way: str
    nll: float  # less the base model's, nats a token
    ci95: float
    upload_bytes: int  # of one device, over all rounds
    download_bytes: int
    device_seconds: float
    winners: int  # candidates with votes beyond the noise


@dataclass(frozen=True)
class Outcome:
    """Every way at every ε."""

    devices: int
    candidates: int
    rows: list[Row]


@dataclass(frozen=True)
class Trial:
    """What all ways have in common."""

    lm: CachingModel  # the same dialogues are read at each ε, for each kind of candidates
    config: ExperimentConfig
    users: Sequence[User]
    tell: Callable[[str], object]

    @property
    def spent_s(self) -> float:
        """Seconds of the processor so far, with those that remembered readings would have taken."""
        return time.process_time() + self.lm.cached_seconds

    @property
    def streams(self) -> dict[str, list[Dialogue]]:
        return {f"device-{k:05d}": list(user.stream) for k, user in enumerate(self.users)}

    @property
    def asked(self) -> list[list[Dialogue]]:
        """Held-out replies of the people who are evaluated."""
        return [list(user.held_out) for user in self.users[: self.config.evaluation.users]]

    def at(self, epsilon: float) -> Trial:
        """With this budget; infinite: without noise."""
        mode = "none" if epsilon == float("inf") else "example-local"
        budget = {"mode": mode} | ({} if mode == "none" else {"epsilon": epsilon})
        privacy = self.config.privacy.model_copy(update=budget)
        return Trial(self.lm, self.config.model_copy(update={"privacy": privacy}), self.users, self.tell)

    def measured(self, row: torch.Tensor, context: CohortContext) -> tuple[float, float]:
        """NLL under a shared adapter (P,) less the base model's, and half its interval over people."""
        adapter = self.lm.adapters(context.shared_layout, row.expand(len(self.asked), -1))
        found: dict[str, Measured] = score_arms(self.lm, self.asked, {"base": [], "shared": [adapter]})
        difference = compare(found["shared"], found["base"], lower_is_better=True)
        low, high = difference.ci95
        return difference.mean_difference, (high - low) / 2


def measure(name: str, candidates: int, epsilons: Sequence[float], tell: Callable[[str], object]) -> Outcome:
    """Gradients and votes by the configuration `name`, at each ε and without noise."""
    config = load_config(find_config(name))
    if config.data.split != "test":
        raise ConfigError(
            f"{name}: data.split = {config.data.split!r}: candidates are the development half's, so 'test'"
        )
    lm, users = CachingModel.load(config.model), load_population(config.data, config.seed)
    assert isinstance(lm, CachingModel)
    trial, rows = Trial(lm, config, users, tell), list[Row]()
    kinds = {kind: make(trial, candidates) for kind, make in CANDIDATES.items()}
    for epsilon in (*epsilons, float("inf")):
        rows.append(_by_gradients(trial.at(epsilon), epsilon))
        rows += [_by_votes(trial.at(epsilon), epsilon, kind, found) for kind, found in kinds.items()]
    rows += [_without_votes(trial, kind, found) for kind, found in kinds.items()]
    return Outcome(len(users), candidates, rows)


# -- candidates -------------------------------------------------------------------------------------------------------


def _oracle(trial: Trial, count: int) -> list[Dialogue]:
    """Of people like the devices', none of whom is a device."""
    return _some(trial, trial.config.data.model_copy(update={"split": "development", "users": 64}), count)


def _public(trial: Trial, count: int) -> list[Dialogue]:
    """Of other people in other conversations."""
    return _some(trial, trial.config.data.model_copy(update={"name": PUBLIC, "split": "all", "users": 64}), count)


def _written(trial: Trial, count: int) -> list[Dialogue]:
    """Public prompts with what the model answers."""
    public, sampling = _public(trial, count), trial.config.synthesis.sampling
    seeds = [derive_seed(trial.config.seed, d.id, "candidate") for d in public]
    replies = trial.lm.generate([d.prompt for d in public], [0] * len(public), [], sampling, seeds)
    return [Dialogue(d.id, d.prompt, reply or d.response) for d, reply in zip(public, replies, strict=True)]


def _some(trial: Trial, data: Any, count: int) -> list[Dialogue]:
    met = [d for user in load_population(data, trial.config.seed) for d in user.stream]
    if len(met) < count:
        raise ConfigError(f"--candidates {count:,}: there are {len(met):,} of them in {data.name}")
    order = np.random.default_rng(derive_seed(trial.config.seed, "candidates")).permutation(len(met))[:count]
    return [met[i].in_context for i in order]


CANDIDATES = {"oracle": _oracle, "public": _public, "written": _written}


# -- ways to a shared adapter -----------------------------------------------------------------------------------------


def _by_gradients(trial: Trial, epsilon: float) -> Row:
    trial.tell(f"gradients, ε {epsilon:g}")
    began = trial.spent_s
    seen = federate_in_memory(trial.lm, trial.config, ServerConfig(), trial.streams, trial.config.seed)
    seconds = (trial.spent_s - began) / len(trial.users)
    rounds, whole = trial.config.rounds, seen.context.whole.size_bytes
    sent = rounds * seen.context.upload_bytes("", RoundPlan(1, 0))
    return Row(epsilon, "gradients", *trial.measured(seen.shared, seen.context), sent, 2 * rounds * whole, seconds, 0)


def _by_votes(trial: Trial, epsilon: float, kind: str, candidates: Sequence[Dialogue]) -> Row:
    trial.tell(f"votes for {kind} candidates, ε {epsilon:g}")
    replies = {name: {d.id: d.response for d in stream} for name, stream in trial.streams.items()}
    config = once(trial.config)
    with passing_ledger() as ledger:
        seed, reply = config.seed, lambda device, dialogue: replies[device][dialogue]
        context = VotingContext.about(candidates, CohortContext.of(trial.lm, config, seed, reply, None, ledger))
        began = trial.spent_s
        found = histogram(Voters(context, trial.streams, at_once=True))
        seconds = (trial.spent_s - began) / len(trial.users)
    noise = context.noise_std * len(trial.users) ** 0.5 if config.privacy.mode != "none" else 0.0
    weights = winners(found, noise)
    row = _trained(trial, candidates, weights, context)
    texts = sum(len(f"{c.prompt}{c.response}".encode()) for c in candidates)
    sent = context.schema.size_bytes
    return Row(epsilon, f"votes, {kind}", *trial.measured(row, context), sent, texts, seconds, int((weights > 0).sum()))


def _without_votes(trial: Trial, kind: str, candidates: Sequence[Dialogue]) -> Row:
    """The control: the same server's training on all candidates alike."""
    context = CohortContext.of(trial.lm, trial.config, trial.config.seed, lambda device, dialogue: "", None, None)
    row = _trained(trial, candidates, np.ones(len(candidates)), context)
    return Row(0.0, f"no votes, {kind}", *trial.measured(row, context), 0, 0, 0.0, len(candidates))


def once(config: ExperimentConfig) -> ExperimentConfig:
    """All of a pool votes, in one round."""
    shared = config.shared.model_copy(update={"sampling_rate": 1.0, "steps_per_round": 1})
    return config.model_copy(update={"shared": shared, "rounds": 1})


def histogram(voters: Voters) -> np.ndarray:
    """(N,): the sum of what all devices sent, by the strategy that every engine runs."""
    context = voters.context
    noise = ReleaseNoise(on_device=context.noise_std if isinstance(context, VotingContext) else 0.0)
    strategy = ReleaseStrategy(ServerConfig(), context.schema, context.seed, noise)
    grid = RecordingGrid(voters, list(voters.streams), masked=False)
    start = strategy.begin(np.zeros(context.schema.width, np.float32))
    mean = federate(grid, strategy, Recorder(), start, 1)
    total: np.ndarray = strategy.facts[1].releases * mean.double().numpy()
    return total


def winners(counted: np.ndarray, noise: float) -> np.ndarray:
    """(N,): votes of those that have more than noise gives one in forty of them, zero for the others."""
    return np.where(counted > SIGNIFICANT * noise, counted, 0.0)


def _trained(trial: Trial, candidates: Sequence[Dialogue], weights: np.ndarray, context: CohortContext) -> torch.Tensor:
    """(P,): the shared adapter after the server's steps on candidates drawn by their weights."""
    start = context.shared_layout.start(derive_seed(context.seed, "shared"))
    if not weights.any():
        return start
    rng = np.random.default_rng(derive_seed(context.seed, "winners"))
    drawn = rng.choice(len(candidates), size=BATCH * STEPS, p=weights / weights.sum())
    examples = trial.lm.format.dialogues([candidates[i] for i in drawn])
    order = schedule_steps(len(examples), BATCH, STEPS, derive_seed(context.seed, "server-order"))
    rates = [RATE * (1 - s / STEPS) for s in range(STEPS)]
    adapters = trial.lm.adapters(context.shared_layout, start)
    return trial.lm.engine.finetune(adapters, [], [TrainingSet(examples, order)], [rates]).adapters.rows[0].cpu()


# -- what is told -----------------------------------------------------------------------------------------------------


def as_json(found: Outcome) -> dict[str, Any]:
    """For programs."""
    return {"machine": machine("cpu"), **asdict(found)}


def as_table(found: Outcome) -> Table:
    """For people."""
    table = Table(title=f"{found.devices:,} devices, {found.candidates} candidates", title_style="")
    for heading in ("ε", "way", "NLL − base", "kB up", "kB down", "device seconds", "winners"):
        table.add_column(heading, justify="right")
    for r in found.rows:
        told = "∞" if r.epsilon == float("inf") else f"{r.epsilon:g}"
        table.add_row(
            told, r.way, f"{r.nll:+.3f} ± {r.ci95:.3f}", f"{r.upload_bytes / 1000:.1f}",
            f"{r.download_bytes / 1000:.1f}", f"{r.device_seconds:.3f}", str(r.winners),
        )  # fmt: skip
    return table
