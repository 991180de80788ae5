"""Decoding by contrast of a model with its adapters and without (CoPe, arXiv 2506.12109).

The reward of a token is how much likelier the adapters have made it, log p_personal − log p_base; added to the
personal model's own opinion with a strength, it is

    log p = (1 + strength) · log p_personal − strength · log p_base + const

where p_personal ≥ plausible · max p_personal, and p = 0 elsewhere: a token that neither model would say does not win by
a ratio of two small numbers. With strength 0 that is the personal model's own choice. Not covered: the paper's training
of the personal model by the same reward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Contrast:
    """How strong the contrast is, and how likely a token must be, as a share of the likeliest one's chance."""

    strength: float
    plausible: float


def contrasted(personal: torch.Tensor, base: torch.Tensor, contrast: Contrast) -> torch.Tensor:
    """Logits (R, V) of the contrast, float32, of the logits (R, V) of both; −∞ where a token is not plausible.

    Logits are log-probabilities but for a constant of each row, which changes no choice.
    """
    own = personal.float()
    found = torch.lerp(base.float(), own, 1 + contrast.strength)  # base + (1 + strength) (own − base)
    least = own.amax(-1, keepdim=True) + math.log(contrast.plausible)
    return found.masked_fill_(own < least, -torch.inf)
