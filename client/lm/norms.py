"""RMS normalisation in few passes over memory (Zhang & Sennrich 2019, arXiv 1910.07467), in place of the model's own.

A model's own takes eight operations and as many copies. Not covered: other norms; they stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """`w · x / √(mean(x²) + ε)` over the last dimension, w frozen."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., H) → (..., H)."""
        y: torch.Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """With u = x / rms and g = w · dy: dx = (g - u · mean(g · u)) / rms."""
        x, weight = ctx.saved_tensors
        inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + ctx.eps).to(x.dtype)  # (..., 1)
        scaled, unit = grad * weight, x * inverse
        common = (scaled * unit).mean(-1, keepdim=True, dtype=torch.float32).to(x.dtype)
        return torch.addcmul(scaled, unit, common, value=-1).mul_(inverse), None, None


@torch.no_grad()
def replace_norms(model: nn.Module) -> None:
    """Puts `RMSNorm` in the place of each module that is one by its name and by what it computes."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), torch.Tensor):
            ours = _same(module)
            if ours is not None:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, ours)


def _same(module: Any) -> RMSNorm | None:
    """Ours with the weight w or, as Gemma has it, 1 + w, whichever gives what `module` gives."""
    weight, eps = module.weight, float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)))
    probe = torch.linspace(-2, 3, 2 * weight.numel(), device=weight.device).view(2, -1).to(weight.dtype)
    exact = 1e-5 if weight.dtype == torch.float32 else 2e-2
    for factor in (weight, (1 + weight.float()).to(weight.dtype)):
        ours = RMSNorm(factor.clone(), eps)
        if torch.allclose(ours(probe), module(probe), rtol=exact, atol=1e-5):
            return ours
    return None
