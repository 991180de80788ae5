"""AdamW over the rows of a cohort: each device has its own step count, and those that rest stay as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Moments:
    """The optimizer's state of K devices."""

    mean: torch.Tensor  # (K, P)
    square: torch.Tensor  # (K, P)
    steps: torch.Tensor  # (K,)

    @classmethod
    def zeros(cls, like: torch.Tensor) -> Moments:
        return cls(torch.zeros_like(like), torch.zeros_like(like), torch.zeros(len(like), device=like.device))


def adamw_(
    rows: torch.Tensor,
    gradient: torch.Tensor,
    moments: Moments,
    moving: torch.Tensor,
    rate: torch.Tensor,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """One step of AdamW (Loshchilov & Hutter 2019) in place on the rows (K, P) that `moving` (M,) names.

    `gradient` is (K, P), `rate` (K,). Equal to `torch.optim.AdamW` on each row alone.
    """
    grad = gradient[moving]
    steps = moments.steps[moving] + 1
    mean = moments.mean[moving].lerp_(grad, 1 - betas[0])
    square = moments.square[moving].mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    correction = (1 - betas[1] ** steps).sqrt()[:, None]
    size = (rate[moving] / (1 - betas[0] ** steps))[:, None]
    decayed = rows[moving] * (1 - rate[moving] * weight_decay)[:, None]
    rows[moving] = decayed - size * mean / ((square.sqrt() / correction).add_(eps))
    moments.mean[moving], moments.square[moving], moments.steps[moving] = mean, square, steps
