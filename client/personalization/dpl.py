"""What makes a person different from others, in the model's words, in front of the question (after DPL).

DPL (Qiu et al. 2025, arXiv 2503.02450): people are clustered by their embeddings, and those nearest to the centres
represent the others; the model is shown items of the person beside what representatives said of the like and names
the differences, and then sums them up to a profile. Here centres are those of k-means over the mean embeddings of
histories; an item of the person's is compared with the likest item of each representative in turn. Representatives'
texts are fetched by every device: they have to be public.

Unlike the paper's, the model does not say along which lines (writing, emotion, meaning) people differ, but in one
sentence; and there is one representative an item.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.config import SamplingConfig
from florilegium.client.personalization.embedding import Space, space
from florilegium.client.personalization.history import Past, Person
from florilegium.client.personalization.method import SPARE, MethodContext
from florilegium.client.personalization.prompting import PROFILE_TOKENS, Prompting
from florilegium.privacy.seeds import derive_seed

REPRESENTATIVES, COMPARED, ROUNDS = 3, 3, 10  # people; items of a person; of k-means
DIFFERENCE_TOKENS = 16
ASK_FOR_DIFFERENCE = "The user: {own}\nSomebody else: {other}\nHow the user differs:"
ASK_FOR_SUMMARY = "{differences}\nDescribe the user in one sentence."


class Dpl(Prompting):
    """Items as they are set, behind a profile that is made of differences."""

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        self.representatives: Sequence[Person] = ()
        self.space = Space(context.lm)

    def learn(self, others: Sequence[Person]) -> None:
        documents = [past.document for p in others for past in p.history]
        self.space = space(self.context.lm, documents)
        self.representatives = representatives(others, self.space)

    def prepare(self, people: Sequence[Person]) -> None:
        """Before anything was learned people represent each other."""
        super().prepare(people)
        there = self.representatives or representatives(people, self.space)
        self.count(read=self.texts_tokens([past.document for p in people for past in p.history]))
        compared = [self._compared(p, [r for r in there if r.owner != p.owner]) for p in people]
        self.profiles = self._summed_up(self._differences(compared))

    @property
    def fetched_bytes(self) -> float:
        """The representatives' texts."""
        return float(sum(len(past.shown.encode()) for p in self.representatives for past in p.history))

    def _compared(self, person: Person, others: Sequence[Person]) -> list[tuple[str, str]]:
        """Items of a person, spread over the history, each with the likest of one representative."""
        others, history = [o for o in others if o.history], person.history
        chosen = history[:: max(1, len(history) // COMPARED)][:COMPARED] if others else ()
        return [(past.shown, self._likest(past, others[i % len(others)]).shown) for i, past in enumerate(chosen)]

    def _likest(self, past: Past, other: Person) -> Past:
        """By cosine, the later one of equals."""
        mine = self.space([past.document])
        near = torch.cosine_similarity(self.space([o.document for o in other.history]), mine)
        return other.history[max(range(len(near)), key=lambda i: (round(float(near[i]), 4), i))]

    def _differences(self, compared: Sequence[Sequence[tuple[str, str]]]) -> list[list[str]]:
        """What the model says of each pair."""
        room = self._room(ASK_FOR_DIFFERENCE, 2)
        prompts = []
        for own, other in (pair for pairs in compared for pair in pairs):
            cut = self.context.cut_all([own, other], room) or ["", ""]
            prompts.append(ASK_FOR_DIFFERENCE.format(own=cut[0], other=cut[1]))
        said = iter(self._said(prompts, DIFFERENCE_TOKENS))
        return [[next(said) for _ in pairs] for pairs in compared]

    def _summed_up(self, differences: Sequence[Sequence[str]]) -> list[str]:
        """One sentence of each person; nothing of whom nothing was said."""
        room = self._room(ASK_FOR_SUMMARY, COMPARED)
        told = ["\n".join(self.context.cut_all(some, room)) for some in differences]
        prompts = [ASK_FOR_SUMMARY.format(differences=text) for text in told if text]
        said = iter(self._said(prompts, PROFILE_TOKENS))
        return [next(said) if text else "" for text in told]

    def _room(self, words: str, parts: int) -> int:
        lm = self.context.lm
        return lm.config.limits.prompt_tokens - lm.format.length(words) - SPARE * parts

    def _said(self, prompts: Sequence[str], tokens: int) -> list[str]:
        """By the base, greedily."""
        self.count(read=self.tokens([Dialogue("", p, "") for p in prompts]), written=tokens * len(prompts))
        seeds = [derive_seed(self.context.seed, "dpl") >> 1] * len(prompts)
        sampling = SamplingConfig(max_new_tokens=tokens)
        return self.context.lm.generate(prompts, range(len(prompts)), [], sampling, seeds) if prompts else []


def representatives(people: Sequence[Person], embedded: Space) -> list[Person]:
    """Those nearest to the centres of k-means over the means of their histories; the first centres are spread."""
    there = [p for p in people if p.history]
    if not there:
        return []
    means = torch.stack([embedded([past.document for past in p.history]).mean(0) for p in there])
    distances = torch.cdist(means, centres(means, min(REPRESENTATIVES, len(there))))
    return [there[i] for i in dict.fromkeys(distances.argmin(0).tolist())]


def centres(points: torch.Tensor, count: int) -> torch.Tensor:
    """Of k-means (Lloyd) over points (n, H), begun with the first point and, one by one, the farthest from those."""
    found = points[:1]
    while len(found) < count:
        found = torch.cat([found, points[torch.cdist(points, found).amin(1).argmax()][None]])
    for _ in range(ROUNDS):
        owner = torch.cdist(points, found).argmin(1)
        found = torch.stack([points[owner == c].mean(0) if (owner == c).any() else found[c] for c in range(count)])
    return found
