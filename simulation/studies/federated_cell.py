"""Runs a cell of a study of federations: real devices, real server, once for each seed, then personal adapters.

The people are the same for all seeds and cells; what a seed changes is every coin and all noise.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from hashlib import sha256

import numpy as np
import torch

from florilegium.client.context import CohortContext
from florilegium.client.dialogue import Dialogue
from florilegium.client.observation import Observation
from florilegium.client.phases import frozen_adapters, learn_personal
from florilegium.client.round import adopt
from florilegium.client.state import States
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.seeds import derive_seed
from florilegium.simulation.audit.attack_metrics import Ceiling, judge
from florilegium.simulation.audit.attacks import membership
from florilegium.simulation.audit.canaries import Canary, hide
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.data.population import User
from florilegium.simulation.engines.in_memory import Federated, federate_in_memory
from florilegium.simulation.evaluation.metrics import Arm, by_device, derangement, measure_rouge, reply_arms, score_arms
from florilegium.simulation.studies.cell import Result, SeededCell
from florilegium.simulation.studies.config import unseen


class FederatedCell(SeededCell):
    """One cell while it is being run."""

    @property
    def config(self) -> ExperimentConfig:
        assert isinstance(self.cell.config, ExperimentConfig)
        return self.cell.config

    @cached_property
    def users(self) -> dict[str, User]:
        return self.bench.people(self.config.data, 1, self.config.seed)

    @cached_property
    def streams(self) -> tuple[dict[str, list[Dialogue]], list[Canary]]:
        """What the devices meet, by name, and the dialogues that attacks ask about."""
        met, hidden = hide([u.stream for u in self.users.values()], self.cell.study.hidden_share, self.config.seed)
        return dict(zip(self.users, met, strict=True)), hidden

    def repetition(self, number: int) -> Result:
        """One federation of all devices, with the dice of a seed."""
        began, (streams, hidden) = time.perf_counter(), self.streams
        config, lm = self.config, self.bench.model(self.config.model)
        seed = derive_seed(config.seed, "repetition", number)
        seen = federate_in_memory(lm, config, config.server, streams, seed, listener=self.listener)
        states = list(seen.cohort.states.values())
        if config.personal.epochs:
            states, _ = adopt(states, seen.shared, RoundPlan(config.rounds, config.rounds), seen.context)
        arms = self._arms(seen, states)
        self.listener("attack")
        ceiling, member = Ceiling.of(config), np.array([c.member for c in hidden])
        attacks = membership(seen, hidden) if hidden else {}
        return {
            "arms": {**self._without_server(states, seen.context, number), **self._measured(arms, number)},
            "attacks": [asdict(judge(name, score, member, ceiling)) for name, score in attacks.items()],
            **_told(seen),
            "seconds": round(time.perf_counter() - began, 1),
        }

    # -- arms ---------------------------------------------------------------------------------------------------

    def _arms(self, seen: Federated, states: States) -> dict[str, Arm]:
        context, personal = seen.context, torch.stack([s.personal for s in states])
        shared = frozen_adapters(seen.shared, [s.id for s in states], context)
        if not self.config.personal.epochs:
            return {"shared": shared}
        given = derangement(len(states), derive_seed(context.seed, "shuffled"))
        return {
            "shared": shared,
            "personal": [*shared, context.lm.adapters(context.personal_layout, personal)],
            "shuffled": [*shared, context.lm.adapters(context.personal_layout, personal[given])],
        }

    def _without_server(self, states: States, context: CohortContext, number: int) -> Result:
        """Base model and personal adapters on it alone: the same in all cells that differ in what is shared."""

        def measured() -> Result:
            arms: dict[str, Arm] = {"base": []}
            if self.config.personal.epochs:
                self.listener("local control")
                rounds = context.config.rounds
                fresh = [replace(s, personal=context.new_state(s.id).personal) for s in states]
                alone, _ = learn_personal(fresh, None, RoundPlan(rounds, rounds), context)
                rows = torch.stack([s.personal for s in alone])
                arms["local"] = [context.lm.adapters(context.personal_layout, rows)]
            return self._measured(arms, number)

        found: Result = self.bench.remembered(self._learned_alone(states, number), measured)
        return found

    def _learned_alone(self, states: States, number: int) -> Hashable:
        """All that the arms without a server depend on.

        What is shared and the server have their part in it by what they leave in the buffers: who was asked when, and
        about what.
        """
        settings = self.config.model_dump_json(exclude={"shared", "privacy", "server", *unseen("federated")})
        learned = [
            (s.id, [(k.id, k.prompt, s.replies[k.id], s.synthetic.get(k.id, ())) for k in s.annotated]) for s in states
        ]
        return settings, number, sha256(repr(learned).encode("utf-8", "surrogatepass")).hexdigest()

    def _measured(self, arms: Mapping[str, Arm], number: int) -> Result:
        """NLL and ROUGE-1 of each arm, by user and by query, and the mean length of replies."""
        self.listener("evaluate")
        lm, settings = self.bench.model(self.config.model), self.config.evaluation
        asked = [u.held_out for u in self.users.values()]
        found: Result = {
            name: {"nll": {"by_user": m.by_user, "mean_per_query": m.mean_per_query}}
            for name, m in score_arms(lm, asked, arms).items()
        }
        if settings.rouge_queries_per_user:
            few = [queries[: settings.rouge_queries_per_user] for queries in asked]
            seed = derive_seed(self.config.seed, "reply", number) >> 1
            seeds = range(seed, seed + sum(map(len, few)))
            for name, replies in reply_arms(lm, few, arms, settings.sampling, seeds).items():
                m = measure_rouge(by_device(replies, len(asked)))
                found[name]["rouge1"] = {"by_user": m.by_user, "mean_per_query": m.mean_per_query}
                found[name]["mean_length_tokens"] = float(np.mean([r.tokens for r in replies]))
        return found


def _told(seen: Federated) -> Result:
    """What the federation cost and how much of its releases was signal."""
    observed = [o for of_round in seen.cohort.observations for o in of_round.values()]
    spent = [o.epsilon for o in observed if o.epsilon is not None]
    first = seen.cohort.sent(0).double()  # (devices that released, P)
    mean = first.sum(0) / max(1, len(first))
    variance = float((first - mean).square().sum() / max(1, len(first) - 1))
    ratios = [f.signal_to_noise for f in seen.facts.values()]
    return {
        "epsilon": max(spent, default=0.0),
        "releases": [f.releases for f in seen.facts.values()],
        "refused": dict(sum((Counter(f.refused) for f in seen.facts.values()), Counter[str]())),
        "signal_to_noise": [None if math.isnan(r) else r for r in ratios],
        "shared_norm_l2": float(seen.shared.norm()),
        # of the first round's releases, noise and all: squared norm of the mean change, and what a device adds to it
        "mean_square": float(mean.square().sum()),
        "variance": variance,
        "width": seen.context.shared_layout.width,
        "averaging_error": [f.averaging_error for f in seen.facts.values()],
        "upload_bytes": max(o.upload_bytes or 0 for o in observed),
        "seconds_by_phase": _phases(observed),
    }


def _phases(observed: Sequence[Observation]) -> dict[str, float]:
    seconds = Counter[str]()
    for one in observed:
        seconds.update(one.seconds)
    return {name: round(spent, 3) for name, spent in seconds.items()}
