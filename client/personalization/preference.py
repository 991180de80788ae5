"""Learning from what a person prefers: losses over the log-probabilities of replies, and their gradients.

With r(y) = log π(y|x) − log π_ref(y|x), the reference being the same model with the trained adapter off, a pair of a
chosen reply i and a rejected one j costs −log σ(β · w_ij · (r(y⁺_i) − r(y⁻_j))). With w the identity this is DPO
(Rafailov et al. 2023, arXiv 2305.18290); RPO (Yin et al. 2024, arXiv 2402.10958) also compares replies to different
prompts, w_ij being the more the nearer the prompts are. The derivative by the parameters is a weighted sum of those of
the replies' NLL, so that one pass for the values and one for a weighted gradient are all that is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.engine import Engine
from florilegium.client.lm.optimizer import Moments, adamw_
from florilegium.client.lm.packing import Example


@dataclass(frozen=True)
class Preferences:
    """What one person chose and rejected, and how much each pair of both counts."""

    chosen: Sequence[Example]
    rejected: Sequence[Example]
    pairs: torch.Tensor  # (chosen, rejected), w_ij; a pair with w = 0 is none


def value_and_weights(
    chosen: torch.Tensor, rejected: torch.Tensor, pairs: torch.Tensor, beta: float
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The mean loss over the pairs, and its derivatives by the NLL of the chosen (n,) and of the rejected replies (m,).

    `chosen` and `rejected` are the rewards r, nats.
    """
    counted = pairs > 0
    margin = beta * pairs * (chosen[:, None] - rejected[None])  # (n, m)
    count = max(1, int(counted.sum()))
    loss = float((torch.nn.functional.softplus(-margin) * counted).sum()) / count
    slope = beta * pairs * torch.sigmoid(-margin) * counted / count  # −∂loss/∂r⁺_i of each pair
    return loss, slope.sum(1), -slope.sum(0)  # r falls where the NLL rises


def prefer(
    engine: Engine,
    trained: Adapters,
    frozen: Sequence[Adapters],
    told: Sequence[Sequence[Preferences]],
    *,
    rate: float,
    beta: float = 0.1,
    nll_weight: float = 0.0,
) -> tuple[Adapters, list[list[float]]]:
    """Rows (K, P) after a step of AdamW on each of `told[k]`, and the losses, by person and step.

    `nll_weight` times the mean NLL of the chosen replies, nats a token, is added to the loss.
    """
    rows = trained.rows.clone()
    moments, losses = Moments.zeros(rows), [list[float]() for _ in told]
    for step in range(max(map(len, told), default=0)):
        busy = [k for k, own in enumerate(told) if step < len(own)]
        batches = [[*told[k][step].chosen, *told[k][step].rejected] for k in busy]
        slots = [k for k, batch in zip(busy, batches, strict=True) for _ in batch]
        every, sizes = [e for batch in batches for e in batch], [len(batch) for batch in batches]
        reference = torch.tensor(engine.score(every, slots, frozen)).split(sizes)
        now = torch.tensor(engine.score(every, slots, [*frozen, Adapters(trained.layout, rows)])).split(sizes)
        weights = []
        for k, nll, before in zip(busy, now, reference, strict=True):
            own, rewards = told[k][step], before - nll
            up_to, tokens = len(own.chosen), max(1, sum(e.targets for e in own.chosen))
            loss, up, down = value_and_weights(rewards[:up_to], rewards[up_to:], own.pairs, beta)
            weights.append([*(up + nll_weight / tokens).tolist(), *down.tolist()])
            losses[k].append(loss + nll_weight * float(nll[:up_to].sum()) / tokens)
        now_rows = Adapters(trained.layout, rows[busy])
        gradient, _ = engine.gradient(now_rows, [a.pick(busy) for a in frozen], batches, weights)
        adamw_(rows, gradient, moments, busy, [rate] * len(busy), 0.0)
    return Adapters(trained.layout, rows), losses
