"""What somebody could learn from what left the devices: each attack gives scores, higher where it believes "yes".

Membership, on the aggregated adapter: loss; loss against the base model's (reference ratio, Carlini et al. 2022);
Min-K%++ (Zhang et al. 2024, arXiv 2404.02936). On one device's releases: the inner product with the dialogue's own
gradient. Re-identification: which of the later releases is of the same device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from client.dialogue import Dialogue
from client.lm.adapter import Adapters
from client.lm.model import LanguageModel
from simulation.audit.canaries import Canary, Federated, scores

LOWEST = 0.2  # share of a reply's tokens that Min-K%++ looks at


def membership(seen: Federated, dialogues: Sequence[Canary]) -> dict[str, np.ndarray]:
    """Scores (n,) of each attack for dialogues that devices did or did not have."""
    lm = seen.site.lm
    texts = [c.dialogue for c in dialogues]
    after = [lm.adapters(seen.site.shared_layout, seen.last)]
    loss, before = _losses(lm, texts, after), _losses(lm, texts, [])
    return {
        "loss": -loss,
        "reference": before - loss,
        "min-k%++": _min_k(lm, texts, after),
        "gradient of the device's releases": scores(seen, dialogues),
    }


def reidentified(seen: Federated) -> np.ndarray:
    """(K, K): cosine of device i's first release with device j's second; the diagonal is the same device."""
    first, second = (torch.nn.functional.normalize(c, dim=1) for c in seen.changes[:2])
    similar: np.ndarray = (first @ second.T).numpy()
    return similar


def _losses(lm: LanguageModel, texts: Sequence[Dialogue], adapters: Sequence[Adapters]) -> np.ndarray:
    """(n,) nats per token."""
    found = lm.score(lm.format.dialogues(texts), [0] * len(texts), adapters)
    return np.array([s.nll / max(1, s.tokens) for s in found])


@torch.inference_mode()
def _min_k(lm: LanguageModel, texts: Sequence[Dialogue], adapters: Sequence[Adapters]) -> np.ndarray:
    """Mean over the reply's least likely tokens of (log p − µ) / σ, both over the whole vocabulary."""
    examples, found = lm.format.dialogues(texts), np.zeros(len(texts))
    for i, hidden in lm.engine.hidden(examples, adapters):
        start, targets = len(examples[i].prompt), torch.tensor(examples[i].reply, device=hidden.device)
        chances = torch.log_softmax(lm.engine.logits(hidden[start - 1 : start - 1 + len(targets)]).float(), dim=1)
        mean = (chances.exp() * chances).sum(1)
        spread = ((chances.exp() * chances.square()).sum(1) - mean.square()).clamp_min(1e-6).sqrt()
        standing = (chances.gather(1, targets[:, None])[:, 0] - mean) / spread  # (n,)
        kept = max(1, round(LOWEST * len(standing)))
        found[i] = float(standing.topk(kept, largest=False).values.mean())
    return found
