"""The quality scores of Qin et al. (DAC 2024, arXiv 2311.12275, §3.2); higher is better for all three.

Pure functions of what a model and word lists say of a text. Which readings are ours, where the paper is silent, is
said at each.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from florilegium.client.selection.entry import Vectors
from florilegium.client.selection.lexicons import Lexicons, hits, runs, words

if TYPE_CHECKING:
    import torch


def entropy_over_tokens(token_norms: torch.Tensor) -> float:
    """EOE = −Σ p_i log p_i / log n with p_i = ‖e_i‖ / Σ‖e_j‖ over the n tokens (n,); 0 for a single token.

    The paper does not define p; this is the reading over tokens.
    """
    return _normalised_entropy(token_norms)


def entropy_over_dimensions(embedding: torch.Tensor) -> float:
    """EOE with p_d = |v_d| / Σ|v_d| over the n dimensions of the pooled embedding (n,): the other reading."""
    return _normalised_entropy(embedding.abs())


def domain_specific_score(text: str, lexicons: Lexicons) -> float:
    """DSS = (1/m) Σ |T ∩ l_i| / n over m lexicons, n words in T; 0 for a text without words."""
    tokens, said = words(text), runs(text)
    if not tokens or not lexicons:
        return 0.0
    found = sum(len(hits(said, listed)) for listed in lexicons.values())
    return found / len(tokens) / len(lexicons)


def dominant_domain(text: str, lexicons: Lexicons) -> str:
    """argmax over lexicons of |T ∩ l_i|, the first of equals; empty where no word is in any."""
    said = runs(text)
    found = {name: len(hits(said, listed)) for name, listed in lexicons.items()}
    best = max(found, key=lambda name: found[name], default="")
    return best if best and found[best] else ""


def in_domain_dissimilarity(embedding: Vectors, neighbours: Vectors) -> float:
    """IDD = (1/R) Σ (1 − cos(E, E_i)) of E (H,) to the R buffered sets (R, H) of the same domain.

    1 where there is none, which the paper leaves open.
    """
    if not len(neighbours):
        return 1.0
    return float(1 - (unit(neighbours) @ unit(embedding)).mean())


def unit(vectors: Vectors) -> Vectors:
    """Vectors (…, H) at length 1 in float32; zeros stay zeros."""
    vectors = vectors.astype(np.float32, copy=False)
    length: Vectors = np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    scaled: Vectors = vectors / length
    return scaled


def _normalised_entropy(weights: torch.Tensor) -> float:
    n, total = len(weights), weights.double().sum()
    if n < 2 or not total:
        return 0.0
    p = weights.double() / total
    return float(-(p * p.clamp_min(1e-12).log()).sum() / math.log(n))
