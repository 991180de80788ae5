"""The quality scores of Qin et al. (DAC 2024, arXiv 2311.12275, §3.2); higher is better for all three."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from client.lexicons import Lexicons, words


def entropy_of_embedding(token_norms: torch.Tensor) -> float:
    """EOE = −Σ p_i log p_i / log n with p_i = ‖e_i‖ / Σ‖e_j‖ over the n tokens (n,); 0 for a single token.

    The paper does not define p; this is the reading over tokens.
    """
    n = len(token_norms)
    if n < 2:
        return 0.0
    p = token_norms.double() / token_norms.double().sum()
    return float(-(p * p.clamp_min(1e-12).log()).sum() / math.log(n))


def domain_specific_score(text: str, lexicons: Lexicons) -> float:
    """DSS = (1/m) Σ |T ∩ l_i| / n over m lexicons, n words in T; 0 for a text without words."""
    tokens = words(text)
    if not tokens or not lexicons:
        return 0.0
    hits = sum(token in listed for listed in lexicons.values() for token in tokens)
    return hits / len(tokens) / len(lexicons)


def dominant_domain(text: str, lexicons: Lexicons) -> str:
    """argmax over lexicons of |T ∩ l_i|, the first of equals; empty where no word is in any."""
    tokens = words(text)
    hits = {name: sum(token in listed for token in tokens) for name, listed in lexicons.items()}
    best = max(hits, key=lambda name: hits[name], default="")
    return best if best and hits[best] else ""


def in_domain_dissimilarity(embedding: torch.Tensor, neighbours: Sequence[torch.Tensor]) -> float:
    """IDD = (1/R) Σ (1 − cos(E, E_i)) over the R buffered sets of the same domain; 1 where there is none."""
    if not neighbours:
        return 1.0
    others = torch.stack(list(neighbours)).float()  # (R, H)
    return float((1 - torch.cosine_similarity(embedding.float()[None], others)).mean())
