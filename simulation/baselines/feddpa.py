"""FedDPA: a global and a local adapter, mixed anew for each query (Yang et al. 2024, NeurIPS, arXiv 2403.19211).

    y = W x + (1 − α) · B_g A_g x + α · B_l A_l x
    α = m · mean over own examples i of max(0, cos(h(query), h(i)))

h is the last layer's state of a prompt's last token under the local adapter alone, as in the authors' code, m the
largest weight (`baseline.mix`) and i a few examples that the device was trained on (`baseline.compared`, 5 there).
That no cosine counts as less than 0 is ours, so that α is in 0 … m. In training α is m itself: the global adapter is
learned alone and averaged, then the local one beside it, frozen (the iterative variant; the authors' code also trains
the global one beside the local, which is not done here).

A query is a slot of its own, its row's B scaled by its weight, so that the engine reads all of them in one pass.

What is sent is a change of the global adapter, which can be protected as ours is; α is computed where the query is
asked, from examples that never leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from florilegium.client.lm.adapter import AdapterLayout
from florilegium.client.lm.packing import Example
from florilegium.privacy.seeds import derive_seed
from florilegium.simulation.baselines.context import BaselineContext, Held, Lessons, halves
from florilegium.simulation.baselines.fedavg import fedavg, start_ours
from florilegium.simulation.evaluation.metrics import Arm, Queries

start = start_ours


def feddpa(held: Held, sets: Lessons, context: BaselineContext) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of the steps on the global adapter."""
    return fedavg(held, halves(sets)[0], context)


def after(held: Held, sets: Lessons, context: BaselineContext) -> torch.Tensor:
    """Then half on the local one beside it."""
    beside, local = arm(held, context)
    return context.train(local.layout, held.own, halves(sets)[1], [beside])


def arm(held: Held, context: BaselineContext) -> Arm:
    """Both adapters with the weights of training."""
    beside, local = layouts(context)
    return [context.lm.adapters(beside, held.shared), context.lm.adapters(local, held.own)]


def layouts(context: BaselineContext) -> tuple[AdapterLayout, AdapterLayout]:
    """Of the global and of the local adapter, with the weights of training."""
    weight = context.config.baseline.mix
    return _weighted(context.layout, 1 - weight), _weighted(context.layout, weight)


def by_query(held: Held, context: BaselineContext, queries: Queries, sets: Lessons) -> Arm:
    """Both adapters with a row for each query (Q, P), one device's queries after the other's."""
    weights, owners = mixed(held, context, queries, sets), [k for k, asked in enumerate(queries) for _ in asked]
    shared = scaled(context.layout, held.shared.expand(len(owners), -1), 1 - weights)
    own = scaled(context.layout, held.own[owners], weights)
    return [context.lm.adapters(context.layout, shared), context.lm.adapters(context.layout, own)]


def mixed(held: Held, context: BaselineContext, queries: Queries, sets: Lessons) -> torch.Tensor:
    """α (Q,) of each query, in 0 … m; a device that has learned nothing has α = 0."""
    settings = context.config.baseline
    known = [_few(x.examples, settings.compared, derive_seed(context.seed, k, "few")) for k, x in enumerate(sets)]
    prompts = context.lm.format.prompts([q.prompt for asked in queries for q in asked])
    examples = [*prompts, *(Example(e.prompt, (), e.words, e.truncated) for few in known for e in few)]
    slots = [k for group in (queries, known) for k, some in enumerate(group) for _ in some]
    own = [context.lm.adapters(context.layout, held.own)]
    last = {i: hidden[-1].float().cpu() for i, hidden in context.lm.engine.hidden(examples, own, slots)}
    states = torch.nn.functional.normalize(torch.stack([last[i] for i in range(len(examples))]), dim=1)  # (Q + N, H)
    asked, seen = states[: len(prompts)], states[len(prompts) :]
    same = torch.tensor(slots[: len(prompts)])[:, None] == torch.tensor(slots[len(prompts) :])[None]  # (Q, N)
    alike = (asked @ seen.T).clamp(0, 1) * same
    return settings.mix * alike.sum(1) / same.sum(1).clamp(min=1)


def scaled(layout: AdapterLayout, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Rows (Q, P) with the B of each times its weight (Q,)."""
    after = rows.clone()
    for _, _, b in layout.split(after):
        b.mul_(weights[:, None, None])
    return after


def _weighted(layout: AdapterLayout, weight: float) -> AdapterLayout:
    return replace(layout, alpha=layout.alpha * weight)


def _few(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    chosen = np.random.Generator(np.random.Philox(key=seed)).permutation(len(examples))[:count]
    return [examples[i] for i in sorted(chosen.tolist())]
