"""One adapter a person (OPPU, Tan et al. 2024, arXiv 2402.04401), of any kind, with or without retrieval and profile.

The base has been adapted to the task beforehand (`task.learn_task`). Each person's adapter is trained on that person's
own history and on nothing else, all of a cohort's in the same passes.
"""

from __future__ import annotations

from collections.abc import Sequence

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.adapter import Adapters
from florilegium.client.personalization.history import Asked
from florilegium.client.personalization.method import MethodContext, Served
from florilegium.client.personalization.prompting import Prompting


class Oppu(Prompting):
    """Prompts as they are set, and behind them an adapter of one's own."""

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        self.adapters: Adapters | None = None

    def adapt(self, examples: Sequence[Sequence[Dialogue]]) -> None:
        config = self.context.config
        self.adapters = self.context.train(config.adapter, config.training, examples, [p.id for p in self.people])
        self.count(trained=config.training.epochs * sum(self.tokens(own) for own in examples))

    @property
    def kept_bytes(self) -> float:
        return super().kept_bytes + (4 * self.adapters.layout.width if self.adapters else 0)

    def serving(self, asked: Sequence[tuple[int, Asked]]) -> Served:
        return self.served(asked, self.adapters)


class Pooled(Oppu):
    """One adapter for all, trained on everybody's examples: a control that needs what never leaves a device."""

    def adapt(self, examples: Sequence[Sequence[Dialogue]]) -> None:
        config = self.context.config
        every = [example for own in examples for example in own]
        self.adapters = self.context.train(config.adapter, config.training, [every], ["pooled"])
        self.count(trained=config.training.epochs * self.tokens(every))
