"""Cross-entropy at the replies' tokens, in pieces: few logits exist at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from florilegium.client.lm.packing import rounded

PIECE = 1 << 21  # logits at a time


def token_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    softcap: float | None,
    piece: int = 0,
    scale: float = 1.0,
) -> torch.Tensor:
    """NLL (M,) in nats, float32, of `targets` (M,) given the last hidden states (M, H) before them.

    The arguments beside them are those of `logits`.
    With a `piece` each product is of exactly so many tokens, the last filled up, whatever M is.
    """
    count = len(hidden)
    filler = -count % piece if piece else rounded(count) - count
    hidden, targets = F.pad(hidden, (0, 0, 0, filler)), F.pad(targets, (0, filler))
    step = piece or max(16, PIECE // len(weight) // 16 * 16)  # no piece is of fewer rows, but the last
    losses: torch.Tensor = _TokenLosses.apply(hidden, weight, bias, targets, softcap, scale, step)  # type: ignore[no-untyped-call]
    return losses[:count]


def logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    scale: float = 1.0,
) -> torch.Tensor:
    """(M, H) → (M, V): what the head gives, times `scale` (Cohere, Granite), then capped (Gemma 2)."""
    scores = F.linear(hidden, weight, bias)
    if scale != 1:
        scores.mul_(scale)
    return scores.div_(softcap).tanh_().mul_(softcap) if softcap else scores


class _TokenLosses(torch.autograd.Function):
    """-log softmax(W h)_t and, as long as the piece is at hand, its derivative by h: Wᵀ (softmax - onehot)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        softcap: float | None,
        scale: float,
        step: int,
    ) -> torch.Tensor:
        losses = torch.empty(len(hidden), device=hidden.device)
        derivative = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), step):
            piece = slice(start, start + step)
            scores, target = logits(hidden[piece], weight, bias, softcap, scale), targets[piece, None]
            chances = torch.softmax(scores, -1, dtype=torch.float32)
            log_sum = scores.amax(-1).float() - chances.amax(-1).log()  # the largest chance is exp(0) / Σ
            losses[piece] = log_sum - scores.gather(1, target)[:, 0]
            if derivative is not None:
                slope = chances.scatter_add_(1, target, -torch.ones_like(target, dtype=torch.float32))
                if softcap:
                    slope.mul_(1 - (scores.float() / softcap).square_())
                if scale != 1:
                    slope.mul_(scale)
                torch.mm(slope.to(weight.dtype), weight, out=derivative[piece])
        if derivative is not None:
            ctx.save_for_backward(derivative)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (derivative,) = ctx.saved_tensors
        return derivative * grad[:, None].to(derivative.dtype), *[None] * 6
