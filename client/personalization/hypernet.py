"""An adapter made from a profile's embedding, by a network that a pool's people have trained (after Profile-to-PEFT).

With e_u the mean embedding of what is in a history, the person's core is R = g(e_u), two linear layers with a ReLU
between, and ΔW = scale · U R Vᵀ (`core`). g is trained through the adapter, by the loss of the pool's later replies
(Profile-to-PEFT, arXiv 2510.16282; Text-to-LoRA, 2506.06105). A device reads its history once and trains nothing; in
`HypernetStart` what g says is where the core's training begins, as of PRISP (2601.06471).

Unlike the papers', what is embedded is the history itself and not a text about the person, by the base and not by an
encoder of sentences; and g makes a core on a shared basis, not whole factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from florilegium.client.dialogue import Dialogue
from florilegium.client.personalization.core import Core
from florilegium.client.personalization.embedding import Space, seeded, space
from florilegium.client.personalization.history import Person
from florilegium.client.personalization.method import MethodContext
from florilegium.client.personalization.through import teach

WIDTH = 32  # of the layer between


class Hypernet(Core):
    """Prompts as they are set, and a core that is made of the history's embedding."""

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        self.space = Space(context.lm)
        self.network = seeded(self._network, context.seed, "hypernet")
        self.profile_vectors = torch.zeros(0, context.lm.hidden_size)

    def learn(self, others: Sequence[Person]) -> None:
        """First the basis, then the network, on the questions of these people."""
        super().learn(others)
        self.space = space(self.context.lm, [past.document for p in others for past in p.history])
        self.prepare(others)
        asked = [(k, q, reply) for k, person in enumerate(others) for q, reply in person.questions]
        told = [replace(reply, prompt=self.prompt(k, q)) for k, q, reply in asked]

        def rows_of(batch: Sequence[int]) -> torch.Tensor:
            return self.basis.rows(self.network(self.profile_vectors[[asked[i][0] for i in batch]]))

        examples = self.context.lm.format.dialogues(told)
        teach(self.context, self.basis.layout, self.network.parameters(), rows_of, examples, "hypernet")

    def prepare(self, people: Sequence[Person]) -> None:
        super().prepare(people)
        self.count(read=self.texts_tokens([past.document for p in people for past in p.history]))
        self.profile_vectors = torch.stack([self._profile(p) for p in people])

    def adapt(self, examples: Sequence[Sequence[Dialogue]]) -> None:
        """Nothing is trained."""
        self._serve(self.start())

    @torch.no_grad()
    def start(self) -> torch.Tensor:
        """The cores (K, L · r · r) that the network makes of these people."""
        return self.network(self.profile_vectors)  # type: ignore[no-any-return]

    @property
    def fetched_bytes(self) -> float:
        return super().fetched_bytes + 4 * sum(p.numel() for p in self.network.parameters())

    def _profile(self, person: Person) -> torch.Tensor:
        """e_u (H,); of an empty history the origin, which is the pool's mean."""
        found = self.space([past.document for past in person.history])
        return found.mean(0) if len(found) else torch.zeros(self.context.lm.hidden_size)

    def _network(self) -> nn.Module:
        """The last layer is zero: nothing changes yet."""
        last = nn.Linear(WIDTH, self.basis.width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return nn.Sequential(nn.Linear(self.context.lm.hidden_size, WIDTH), nn.ReLU(), last)


class HypernetStart(Hypernet):
    """As `Hypernet`, and then the core is trained on the person's own examples."""

    def adapt(self, examples: Sequence[Sequence[Dialogue]]) -> None:
        self._serve(self._trained(self.start(), examples))
