"""A cell of devices without a server, all seeds in one pass.

Its folder holds a line for each round that was finished, the devices' states after it, and at the end `result.json`.
Device k of a seed has the same stream, the same held-out replies, the same first adapter and the same dice in every
cell, so that cells can be compared pair by pair.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from florilegium.client.context import CohortContext
from florilegium.client.observation import Observation
from florilegium.client.round import learn_alone
from florilegium.client.state import States, stage
from florilegium.client.state_store import DeviceStore
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.seeds import derive_seed
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.data.population import User, met_by
from florilegium.simulation.engines.faults import tried
from florilegium.simulation.evaluation.metrics import by_device, derangement, measure_rouge, reply_arms, score_arms
from florilegium.simulation.runs.provenance import sources_sha256
from florilegium.simulation.studies.cell import Result, SharedResources, read_result, write_whole
from florilegium.simulation.studies.config import Cell

Listener = Callable[[str], None]
SUMMED = (
    "arrived", "accepted", "truncated", "synthetic_kept", "synthetic_rejected", "personal_steps", "personal_tokens",
)  # fmt: skip
LAST = ("buffered", "buffer_bytes", "annotations", "personal_examples")


@dataclass
class SelectionCell:
    """One cell while it is being run."""

    cell: Cell
    folder: Path
    bench: SharedResources
    listener: Listener

    @property
    def config(self) -> ExperimentConfig:
        assert isinstance(self.cell.config, ExperimentConfig)
        return self.cell.config

    @cached_property
    def users(self) -> dict[str, User]:
        return self.bench.people(self.config.data, self.cell.seeds, self.config.seed)

    @property
    def devices(self) -> list[str]:
        return list(self.users)

    @cached_property
    def context(self) -> CohortContext:
        recorded = {name: {d.id: d.response for d in user.stream} for name, user in self.users.items()}
        return CohortContext.of(
            self.bench.model(self.config.model),
            self.config,
            self.config.seed,
            lambda device, identity: recorded[device][identity],
            self.listener,
        )

    @property
    def store(self) -> DeviceStore:
        return DeviceStore(self.folder / "devices.db")

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    def run(self) -> Result:
        """Goes on after the last round that was finished and returns the result."""
        if self.result.exists():
            return read_result(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        finished = self._finished()
        done, names = len(finished), list(self.users)
        states = [self.store.load(n, stage(done)) if done else self.context.new_state(n) for n in names]
        for number in range(done + 1, self.config.rounds + 1):
            states, line = self._round(states, number)
            self.store.save(states, stage(number))
            with (self.folder / "rounds.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
            finished.append(line)
        result = {**self._verdict(states), "rounds": finished}
        write_whole(self.result, result)
        self.store.path.unlink()
        return result

    def _finished(self) -> list[Result]:
        """The rounds that were written whole; what a kill left of another is cut off."""
        path = self.folder / "rounds.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):
            path.write_text("".join(whole), encoding="utf-8")
        return [json.loads(line) for line in whole]

    def _round(self, states: States, number: int) -> tuple[States, Result]:
        rounds, lm = self.config.rounds, self.bench.model(self.config.model)
        lm.cached_seconds = 0.0
        arrived = []
        for state in states:
            stream = self.users[state.id].stream
            arrived.append(stream[state.arrived : met_by(len(stream), number, rounds)])
        context, plan = self.context, RoundPlan(number, number)
        states, seen = tried(
            lambda some: learn_alone([states[k] for k in some], [arrived[k] for k in some], None, plan, context),
            [state.id for state in states],
        )
        line = {"round": number, "spared_s": lm.cached_seconds, **_added_up(seen)}
        if self.config.evaluation.every_round and number < rounds:
            self.listener("evaluate")
            line["nll"] = self._scored({"own": self._rows(states)})["own"]["by_user"]
        return states, line

    def _rows(self, states: States) -> torch.Tensor:
        return torch.stack([s.personal for s in states])  # (K, P)

    def _scored(self, rows: Mapping[str, torch.Tensor]) -> dict[str, Result]:
        lm, queries = self.bench.model(self.config.model), [u.held_out for u in self.users.values()]
        arms = {name: [lm.adapters(self.context.personal_layout, r)] for name, r in rows.items()}
        measured = score_arms(lm, queries, arms)
        return {name: {"by_user": m.by_user, "by_query": m.by_query} for name, m in measured.items()}

    def _verdict(self, states: States) -> Result:
        """NLL and ROUGE-1 of the last adapters, and the NLL of each under another device's adapter."""
        self.listener("evaluate")
        names, rows, settings = list(self.users), self._rows(states), self.config.evaluation
        given = derangement(len(names), derive_seed(self.config.seed, "shuffled"))
        nll = self._scored({"own": rows, "shuffled": rows[given]})
        lm, count = self.bench.model(self.config.model), len(names)
        queries = [u.held_out[: settings.rouge_queries_per_user] for u in self.users.values()]
        rouge: Result = {}
        if settings.rouge_queries_per_user:
            self.listener("reply")
            arms = {"own": [lm.adapters(self.context.personal_layout, rows)]}
            seed = derive_seed(self.config.seed, "reply") >> 1
            seeds = range(seed, seed + sum(map(len, queries)))
            replies = reply_arms(lm, queries, arms, settings.sampling, seeds)["own"]
            measured = measure_rouge(by_device(replies, count))
            rouge = {
                "by_user": measured.by_user,
                "by_query": measured.by_query,
                "mean_length_tokens": float(np.mean([r.tokens for r in replies])),
            }
        return {
            "settings": self.config.model_dump(mode="json"),
            "devices": names,
            "seeds": [int(name.partition("-")[0].removeprefix("seed")) for name in names],
            "queries": sum(len(u.held_out) for u in self.users.values()),
            "nll": nll["own"],
            "nll_shuffled": nll["shuffled"],
            "rouge1": rouge,
            "sources": sources_sha256(self.bench.extensions),
            "hardware": self.bench.hardware(self.config.model),
            "finished": round(time.time()),
        }


def _added_up(seen: list[Observation]) -> Result:
    """What the devices of a cell did in one round, together."""
    seconds, reasons = Counter[str](), Counter[str]()
    for one in seen:
        seconds.update(one.seconds)
        reasons.update(one.synthetic_reasons or {})
    return {
        **{name: sum(getattr(one, name) for one in seen) for name in (*SUMMED, *LAST)},
        "synthetic_reasons": dict(reasons),
        "seconds": {name: round(spent, 3) for name, spent in seconds.items()},
        "failed": [one.personal_failed for one in seen if one.personal_failed],
    }
