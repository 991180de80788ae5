"""A soft token that says who asks, made for each question (after PPlug, Liu et al. 2024, arXiv 2409.11901).

With x the embedding of the question and h_i those of the history's items: w = softmax(x · h_i / τ), and the token is
P = Σ_i w_i · f(h_i), f two linear layers with a ReLU between, before the prompt. f alone is trained, on people who are
not evaluated; the model and its embeddings stay as they are, and a new person needs no training at all. Unlike the
paper's, the encoder is the model's own mean hidden state and is not trained; there is no second, common token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.config import AdapterConfig
from florilegium.client.lm.soft_prompt import PromptLayout
from florilegium.client.personalization.embedding import hidden, seeded
from florilegium.client.personalization.history import Asked, Person
from florilegium.client.personalization.method import Method, MethodContext, Served
from florilegium.client.personalization.through import teach

TEMPERATURE = 0.1  # of cosines


class Pplug(Method):
    """One soft token for each question."""

    virtual_tokens = 1

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        layout = context.lm.layout(AdapterConfig(kind="prompt", virtual_tokens=self.virtual_tokens))
        assert isinstance(layout, PromptLayout)
        self.layout, size = layout, layout.hidden
        self.projection = seeded(
            lambda: nn.Sequential(nn.Linear(size, 2 * size), nn.ReLU(), nn.Linear(2 * size, size)),
            context.seed,
            "pplug",
        )
        self.items: list[torch.Tensor] = []  # of each person (n, H)

    def learn(self, others: Sequence[Person]) -> None:
        """Trains the projection on the questions of these people, by the loss of their replies."""
        self.prepare(others)
        asked = [(k, q, reply) for k, person in enumerate(others) for q, reply in person.questions]
        examples = self.context.lm.format.dialogues([reply for _, _, reply in asked])
        questions = self._embedded([q.search for _, q, _ in asked])

        def tokens(batch: Sequence[int]) -> torch.Tensor:
            return torch.stack([self.token(questions[i], self.items[asked[i][0]]) for i in batch])

        teach(self.context, self.layout, self.projection.parameters(), tokens, examples, "pplug")

    def prepare(self, people: Sequence[Person]) -> None:
        super().prepare(people)
        self.count(read=self.texts_tokens([past.document for person in people for past in person.history]))
        every = self._embedded([past.document for person in people for past in person.history])
        bounds = torch.tensor([0, *(len(p.history) for p in people)]).cumsum(0).tolist()
        self.items = [every[a:b] for a, b in pairwise(bounds)]

    def token(self, question: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """(H,) from a question (H,) and a history (n, H); of an empty one, that of an item at the origin."""
        if not len(items):
            items = torch.zeros(1, len(question))
        cosine = nn.functional.normalize(items, dim=1) @ nn.functional.normalize(question, dim=0)
        token: torch.Tensor = torch.softmax(cosine / TEMPERATURE, 0) @ self.projection(items)
        return token

    def serving(self, asked: Sequence[tuple[int, Asked]]) -> Served:
        questions = self._embedded([q.search for _, q in asked])
        with torch.inference_mode():
            rows = torch.stack([self.token(x, self.items[k]) for x, (k, _) in zip(questions, asked, strict=True)])
        arm = [Adapters(self.layout, rows.clone().to(self.context.lm.engine.device))]
        return Served(list(range(len(asked))), [*self.context.beneath, *arm])

    @property
    def kept_bytes(self) -> float:
        """The embeddings of the history."""
        return 4 * sum(items.numel() for items in self.items) / max(1, len(self.items))

    @property
    def fetched_bytes(self) -> float:
        """The projection."""
        return float(sum(4 * p.numel() for p in self.projection.parameters()))

    def _embedded(self, texts: Sequence[str]) -> torch.Tensor:
        """Mean hidden states (n, H), in the scale of the model's embeddings."""
        scale = float(self.layout.vocabulary.float().norm(dim=1).mean())
        return nn.functional.normalize(hidden(self.context.lm, texts), dim=1) * scale
