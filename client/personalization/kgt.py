"""A small graph of what is known of a person, tuned by forward passes alone (after KGT, arXiv 2405.19686).

The model reads items of the history and proposes what the person likes, does or is; each proposal becomes a triple
(user, relation, object). Then it is tried greedily: a triple stays if with it, among the others, the replies that the
person has given become likelier, and one that is not missed goes again. A prompt is given those of the triples that
are nearest to the question. Nothing is trained; a person can read the triples and strike them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.config import SamplingConfig
from florilegium.client.personalization.history import Asked, Person
from florilegium.client.personalization.method import LEAST, SPARE, Method, MethodContext, NoRoomError
from florilegium.client.words import words
from florilegium.privacy.seeds import derive_seed

PROPOSED, TRIED_ON, IN_A_PROMPT = 6, 6, 3
RELATIONS = ("likes", "dislikes", "does", "is", "wants", "talks about")
ASK = "{item}\nWhat the user {relation}:"


@dataclass(frozen=True, order=True)
class Triple:
    """Something that is held of a person."""

    relation: str
    object: str

    def __str__(self) -> str:
        return f"The user {self.relation} {self.object}."


class KnowledgeGraph(Method):
    """The nearest of a person's triples before the question."""

    def __init__(self, context: MethodContext) -> None:
        """Raises `NoRoomError` where the model could not be shown an item of a history to propose from."""
        super().__init__(context)
        self.graphs: list[list[Triple]] = []
        if (lacking := LEAST - min(map(self._room, RELATIONS))) > 0:
            limit = context.lm.config.limits.prompt_tokens
            raise NoRoomError(
                f"[model] limits.prompt_tokens = {limit} must be >= {limit + lacking} for the method kgt: it shows the "
                f"model an item of the history before it asks what the person likes, and below {LEAST} tokens an item "
                f"says nothing"
            )

    def prepare(self, people: Sequence[Person]) -> None:
        super().prepare(people)
        self.graphs = [[] for _ in people]
        for round_number in range(PROPOSED):
            self._try(self._proposed(round_number))
        self._drop()

    def prompt(self, device: int, asked: Asked, before: int | None = None) -> str:
        """Of an item of the history the triples are the same: they were made of all of it."""
        return self._with(asked.prompt, nearest(self.graphs[device], asked.search))

    @property
    def kept_bytes(self) -> float:
        return sum(len(str(t).encode()) for g in self.graphs for t in g) / max(1, len(self.graphs))

    def _with(self, prompt: str, triples: Sequence[Triple]) -> str:
        return "\n".join([*map(str, triples), prompt])

    def _room(self, relation: str) -> int:
        """Tokens for an item of a history where it is asked for a relation; at least so many."""
        lm = self.context.lm
        return lm.config.limits.prompt_tokens - lm.format.length(ASK) - len(relation) - SPARE

    def _proposed(self, round_number: int) -> list[Triple | None]:
        """Of each person one more triple, from another item; None where the model has nothing new to say."""
        histories = [person.history for person in self.people]
        items = [h[-1 - round_number * max(1, len(h) // PROPOSED) % len(h)].shown if h else "" for h in histories]
        relation = RELATIONS[round_number % len(RELATIONS)]
        lm = self.context.lm
        room = self._room(relation)
        prompts = [ASK.format(item=lm.format.beginning(item, room), relation=relation) for item in items]
        seeds = [derive_seed(self.context.seed, p.id, "kgt", round_number) >> 1 for p in self.people]
        sampling = SamplingConfig(max_new_tokens=8)
        self.count(read=self.tokens([Dialogue("", p, "") for p in prompts]), written=8 * len(prompts))
        said = lm.generate(prompts, range(len(prompts)), [], sampling, seeds)
        found: list[Triple | None] = []
        for text, graph in zip(said, self.graphs, strict=True):
            triple = Triple(relation, " ".join(words(text)[:6]))
            found.append(triple if triple.object and triple not in graph else None)
        return found

    def _try(self, proposed: Sequence[Triple | None]) -> None:
        """Adds to each graph its proposal, where the person's replies become likelier."""
        candidates = [[*g, *([t] if t else [])] for g, t in zip(self.graphs, proposed, strict=True)]
        now, then = self.losses(self.graphs), self.losses(candidates)
        self.graphs = [c if b < a else g for g, c, a, b in zip(self.graphs, candidates, now, then, strict=True)]

    def _drop(self) -> None:
        """Takes from each graph, one after the other, the triples without which its replies are as likely."""
        for place in reversed(range(PROPOSED)):
            fewer = [[t for i, t in enumerate(g) if i != place] for g in self.graphs]
            now, then = self.losses(self.graphs), self.losses(fewer)
            self.graphs = [f if b <= a else g for g, f, a, b in zip(self.graphs, fewer, now, then, strict=True)]

    def losses(self, graphs: Sequence[Sequence[Triple]]) -> list[float]:
        """Of each person the summed NLL, nats, of the newest replies of the history with these triples at hand."""
        examples: list[Dialogue] = []
        slots: list[int] = []
        for k, (person, graph) in enumerate(zip(self.people, graphs, strict=True)):
            for past in person.history[-TRIED_ON:]:
                prompt = self._with(past.example.prompt, nearest(graph, past.search))
                examples.append(replace(past.example, prompt=prompt))
                slots.append(k)
        self.count(read=self.tokens(examples))
        total = [0.0] * len(graphs)
        lm = self.context.lm
        for k, score in zip(slots, lm.score(lm.format.dialogues(examples), slots, self.context.beneath), strict=True):
            total[k] += round(score.nll, 4)
        return total


def nearest(graph: Sequence[Triple], search: str) -> list[Triple]:
    """At most `IN_A_PROMPT` triples, those that share most words with a question, in the order of the graph."""
    asked = set(words(search))
    shared = [len(asked & set(words(t.object))) for t in graph]
    chosen = sorted(range(len(graph)), key=lambda i: (-shared[i], i))[:IN_A_PROMPT]
    return [graph[i] for i in sorted(chosen)]
