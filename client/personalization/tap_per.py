"""Two soft tokens, of who the person is by now and of what the question is near to (after TAP-PER, arXiv 2606.04547).

With f(h_i) the projected items of a history, oldest first, and n of them: the state is Σ_i λ_i f(h_i) / Σ_i λ_i,
λ_i = 2^{−(n − 1 − i) / T}, so that an item weighs half as much when T newer ones have come; the other token is
PPlug's, Σ_i softmax(x · h_i / τ) f(h_i) for a question x. f alone is trained, on people who are not evaluated.

Of the paper only an abstract was known here: a temporal prefix of a user's state and a part for the query. The decay by
place instead of by date, PPlug's form of the second part and one f for both are this project's.
"""

from __future__ import annotations

import torch

from florilegium.client.personalization.pplug import Pplug

HALF_LIFE = 8.0  # items


class TapPer(Pplug):
    """Two soft tokens for each question."""

    virtual_tokens = 2

    def token(self, question: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """(2 H,): the state, then the part of the question."""
        near = super().token(question, items)
        state: torch.Tensor = recency(len(items)) @ self.projection(items) if len(items) else near
        return torch.cat([state, near])


def recency(count: int) -> torch.Tensor:
    """λ (n,) of items, oldest first; they sum to 1."""
    weights = torch.exp2(-torch.arange(count - 1, -1, -1) / HALF_LIFE)
    return weights / weights.sum()
