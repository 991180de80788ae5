"""Methods that change the prompt alone: retrieval (LaMP, arXiv 2304.11406) and a profile (PAG, arXiv 2310.20081)."""

from __future__ import annotations

from collections.abc import Sequence

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.config import SamplingConfig
from florilegium.client.personalization.history import Asked, History, Past, Person
from florilegium.client.personalization.method import SPARE, Method, MethodContext
from florilegium.client.personalization.retrieve import Ranking, rankings
from florilegium.privacy.seeds import derive_seed

PROFILE_ITEMS, PROFILE_TOKENS = 8, 32
ASK_FOR_PROFILE = "{items}\nDescribe the user who wrote this in one sentence."


class Prompting(Method):
    """The question behind `config.retrieve` items of the history and, with `config.profile`, a summary of the person.

    With neither it is the question alone.
    """

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        self.rankings: list[Ranking] = []
        self.profiles: list[str] = []

    def prepare(self, people: Sequence[Person]) -> None:
        super().prepare(people)
        histories, names = [p.history for p in people], [p.id for p in people]
        config, lm, seed = self.context.config, self.context.lm, self.context.seed
        self.rankings = rankings(config.retriever, histories, lm, names, seed) if config.retrieve else []
        self.profiles = self._summaries(histories, names) if config.profile else [""] * len(people)
        if config.retrieve and config.retriever == "dense":
            self.count(read=self.texts_tokens([p.document for h in histories for p in h]))

    def prompt(self, device: int, asked: Asked, before: int | None = None) -> str:
        return self.context.prompt(asked, self.retrieved(device, asked, before), self.profiles[device])

    def retrieved(self, device: int, asked: Asked, before: int | None = None) -> list[Past]:
        """The items that a prompt is given, the nearest last, next to the question."""
        history = self.people[device].history
        until = len(history) if before is None else before
        if not self.rankings or not until:
            return []
        return [history[i] for i in self.rankings[device](asked, until)[: self.context.config.retrieve]][::-1]

    @property
    def kept_bytes(self) -> float:
        said = sum(len(text.encode()) for text in self.profiles) / max(1, len(self.profiles))
        items = sum(len(p.history) for p in self.people) / max(1, len(self.people))
        dense = self.context.config.retrieve and self.context.config.retriever == "dense"
        return said + (4 * items * self.context.lm.hidden_size if dense else 0)

    def _summaries(self, histories: Sequence[History], names: Sequence[str]) -> list[str]:
        """What the model says of each person, having read some items spread over the history; greedy."""
        spread = [h[:: max(1, len(h) // PROFILE_ITEMS)][:PROFILE_ITEMS] for h in histories]
        lm = self.context.lm
        room = lm.config.limits.prompt_tokens - lm.format.length(ASK_FOR_PROFILE)
        told = [self.context.cut_all([p.shown for p in some], room - SPARE * len(some)) for some in spread]
        prompts = [ASK_FOR_PROFILE.format(items="\n".join(some)) for some in told]
        seeds = [derive_seed(self.context.seed, name, "profile") >> 1 for name in names]
        sampling = SamplingConfig(max_new_tokens=PROFILE_TOKENS)
        self.count(read=self.tokens([Dialogue("", p, "") for p in prompts]), written=PROFILE_TOKENS * len(prompts))
        return lm.generate(prompts, range(len(names)), [], sampling, seeds)
