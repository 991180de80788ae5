"""Runs a cell of a study of methods: one way to personalise, on one task, for other people with each seed."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import asdict
from functools import cached_property
from typing import Any

from florilegium.client.lm.adapter import Adapters
from florilegium.client.personalization.config import OWN_PROMPTS
from florilegium.privacy.common.registry import is_extension
from florilegium.privacy.seeds import derive_seed
from florilegium.simulation.evaluation.metrics import Scored, measure_nll
from florilegium.simulation.personalization.config import MethodsConfig
from florilegium.simulation.personalization.run import Answers, play
from florilegium.simulation.studies.cell import Result, Seeded
from florilegium.simulation.tasks.metrics import measure
from florilegium.simulation.tasks.task import Task, TaskUser


class MethodsCell(Seeded):
    """One cell while it is being run."""

    @property
    def config(self) -> MethodsConfig:
        assert isinstance(self.cell.config, MethodsConfig)
        return self.cell.config

    @cached_property
    def people(self) -> list[tuple[Task, list[TaskUser], list[TaskUser]]]:
        """By seed the task, the pool and the users; nobody is reported on in two seeds."""
        count, size = self.cell.seeds, self.config.task.users
        task, pool, users = self.bench.task(self.config.task, count, self.config.seed)
        return [(task, pool, users[n * size : (n + 1) * size]) for n in range(count)]

    @property
    def devices(self) -> list[str]:
        return [f"seed{n}-{k:04d}" for n, (_, _, users) in enumerate(self.people) for k in range(len(users))]

    @property
    def queries(self) -> int:
        return sum(len(u.queries) for _, _, users in self.people for u in users)

    def repetition(self, number: int) -> Result:
        """The people of one seed."""
        config, lm = self.config, self.bench.model(self.config.model)
        task, pool, users = self.people[number]
        seed = derive_seed(config.seed, "methods", number)

        def task_adapter(learn: Any) -> Adapters:
            adapter: Adapters = self.bench.remembered(self._of_task(number), learn)
            return adapter

        played = play(lm, config, task, pool, users, seed, task_adapter, self.listener)
        return {
            "arms": {
                "own": self._measured(played.own, task, users),
                "shuffled": self._measured(played.shuffled, task, users),
            },
            "history": [len(u.history) for u in users],
            "costs": {
                "bytes kept": played.kept_bytes,
                "bytes fetched": played.fetched_bytes,
                **{f"tokens {kind}": count for kind, count in played.spent.items()},
                "tokens of a question": played.question_tokens,
                "share of questions cut": played.cut,
                **{f"seconds to {phase}": seconds for phase, seconds in played.seconds.items()},
            },
        }

    def _of_task(self, number: int) -> Hashable:
        """All that the task's adapter depends on.

        Of a method that is its prompts, those of others but for `OWN_PROMPTS` and for those of the user's own.
        """
        known = self.config.model_dump_json(include={"model", "task", "task_stage", "history", "seed"})
        prompts = self.config.method.model_dump_json(include={"retrieve", "retriever", "profile"})
        name = self.config.method.name
        return (known, prompts, name if name in OWN_PROMPTS or is_extension(name) else "", self.cell.seeds, number)

    def _measured(self, answers: Answers, task: Task, users: list[TaskUser]) -> Result:
        """NLL and the task's metrics, over all, by user and by query, and the mean length of replies."""
        length = self.bench.model(self.config.model).format.length
        nll = measure_nll([Scored(tuple(s.nll for s in of), tuple(s.tokens for s in of)) for of in answers.scores])
        given = [
            [(reply, q.target) for reply, q in zip(replies, user.queries, strict=True)]
            for replies, user in zip(answers.replies, users, strict=True)
        ]
        said = [reply for replies in answers.replies for reply in replies]
        return {
            "nll": {"by_user": nll.by_user, "by_query": nll.by_query, "pooled": nll.mean_per_query},
            **{metric: asdict(measure(metric, given, task.labels)) for metric in task.metrics},
            "mean_length_tokens": sum(length(text) for text in said) / len(said),
        }
