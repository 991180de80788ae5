"""AdamW over the rows of a cohort, each with its own rate and step count, by torch's fused kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw


@dataclass(frozen=True)
class Moments:
    """The optimizer's state of K devices."""

    mean: torch.Tensor  # (K, P)
    square: torch.Tensor  # (K, P)
    steps: list[torch.Tensor]  # K scalars

    @classmethod
    def zeros(cls, like: torch.Tensor) -> Moments:
        steps = [torch.zeros((), device=like.device) for _ in range(len(like))]
        return cls(torch.zeros_like(like), torch.zeros_like(like), steps)


def adamw_(
    rows: torch.Tensor,
    gradient: torch.Tensor,
    moments: Moments,
    devices: Sequence[int],
    rates: Sequence[float],
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """One step of AdamW (Loshchilov & Hutter 2019) in place on the M `devices` of the rows (K, P).

    `gradient` is (M, P), `rates` has M. Equal to `torch.optim.AdamW` on each row alone.
    """
    for rate in dict.fromkeys(rates):
        places = [i for i, r in enumerate(rates) if r == rate]
        same = [devices[i] for i in places]
        adamw(
            [rows[k] for k in same],
            [gradient[i] for i in places],
            [moments.mean[k] for k in same],
            [moments.square[k] for k in same],
            [],
            [moments.steps[k] for k in same],
            fused=True,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=rate,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )
