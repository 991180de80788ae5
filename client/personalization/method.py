"""The one interface of all methods: `learn` from others, `prepare(history)`, `prompt(query)`, `adapt(examples)`.

A method is made for a cohort of people on one model. In this order it learns from people who are not evaluated (what a
maker of devices could do beforehand), prepares itself for each person's history, writes prompts, and adapts: what
comes of it answers questions. Most methods do one of these and leave the others as they are here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.batching import schedule
from florilegium.client.lm.config import AdapterConfig, SamplingConfig
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.training_data import TrainingSet
from florilegium.client.personalization.config import MethodConfig, TrainingConfig
from florilegium.client.personalization.history import Asked, Past, Person, Wording
from florilegium.privacy.common.errors import DeviceFaultError, UserError
from florilegium.privacy.common.registry import UnexpectedError, calling
from florilegium.privacy.seeds import derive_seed

LEAST = 8  # tokens of a person's item below which it says nothing
SPARE = 2  # tokens that a text may have more in company than alone


class NoRoomError(UserError):
    """The limit on prompts leaves no room for what a method has to show the model."""


class TrainingFailedError(DeviceFaultError):
    """An adapter's loss is no number any more."""


@dataclass(frozen=True)
class MethodContext:
    """What methods work with."""

    lm: LanguageModel
    config: MethodConfig
    wording: Wording = field(default_factory=Wording)
    seed: int = 0
    beneath: Sequence[Adapters] = ()  # what the base has been adapted to the task with

    def train(
        self,
        shape: AdapterConfig,
        training: TrainingConfig,
        examples: Sequence[Sequence[Dialogue]],
        names: Sequence[str],
    ) -> Adapters:
        """A new adapter for each name, trained on its examples in random order; the rate falls to zero."""
        layout = self.lm.layout(shape)
        start = torch.stack([layout.start(derive_seed(self.seed, "personal", "start")) for _ in names])
        sets = []
        for name, own in zip(names, examples, strict=True):
            order = schedule(len(own), training.batch_size, training.epochs, derive_seed(self.seed, name, "personal"))
            sets.append(TrainingSet(self.lm.format.dialogues(own), order))
        rates = [[training.learning_rate * (1 - s / len(x.batches)) for s in range(len(x.batches))] for x in sets]
        trained = self.lm.engine.finetune(self.lm.adapters(layout, start), self.beneath, sets, rates)
        if trained.failed:
            raise TrainingFailedError(f"the training of {len(trained.failed)} of {len(names)} adapters diverged")
        return trained.adapters

    def prompt(self, asked: Asked, items: Sequence[Past] = (), profile: str = "") -> str:
        """The question with what is told of the person, which is cut so that the question stays whole.

        The profile gets at most half of the room, each item an equal share of what is left; where a share is below
        `LEAST` tokens there are no items.
        """
        length = self.lm.format.length
        words = self.wording.prompt(asked, [""] * len(items), "-" if profile else "")
        room = self.lm.config.limits.prompt_tokens - length(words) - SPARE * (1 + len(items))
        said = self.lm.format.beginning(profile, room // 2) if room // 2 >= LEAST else ""
        return self.wording.prompt(asked, self.cut_all([item.shown for item in items], room - length(said)), said)

    def cut_all(self, texts: Sequence[str], room: int) -> list[str]:
        """Texts of at most `room` tokens together: short ones whole, long ones alike; none where all are scraps."""
        if not texts or room // len(texts) < LEAST:
            return []
        lengths, found = [self.lm.format.length(t) for t in texts], list(texts)
        left = room
        for place, i in enumerate(sorted(range(len(texts)), key=lambda i: lengths[i])):
            share = left // (len(texts) - place)
            found[i] = self.lm.format.beginning(texts[i], share)
            left -= min(share, lengths[i])
        return found


@dataclass(frozen=True)
class Served:
    """The adapters that are on, and which row of them serves each question."""

    slots: list[int]
    arm: Sequence[Adapters]


class Method:
    """No personalisation: the question as it is, no adapter."""

    candidates: int = 1  # replies that are written for a question without options

    def __init__(self, context: MethodContext) -> None:
        self.context = context
        self.people: Sequence[Person] = ()
        self.spent = Counter[str]()  # tokens of all people: "trained", "read" and "written"

    def learn(self, others: Sequence[Person]) -> None:
        """From people who are not evaluated."""

    def prepare(self, people: Sequence[Person]) -> None:
        """For the histories of these people; their questions are not looked at."""
        self.people = people

    def prompt(self, device: int, asked: Asked, before: int | None = None) -> str:
        """What the model is given for a question, or for item `before` of the history.

        Of the history only the items before that one are put into it; a profile, or what else was prepared, may be made
        of all of it.
        """
        return asked.prompt

    def adapt(self, examples: Sequence[Sequence[Dialogue]]) -> None:
        """To each person's own examples, in the form of its prompts."""

    @property
    def kept_bytes(self) -> float:
        """What a device has to keep beside the history, on the mean."""
        return 0.0

    @property
    def fetched_bytes(self) -> float:
        """What a device has to get from others before it can begin, beside the model and the task's adapter."""
        return 0.0

    def serving(self, asked: Sequence[tuple[int, Asked]]) -> Served:
        """What answers these questions of these people."""
        return self.served(asked)

    def served(self, asked: Sequence[tuple[int, Asked]], own: Adapters | None = None) -> Served:
        """By the base as it is for the task and, if there are any, the people's own adapters."""
        return Served([device for device, _ in asked], [*self.context.beneath, *([own] if own else [])])

    def reply(
        self,
        asked: Sequence[tuple[int, Asked]],
        prompts: Sequence[str],
        served: Served,
        sampling: SamplingConfig,
        seeds: Sequence[int],
    ) -> list[str]:
        """What is said to these questions of these people, in these prompts."""
        return self.context.lm.generate(prompts, served.slots, served.arm, sampling, seeds)

    def replies_of_model(self, examples: Sequence[Sequence[Dialogue]]) -> list[list[str]]:
        """What the model says to each example's prompt, greedily; as long as the person's replies may be."""
        lm = self.context.lm
        slots = [k for k, own in enumerate(examples) for _ in own]
        prompts = [e.prompt for own in examples for e in own]
        sampling = SamplingConfig(max_new_tokens=lm.format.limits.reply_tokens)
        self.count(read=sum(self.tokens([replace(e, response="")]) for own in examples for e in own))
        said = iter(lm.generate(prompts, slots, self.context.beneath, sampling, range(len(prompts))))
        found = [[next(said) for _ in own] for own in examples]
        self.count(written=sum(lm.format.length(text) for own in found for text in own))
        return found

    def count(self, **tokens: float) -> None:
        """Notes what was trained on, read or written."""
        self.spent.update({kind: round(number) for kind, number in tokens.items()})

    def tokens(self, dialogues: Sequence[Dialogue]) -> int:
        """Of prompts and replies, as the model is given them."""
        return sum(e.length for e in self.context.lm.format.dialogues(dialogues))

    def texts_tokens(self, texts: Sequence[str]) -> int:
        """Of texts that are only read."""
        return sum(e.length for e in self.context.lm.format.prompts(texts))

    def examples(self) -> list[list[Dialogue]]:
        """Each person's history as examples, each with the prompt that this method would have written for it."""
        return [
            [
                Dialogue(p.example.id, worded(self, k, p.asked, before=i), p.example.response, p.example.time)
                for i, p in enumerate(person.history)
            ]
            for k, person in enumerate(self.people)
        ]


def worded(made: Method, device: int, asked: Asked, before: int | None = None) -> str:
    """`Method.prompt`; where a method of the user's own does it wrong the device is told. Raises `ExtensionError`."""
    who = made.people[device].id if device < len(made.people) else f"person {device}"
    with calling(made.context.config.name, "return the prompt as a text", who):
        found = made.prompt(device, asked, before)
        if not isinstance(found, str):
            raise UnexpectedError(f"returned {type(found).__name__}")
    return found
