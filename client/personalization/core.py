"""A small core for each person between two factors that all share (after APlaud and PLUME).

ΔW = scale · U R Vᵀ in each adapted layer (APlaud, arXiv 2609.04738; PLUME, 2609.04715), with U (out, r) and V (in, r)
the singular vectors of an adapter that a pool's people have trained together, and R (r, r), zero at first, the
person's own: r² numbers a layer in place of r (in + out). Of both papers only abstracts were known here: what they call
the basis, how they train it and PLUME's further part of rank one may differ. All columns of U have the norm √(out / r),
those of V the norm 1: every direction of the basis is as easy to go, and a step of AdamW on R moves the weight as far
as one on B does, r η √(out / r) = η √(out r).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.adapter import AdapterLayout, Adapters
from florilegium.client.personalization.history import Asked, Person
from florilegium.client.personalization.method import MethodContext, Served
from florilegium.client.personalization.prompting import Prompting
from florilegium.client.personalization.through import train_through


@dataclass(frozen=True)
class Basis:
    """U of each layer; V is the frozen factor of the layout, whose rows are U R."""

    layout: AdapterLayout
    left: Sequence[torch.Tensor]  # of each layer U (out, r)

    def rows(self, cores: torch.Tensor) -> torch.Tensor:
        """Rows (K, P) of cores (K, L · r · r)."""
        by_layer = cores.view(len(cores), len(self.left), self.layout.rank, self.layout.rank).unbind(1)
        return torch.cat([(u @ r).flatten(1) for u, r in zip(self.left, by_layer, strict=True)], 1)

    @property
    def width(self) -> int:
        """L · r · r, the numbers of a person."""
        return len(self.left) * self.layout.rank**2

    @property
    def bytes(self) -> int:
        """Of U and V."""
        return 4 * sum(t.numel() for t in (*self.left, *self.layout.frozen.values()))


def basis(layout: AdapterLayout, row: torch.Tensor) -> Basis:
    """The singular vectors of each layer's B A in an adapter's row (P,)."""
    left, right = list[torch.Tensor](), dict[str, torch.Tensor]()
    for name, a, b in layout.split(row[None]):
        u, _, v = torch.linalg.svd(b.reshape(-1, layout.rank).cpu() @ a.reshape(layout.rank, -1).cpu())
        left.append(u[:, : layout.rank] * (len(u) / layout.rank) ** 0.5)
        right[name] = v[: layout.rank].to(row.device)
    return Basis(replace(layout, factors="b", frozen=right), left)


class Core(Prompting):
    """Prompts as they are set, and a core of one's own."""

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        layout = context.lm.lora_layout(context.config.adapter)
        self.basis = basis(layout, layout.start(0).to(context.lm.engine.device))
        self.adapters: Adapters | None = None

    def learn(self, others: Sequence[Person]) -> None:
        """Trains one adapter on all that these people said, and keeps what it spans."""
        Prompting.prepare(self, others)
        config, every = self.context.config, [example for own in self.examples() for example in own]
        trained = self.context.train(config.adapter, config.training, [every], ["basis"])
        assert isinstance(trained.layout, AdapterLayout)
        self.basis = basis(trained.layout, trained.rows[0])

    def adapt(self, examples: Sequence[Sequence[Dialogue]]) -> None:
        self._serve(self._trained(torch.zeros(len(examples), self.basis.width), examples))

    def _trained(self, start: torch.Tensor, examples: Sequence[Sequence[Dialogue]]) -> torch.Tensor:
        """Cores (K, L · r · r)."""
        self.count(trained=self.context.config.training.epochs * sum(self.tokens(own) for own in examples))
        names = [p.id for p in self.people]
        return train_through(self.context, self.basis.layout, start, self.basis.rows, examples, names)

    def _serve(self, cores: torch.Tensor) -> None:
        self.adapters = self.context.lm.adapters(self.basis.layout, self.basis.rows(cores))

    def serving(self, asked: Sequence[tuple[int, Asked]]) -> Served:
        return self.served(asked, self.adapters)

    @property
    def kept_bytes(self) -> float:
        return super().kept_bytes + 4 * self.basis.width

    @property
    def fetched_bytes(self) -> float:
        return float(self.basis.bytes)
