"""What can be read off a text's last hidden states besides their mean: a vector and a number, by name.

All come from the one forward pass that `embed` makes anyway; those that need logits add the head's product. The
random projections are the same on every device and after every restart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

SKETCH = 16  # rows and columns of a bilinear sketch
TOKENS = 4096  # rows of the projection over tokens; longer texts begin again


@dataclass(frozen=True)
class HiddenStates:
    """A text's tokens after the base model has read them."""

    hidden: torch.Tensor  # (n, H) float32
    before: torch.Tensor  # (m, H), the states that predict `ids`: m = n, or n - 1 where nothing comes first
    ids: torch.Tensor  # (m,)
    head: Callable[[torch.Tensor], torch.Tensor]  # (m, H) → logits (m, V)


@dataclass(frozen=True)
class Feature:
    """A vector by which texts are compared, and a number by which they are ranked."""

    vector: torch.Tensor  # (D,) float32 on the CPU
    value: float = 0.0


def mean(sight: HiddenStates) -> Feature:
    """The mean of the hidden states; zeros for a text without words."""
    return Feature((sight.hidden.sum(0) / max(1, len(sight.hidden))).cpu())


def weighted(sight: HiddenStates) -> Feature:
    """RDS+ (Ivison et al. 2025): the i-th of n tokens weighs i, since a causal model's later states have seen more."""
    weight = torch.arange(1, len(sight.hidden) + 1, dtype=torch.float32, device=sight.hidden.device)
    return Feature((weight @ sight.hidden / weight.sum().clamp_min(1)).cpu())


def likelihood(sight: HiddenStates) -> Feature:
    """The mean NLL of the text's own tokens, nats: the logarithm of its perplexity."""
    if not len(sight.ids):
        return mean(sight)
    nll = torch.nn.functional.cross_entropy(sight.head(sight.before).float(), sight.ids)
    return Feature(mean(sight).vector, float(nll))


def nuclear(sight: HiddenStates) -> Feature:
    """UDS (Zou et al., arXiv 2510.16882): ‖L‖_* of the logits L (n, V), and a bilinear random projection of L.

    The norm is Σ √λ over the eigenvalues λ of L Lᵀ. The i-th token of every text has the same row of the projection,
    so that texts of different lengths can be compared.
    """
    logits = sight.head(sight.hidden).float()  # (n, V)
    eigenvalues = torch.linalg.eigvalsh((logits @ logits.T).double()).clamp_min(0)
    place = torch.arange(len(logits), device=logits.device) % TOKENS
    by_token = _gaussian(TOKENS, SKETCH, "tokens", logits.device)[place]  # (n, 16)
    by_word = _gaussian(logits.shape[1], SKETCH, "vocabulary", logits.device)  # (V, 16)
    sketch = by_token.T @ (logits @ by_word)  # (16, 16)
    return Feature(sketch.flatten().cpu(), float(eigenvalues.sqrt().sum()))


def gradient(sight: HiddenStates) -> Feature:
    """OASIS (arXiv 2506.02011): norm and sketch of the gradient G of the text's mean NLL in the head's weight.

    G = (1/m) Σ (softmax − onehot) hᵀ is never formed: ‖G‖² = Σ (E Eᵀ) ∘ (H Hᵀ) / m², and the sketch is S_v G S_h.
    """
    m, states = max(1, len(sight.ids)), sight.before
    if not len(sight.ids):
        return Feature(torch.zeros(SKETCH * SKETCH))
    error = torch.softmax(sight.head(states).float(), -1)  # (m, V)
    error[torch.arange(m, device=error.device), sight.ids] -= 1
    states = states.float()
    norm = ((error @ error.T) * (states @ states.T)).sum().clamp_min(0).sqrt() / m
    left = error @ _gaussian(error.shape[1], SKETCH, "vocabulary", error.device)  # (m, 16)
    right = states @ _gaussian(states.shape[1], SKETCH, "hidden", states.device)  # (m, 16)
    return Feature((left.T @ right / m).flatten().cpu(), float(norm))


FEATURES: dict[str, Callable[[HiddenStates], Feature]] = {
    "mean": mean,
    "weighted": weighted,
    "likelihood": likelihood,
    "nuclear": nuclear,
    "gradient": gradient,
}


@lru_cache(maxsize=8)
def _gaussian(rows: int, columns: int, purpose: str, device: torch.device) -> torch.Tensor:
    """A fixed random matrix with variance 1/16: products with it keep lengths on average (Johnson-Lindenstrauss)."""
    generator = torch.Generator().manual_seed(sum(purpose.encode()) * 1_000_003 + rows * 1009 + columns)
    values = torch.randn(rows, columns, generator=generator).to(device)
    return values / math.sqrt(SKETCH)
