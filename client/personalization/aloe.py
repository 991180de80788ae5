"""One adapter for all that has learned to go along with whoever shows more of themselves turn by turn (after ALOE).

ALOE (Wu et al. 2024, arXiv 2410.03642) makes a tree of a talk: at each turn the reply of a model that knows the person
is preferred over one of a model that does not, and the talk goes on with the preferred one, so that more of the person
is known; a model is trained on these turns, supervised and by DPO, and at last knows nobody but goes by what the talk
has shown. Here the simulated person is a recorded one of the pool: turn t is item t of the history, what was said
before is in the prompt (`method.retriever = "recent"`), preferred is what the person really said and rejected what the
model says. The loss is that of `preference`: −log σ(β (r(y⁺) − r(y⁻))) and, by `nll_weight`, the likelihood of y⁺.

Unlike the paper's, no model plays the person, and replies are those of a record instead of a role-play's; supervised
training and DPO are one stage. A device trains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.batching import schedule
from florilegium.client.personalization.history import Asked, Person
from florilegium.client.personalization.method import MethodContext, Served
from florilegium.client.personalization.preference import Preferences, prefer
from florilegium.client.personalization.prompting import Prompting
from florilegium.privacy.seeds import derive_seed

TURNS = 8  # of a talk: a person's first items


class Aloe(Prompting):
    """The newest items in the prompt, and an adapter that has learned to use them."""

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        self.adapters: Adapters | None = None

    def learn(self, others: Sequence[Person]) -> None:
        """From the turns of these people, all in one adapter."""
        Prompting.prepare(self, [replace(p, history=p.history[:TURNS]) for p in others])
        examples = self.examples()
        turns = [
            pair
            for own, said in zip(examples, self.replies_of_model(examples), strict=True)
            for pair in zip(own, said, strict=True)
        ]
        config, lm, seed = self.context.config, self.context.lm, self.context.seed
        training, layout = config.training, lm.layout(config.adapter)
        order = schedule(len(turns), training.batch_size, training.epochs, derive_seed(seed, "aloe", "order"))
        start = lm.adapters(layout, layout.start(derive_seed(seed, "personal", "start")))
        told = [self._preferences([turns[i] for i in batch]) for batch in order]
        self.adapters, _ = prefer(
            lm.engine, start, self.context.beneath, [told], rate=training.learning_rate,
            beta=config.preference.beta, nll_weight=config.preference.nll_weight,
        )  # fmt: skip

    def serving(self, asked: Sequence[tuple[int, Asked]]) -> Served:
        return self.served(asked, self.adapters)

    @property
    def fetched_bytes(self) -> float:
        """The adapter."""
        return 4.0 * (self.adapters.layout.width if self.adapters else 0)

    def _preferences(self, turns: Sequence[tuple[Dialogue, str]]) -> Preferences:
        """Each turn's reply over what the model says there."""
        encode = self.context.lm.format.dialogues
        rejected = encode([replace(turn, response=said) for turn, said in turns])
        return Preferences(encode([turn for turn, _ in turns]), rejected, torch.eye(len(turns)))
