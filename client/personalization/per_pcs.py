"""An adapter put together from others' pieces, without training (after PER-PCS, Tan et al. 2024, arXiv 2406.10471).

Sharers train an adapter each on their own history and then, the adapter frozen, a gate g for each of its layers: the
part of the adapter there is weighed by σ(g · x). A newcomer picks for each layer the k pieces whose gates point most
towards what that layer reads of the newcomer's history: the score of a piece is the cosine of its gate and the mean
input; the pieces are mixed by softmax over the k scores. A mixed piece is Σ w_i B_i A_i, kept as one adapter of rank
k · r. Pieces are LoRA factors of single layers; that sharers give them away is part of the method, and what they tell
of their makers is not bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.adapter import AdapterLayout, Adapters, layout
from florilegium.client.lm.batching import schedule
from florilegium.client.lm.optimizer import Moments, adamw_
from florilegium.client.personalization.history import Asked, Person
from florilegium.client.personalization.method import MethodContext, Served
from florilegium.client.personalization.prompting import Prompting
from florilegium.privacy.seeds import derive_seed

PICKED = 3
READ = 8  # items of a history that a newcomer's means are taken over


@dataclass(frozen=True)
class Pieces:
    """Of each layer, by name, what all sharers have given."""

    a: dict[str, torch.Tensor]  # (sharers, r, in)
    b: dict[str, torch.Tensor]  # (sharers, out, r)
    gates: dict[str, torch.Tensor]  # (sharers, in)


class Assembled(Prompting):
    """Pieces of the sharers' adapters, picked for each person."""

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        self.layout = context.lm.lora_layout(context.config.adapter)
        self.pieces = Pieces({}, {}, {})
        self.adapters: Adapters | None = None

    def learn(self, others: Sequence[Person]) -> None:
        """The others are the sharers."""
        self.prepare(others)
        config, examples = self.context.config, self.examples()
        trained = self.context.train(config.adapter, config.training, examples, [p.id for p in others])
        self.pieces = pieces(trained, self._gates(trained, examples))

    def adapt(self, examples: Sequence[Sequence[Dialogue]]) -> None:
        """Reads each person's newest examples; nothing is trained."""
        rows = []
        self.count(read=sum(self.tokens(own[-READ:]) for own in examples))
        for own in examples:
            rows.append(assembled(self.pieces, mean_inputs(self.context, self.layout, own[-READ:]), self.layout))
        self.adapters = self.context.lm.adapters(wide(self.layout), torch.stack(rows))

    def serving(self, asked: Sequence[tuple[int, Asked]]) -> Served:
        return self.served(asked, self.adapters)

    @property
    def kept_bytes(self) -> float:
        return super().kept_bytes + 4 * wide(self.layout).width

    @property
    def fetched_bytes(self) -> float:
        """All sharers' pieces with their gates: which ones fit is for the newcomer to find out."""
        given = (*self.pieces.a.values(), *self.pieces.b.values(), *self.pieces.gates.values())
        return float(sum(4 * t.numel() for t in given))

    def _gates(self, trained: Adapters, examples: Sequence[Sequence[Dialogue]]) -> torch.Tensor:
        """Trains the gates (sharers, Σ in) of adapters that stay as they are."""
        assert isinstance(trained.layout, AdapterLayout)
        config, lm, fixed = self.context.config.training, self.context.lm, trained.layout.width
        gated = replace(trained.layout, gated=True)
        rows = torch.nn.functional.pad(trained.rows, (0, gated.width - fixed))
        moments = Moments.zeros(rows)
        with lm.engine.adaptable.merged(self.context.beneath):  # what is beneath is part of W, and not weighed
            for k, (own, person) in enumerate(zip(examples, self.people, strict=True)):
                encoded = lm.format.dialogues(own)
                for batch in schedule(
                    len(own), config.batch_size, 1, derive_seed(self.context.seed, person.id, "gates")
                ):
                    chosen = [encoded[i] for i in batch]
                    weights = [1 / max(1, sum(e.targets for e in chosen))] * len(chosen)
                    gradient, _ = lm.engine.gradient(Adapters(gated, rows[k : k + 1]), [], [chosen], [weights])
                    gradient[:, :fixed] = 0  # the adapter stays as it is
                    adamw_(rows, gradient, moments, [k], [config.learning_rate], 0.0)
        return rows[:, fixed:]


def pieces(trained: Adapters, gates: torch.Tensor) -> Pieces:
    """What sharers with these adapters (K, P) and gates (K, Σ in) give."""
    assert isinstance(trained.layout, AdapterLayout)
    split = {name: (a, b) for name, a, b in trained.layout.split(trained.rows)}
    by_layer = gates.split([layer.in_features for layer in trained.layout.layers], dim=1)
    names = [layer.name for layer in trained.layout.layers]
    return Pieces(
        {n: a.expand(len(trained.rows), -1, -1) for n, (a, _) in split.items()},
        {n: b.expand(len(trained.rows), -1, -1) for n, (_, b) in split.items()},
        dict(zip(names, by_layer, strict=True)),
    )


def wide(small: AdapterLayout) -> AdapterLayout:
    """With room for the picked pieces beside each other, under the same scale."""
    return layout(small.layers, small.rank * PICKED, small.alpha * PICKED)


def assembled(given: Pieces, inputs: dict[str, torch.Tensor], small: AdapterLayout) -> torch.Tensor:
    """The row (P,) of `wide(small)` for somebody whose layers read `inputs` (in,) on the mean."""
    row = torch.zeros(wide(small).width)
    for name, a, b in wide(small).split(row[None]):
        scores = torch.nn.functional.cosine_similarity(given.gates[name].cpu(), inputs[name].cpu()[None], dim=1)
        best = torch.topk(scores, min(PICKED, len(scores)))
        for place, (weight, i) in enumerate(zip(torch.softmax(best.values, 0), best.indices, strict=True)):
            at = slice(place * small.rank, (place + 1) * small.rank)
            a[0, at] = given.a[name][i].cpu()
            b[0, :, at] = weight * given.b[name][i].cpu()
    return row


def mean_inputs(context: MethodContext, small: AdapterLayout, examples: Sequence[Dialogue]) -> dict[str, torch.Tensor]:
    """What each adapted layer is given, (in,), on the mean over the tokens of these examples.

    As for the sharers' gates, what is beneath is on.
    """
    encoded = context.lm.format.dialogues(examples)
    return context.lm.engine.mean_inputs([layer.name for layer in small.layers], encoded, context.beneath)
