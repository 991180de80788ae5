"""Plays a method: the task is learned from the pool, the method from each person's history, then it is asked.

Controls: the same with what another person has (history in the prompts, adapter), and, as methods of their own, no
history (`base`) and everybody's history in one adapter (`pooled`). Not covered: noise, a server, a stream that goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.model import LanguageModel, Score
from florilegium.client.personalization.history import Asked, Person
from florilegium.client.personalization.method import Method, MethodContext, Served, worded
from florilegium.client.personalization.registry import method
from florilegium.client.personalization.task_adapter import learn_task
from florilegium.privacy.common.registry import UnexpectedError, calling
from florilegium.privacy.seeds import derive_seed
from florilegium.simulation.evaluation.caching_model import CachingModel
from florilegium.simulation.evaluation.metrics import other_people
from florilegium.simulation.personalization.config import MethodsConfig
from florilegium.simulation.personalization.histories import halved, person, wording
from florilegium.simulation.tasks.task import Task, TaskUser

Listener = Callable[[str], None]
TaskAdapter = Callable[[Callable[[], Adapters]], Adapters]  # remembers what is learned once for several methods


@dataclass(frozen=True)
class Answers:
    """What came of the questions of each person."""

    scores: list[list[Score]]  # of the right replies
    replies: list[list[str]]


@dataclass(frozen=True)
class Played:
    """A method on a task."""

    own: Answers
    shuffled: Answers  # with what another person has
    kept_bytes: float  # beside the history, of a person on the mean
    spent: dict[str, float]  # tokens of a person on the mean, before the first question: trained, read and written
    fetched_bytes: float  # from others, before anything
    question_tokens: float  # of one question: prompt and right reply, as often as there are candidates
    cut: float  # share of the questions whose prompts do not fit
    seconds: dict[str, float]


def play(
    lm: LanguageModel,
    config: MethodsConfig,
    task: Task,
    pool: Sequence[TaskUser],
    users: Sequence[TaskUser],
    seed: int,
    task_adapter: TaskAdapter = lambda learn: learn(),
    listener: Listener = lambda phase: None,
) -> Played:
    """One method on these users, device k that of user k. Raises `ExtensionError` for one of the user's own."""
    with calling(config.method.name, "do as `Method` says"):
        return _played(lm, config, task, pool, users, seed, task_adapter, listener)


def _played(
    lm: LanguageModel,
    config: MethodsConfig,
    task: Task,
    pool: Sequence[TaskUser],
    users: Sequence[TaskUser],
    seed: int,
    task_adapter: TaskAdapter,
    listener: Listener,
) -> Played:
    clock, swapped = Clock(listener, lm), other_people([u.owner for u in users], derive_seed(seed, "shuffled"))
    named = [person(u, task, config.history, f"device-{k:04d}") for k, u in enumerate(users)]
    others = [person(u, task, config.history, f"pool-{k:04d}") for k, u in enumerate(pool)]
    people = halved(named, config.history, lm)
    context = MethodContext(lm, config.method, wording(task), seed)
    if config.task_stage.enabled:
        listener("task")  # elsewhere, and once: its seconds are no device's
        stage = config.task_stage
        learn = lambda: learn_task(context, method(context), others, stage.adapter, stage.training)  # noqa: E731
        context = replace(context, beneath=[task_adapter(learn)])
    made = method(context)
    listener("learn")
    made.learn(others)
    made.spent.clear()
    with clock.phase("prepare"):
        made.prepare(people)
        examples = made.examples()
    with clock.phase("adapt"):
        made.adapt(examples)
    with clock.phase("answer"):
        own = answers(made, people, range(len(people)), config, seed)
    shuffled = answers(made, people, swapped, config, seed)
    asked = [in_words(made, k, q) for k, p in enumerate(people) for q in p.questions]
    written = [1 if q.options else made.candidates for p in people for q, _ in p.questions]
    spent = {kind: made.spent[kind] / len(people) for kind in ("trained", "read", "written")}
    cut = sum(e.truncated for e in lm.format.prompts([d.prompt for d in asked])) / len(asked)
    question_tokens = made.tokens([d for d, times in zip(asked, written, strict=True) for _ in range(times)]) / len(
        asked
    )
    return Played(own, shuffled, made.kept_bytes, spent, made.fetched_bytes, question_tokens, cut, clock.seconds)


def in_words(made: Method, device: int, question: tuple[Asked, Dialogue]) -> Dialogue:
    """A question in the method's prompt, with the right reply."""
    asked, reply = question
    return replace(reply, prompt=worded(made, device, asked))


def answers(
    made: Method, people: Sequence[Person], with_whose: Sequence[int], config: MethodsConfig, seed: int
) -> Answers:
    """Each person's questions, answered with what the person `with_whose[k]` has."""
    lm = made.context.lm
    asked = [(with_whose[k], question) for k, p in enumerate(people) for question in p.questions]
    dialogues = [in_words(made, k, question) for k, question in asked]
    with calling(made.context.config.name, f"return Served with a slot for each of {len(asked)} questions"):
        served = made.serving([(k, a) for k, (a, _) in asked])
        if not isinstance(served, Served) or len(served.slots) != len(asked):
            raise UnexpectedError(f"returned {type(served).__name__} of {len(getattr(served, 'slots', ()))} slots")
    scores = iter(lm.score(lm.format.dialogues(dialogues), served.slots, served.arm))
    start = derive_seed(seed, "reply") >> 1
    seeds = range(start, start + len(asked))
    prompts = [d.prompt for d in dialogues]
    with calling(made.context.config.name, f"say {len(asked)} replies"):
        said = made.reply([(k, a) for k, (a, _) in asked], prompts, served, config.sampling, seeds)
        if len(said) != len(asked):
            raise UnexpectedError(f"said {len(said)}")
    replies = iter(said)
    return Answers(
        [[next(scores) for _ in p.questions] for p in people], [[next(replies) for _ in p.questions] for p in people]
    )


class Clock:
    """The seconds of each phase, with those that were spared by what a study remembers."""

    def __init__(self, listener: Listener, lm: LanguageModel) -> None:
        self.listener, self.lm = listener, lm
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.listener(name)
        began = self._now()
        yield
        self.seconds[name] = round(self._now() - began, 3)

    def _now(self) -> float:
        spared = self.lm.cached_seconds if isinstance(self.lm, CachingModel) else 0.0
        return time.perf_counter() + spared
