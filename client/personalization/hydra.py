"""What is shown to a black-box model, and which of its replies is said, by a head for each person (after HYDRA).

HYDRA (Zhuang et al. 2024, arXiv 2406.02888) factorises two small models into a trunk that all people share and a head
for each: a reranker of the history's items for a question, and an adapter that scores the model's candidates. Both are
binary classifiers (`heads`). For the reranker an item is right if with it in the prompt the person's own reply became
likelier than without any; for the adapter the person's reply is right and what the model says is not. The trunks are
trained on a pool's people, of somebody new the heads alone.

Unlike the paper's, the trunk is one layer over embeddings of the base, not a language model of its own; an item's label
comes of the likelihood of the person's reply, which a true black box would not tell, where the paper asks whether the
reply is right; one reply of the model is a negative example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from florilegium.client.dialogue import Dialogue
from florilegium.client.personalization.choosing import Choosing
from florilegium.client.personalization.embedding import Space, space, texts_of
from florilegium.client.personalization.heads import Judged, SharedTrunk, learn_head, learn_trunk, logits, trunk
from florilegium.client.personalization.history import Asked, Past, Person
from florilegium.client.personalization.method import MethodContext
from florilegium.client.personalization.retrieve import best_first
from florilegium.privacy.seeds import derive_seed

JUDGED, RETRIEVED = 6, 4  # newest items that are learned from; items that a retriever gives to be reranked


class Hydra(Choosing):
    """Reranked items in the prompt, if any are wanted, and the candidate that the person's head finds best."""

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        size = context.lm.hidden_size
        self.space = Space(context.lm)
        self.reranker = trunk(size, context.seed, "reranker")
        self.scorer = trunk(size, context.seed, "scorer")
        self.has_learned = False
        self.rerank_heads: list[torch.Tensor] = []
        self.score_heads: list[torch.Tensor] = []

    def learn(self, others: Sequence[Person]) -> None:
        """Trains the trunks, with a head for each of these people."""
        super().prepare(others)
        self.space = space(self.context.lm, texts_of(others))
        training, seed = self.context.config.training, derive_seed(self.context.seed, "hydra")
        learn_trunk(self.reranker, self._judged_items(), training, seed)
        learn_trunk(self.scorer, self._judged_replies(), training, seed)
        self.has_learned = True

    def prepare(self, people: Sequence[Person]) -> None:
        """Trains the heads; before anything was learned items come as they are retrieved."""
        super().prepare(people)
        if not self.has_learned:
            return
        self.count(read=self.texts_tokens(texts_of(people)))
        self.rerank_heads = self._heads(self.reranker, self._judged_items())
        self.score_heads = self._heads(self.scorer, self._judged_replies())

    def retrieved(self, device: int, asked: Asked, before: int | None = None) -> list[Past]:
        found = self._nearest(device, asked, before)
        if self.has_learned and len(found) > 1:
            worth = logits(self._features(self.reranker, asked, found), self.rerank_heads[device])
            found = [found[i] for i in best_first(worth.numpy())]
        return found[: self.context.config.retrieve][::-1]

    @torch.no_grad()
    def worth(self, asked: Sequence[tuple[int, Asked]], replies: Sequence[str]) -> torch.Tensor:
        pairs = torch.stack([self.space([q.prompt for _, q in asked]), self.space(replies)], 1)
        return logits(self.scorer(pairs), torch.stack([self.score_heads[k] for k, _ in asked]))

    @property
    def kept_bytes(self) -> float:
        """The heads."""
        heads = (*self.rerank_heads[:1], *self.score_heads[:1])
        return super().kept_bytes + sum(4 * head.numel() for head in heads)

    @property
    def fetched_bytes(self) -> float:
        """The trunks."""
        used = (self.scorer, self.reranker) if self.rankings else (self.scorer,)
        return float(sum(4 * p.numel() for net in used for p in net.parameters()))

    def _heads(self, shared: SharedTrunk, judged: Sequence[Judged]) -> list[torch.Tensor]:
        training, seed = self.context.config.training, self.context.seed
        named = zip(self.people, judged, strict=True)
        return [learn_head(shared, own, training, derive_seed(seed, p.id, "hydra")) for p, own in named]

    def _nearest(self, device: int, asked: Asked, before: int | None) -> list[Past]:
        """What a retriever gives, the nearest first: more than is wanted, for the reranker to choose from."""
        history = self.people[device].history
        until = len(history) if before is None else before
        if not self.rankings or not until:
            return []
        most = max(RETRIEVED, self.context.config.retrieve)
        return [history[i] for i in self.rankings[device](asked, until)[:most]]

    @torch.no_grad()
    def _features(self, shared: SharedTrunk, asked: Asked, items: Sequence[Past]) -> torch.Tensor:
        return shared(self._pairs([(asked, item) for item in items]))  # type: ignore[no-any-return]

    def _pairs(self, told: Sequence[tuple[Asked, Past]]) -> torch.Tensor:
        """(n, 2, H) of questions and items."""
        return torch.stack([self.space([q.search for q, _ in told]), self.space([i.document for _, i in told])], 1)

    def _judged_items(self) -> list[Judged]:
        """Of each person: did an item before the newest ones make the reply likelier than no item does?"""
        told = [
            (k, past, item)
            for k, person in enumerate(self.people)
            for i, past in [*enumerate(person.history)][-JUDGED:]
            for item in self._nearest(k, past.asked, before=i)
        ]
        examples = [replace(past.example, prompt=self.context.prompt(past.asked, [i])) for _, past, i in told]
        bare = [replace(past.example, prompt=self.context.prompt(past.asked)) for _, past, _ in told]
        with_item, without = self._losses(examples, told), self._losses(bare, told)
        labels = (with_item < without).float()
        pairs = self._pairs([(past.asked, item) for _, past, item in told])
        return self._by_person([k for k, *_ in told], pairs, labels)

    def _losses(self, examples: Sequence[Dialogue], told: Sequence[tuple[int, Past, Past]]) -> torch.Tensor:
        """NLL (n,) of the replies, nats; the same text is read once."""
        lm, every = self.context.lm, list(dict.fromkeys((e.prompt, e.response) for e in examples))
        once = [Dialogue("", *text) for text in every]
        if not once:
            return torch.zeros(0)
        self.count(read=self.tokens(once))
        scores = lm.score(lm.format.dialogues(once), [0] * len(once), self.context.beneath)
        known = {text: round(s.nll, 4) for text, s in zip(every, scores, strict=True)}
        return torch.tensor([known[e.prompt, e.response] for e in examples])

    def _judged_replies(self) -> list[Judged]:
        """Of each person's newest items their replies are right, and what the model says is not."""
        newest = [[past.example for past in person.history[-JUDGED:]] for person in self.people]
        said = self.replies_of_model(newest)
        told = [(k, e.prompt, text) for k, own in enumerate(newest) for e, s in zip(own, said[k], strict=True)
                for text in (e.response, s)]  # fmt: skip
        pairs = torch.stack([self.space([p for _, p, _ in told]), self.space([t for *_, t in told])], 1)
        labels = torch.tensor([1.0, 0.0]).repeat(len(told) // 2)
        return self._by_person([k for k, *_ in told], pairs, labels)

    def _by_person(self, owners: Sequence[int], pairs: torch.Tensor, labels: torch.Tensor) -> list[Judged]:
        bounds = torch.tensor([0, *(owners.count(k) for k in range(len(self.people)))]).cumsum(0).tolist()
        return [Judged(pairs[a:b], labels[a:b]) for a, b in pairwise(bounds)]
