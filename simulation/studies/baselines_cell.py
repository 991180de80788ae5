"""Runs a cell of a study of rivals: one scheme of personalisation, on other people for each seed.

Person k of a seed is the same in every cell, with the same stream, batches and held-out replies, so that rivals can
be compared pair by pair.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from functools import cached_property

from florilegium.client.calibration import planned_event
from florilegium.privacy.accounting import epsilon
from florilegium.privacy.seeds import derive_seed
from florilegium.simulation.baselines import evaluation
from florilegium.simulation.baselines.config import BaselinesConfig
from florilegium.simulation.baselines.run import Played, play
from florilegium.simulation.data.population import User
from florilegium.simulation.evaluation.metrics import Measured, measure_nll, score_users
from florilegium.simulation.studies.cell import Result, SeededCell


class BaselinesCell(SeededCell):
    """One cell while it is being run."""

    @property
    def config(self) -> BaselinesConfig:
        assert isinstance(self.cell.config, BaselinesConfig)
        return self.cell.config

    @cached_property
    def users(self) -> dict[str, User]:
        return self.bench.people(self.config.data, self.cell.seeds, self.config.seed)

    def repetition(self, number: int) -> Result:
        """One federation of a seed's people."""
        began, lm = time.perf_counter(), self.bench.model(self.config.model)
        people = {name: user for name, user in self.users.items() if name.startswith(f"seed{number}-")}
        seed = derive_seed(self.config.seed, "rivals", number)
        played = play(lm, self.config, {n: u.stream for n, u in people.items()}, seed, self.listener)
        failed = {list(people)[k]: why for k, why in sorted(played.context.diverged.items())}
        self.listener("evaluate")
        return {
            "epsilon": _spent(self.config),
            "arms": self._arms(played, list(people.values()), number),
            "upload_bytes": played.upload_bytes,
            "download_bytes": played.download_bytes,
            "kept_bytes": played.kept_bytes,
            "tokens": played.tokens,
            **({"failed": failed} if failed else {}),
            "seconds": round(time.perf_counter() - began, 1),
        }

    def _arms(self, played: Played, people: list[User], number: int) -> Result:
        """NLL of the rival, of the base model and with what a stranger has kept; ROUGE-1 of the rival."""
        queries, settings = [u.held_out for u in people], self.config.evaluation
        lm = played.context.lm
        found: Result = {
            "own": {"nll": _by_both(evaluation.nll(played, queries))},
            "base": self.bench.remembered(
                self._of_base(number),
                lambda: {"nll": _by_both(measure_nll(score_users(lm, queries, {"base": []})["base"]))},
            ),
        }
        if other := evaluation.strangers(played):
            found["shuffled"] = {"nll": _by_both(evaluation.nll(other, queries))}
        if settings.rouge_queries_per_user:
            self.listener("reply")
            few = [asked[: settings.rouge_queries_per_user] for asked in queries]
            seed = derive_seed(self.config.seed, "reply", number) >> 1
            rouge, length = evaluation.rouge(played, few, settings.sampling, seed)
            found["own"] |= {"rouge1": _by_both(rouge), "mean_length_tokens": length}
        return found

    def _of_base(self, number: int) -> Hashable:
        """All that the base model's figures depend on: it, and a seed's people."""
        return (self.config.model, self.config.data, self.cell.seeds, self.config.seed, number)


def _by_both(measured: Measured) -> Result:
    return {"by_user": measured.by_user, "by_query": measured.by_query}


def _spent(config: BaselinesConfig) -> float | None:
    """ε of a device over all rounds; none without protection."""
    if config.privacy.mode == "none":
        return None
    return epsilon([planned_event(config)] * config.rounds, config.privacy.delta, config.privacy.promise.adjacency)
