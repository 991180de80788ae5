"""What somebody could learn from what left the devices: each attack gives scores, higher where it believes "yes".

Membership: loss; loss against the base model's (reference ratio, Carlini et al. 2022); Min-K%++ (Zhang et al. 2024,
arXiv 2404.02936); each on the aggregated adapter and on what the device itself released; and the inner product of
what was released with the dialogue's own gradient. Exposure: rank of what was met among what was not (Carlini et al.
2019, arXiv 1802.08232). Re-identification: which of the later releases is of the same device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from client.dialogue import Dialogue
from simulation.audit.canaries import Canary
from simulation.federation import Federated

LOWEST = 0.2  # share of a reply's tokens that Min-K%++ looks at


def membership(seen: Federated, dialogues: Sequence[Canary]) -> dict[str, np.ndarray]:
    """Scores (n,) of each attack for dialogues that devices did or did not meet."""
    texts, devices = [c.dialogue for c in dialogues], [c.device for c in dialogues]
    before = _losses(seen, texts, [0] * len(texts), None)
    found = {}
    for where, rows in _released(seen).items():
        slots = devices if len(rows) > 1 else [0] * len(texts)
        loss = _losses(seen, texts, slots, rows)
        found[f"loss, {where}"] = -loss
        found[f"reference ratio, {where}"] = before - loss
        found[f"Min-K%++, {where}"] = _min_k(seen, texts, slots, rows)
    return found | {"gradient, releases": gradient_scores(seen, dialogues).diagonal}


def _released(seen: Federated) -> dict[str, torch.Tensor]:
    """Shared adapters as the server has them: the last aggregate (1, P), and each device's own last release (K, P)."""
    aggregate = {"aggregate": seen.shared[None]}
    if trusted(seen):
        return aggregate
    return aggregate | {"own release": seen.cohort.received[-1] + seen.cohort.changes[-1]}


def trusted(seen: Federated) -> bool:
    """Whether the server is: then only what it makes of releases is there to be attacked."""
    return seen.site.config.privacy.mode == "user-central"


@dataclass(frozen=True)
class Matches:
    """(n, K): over the rounds, how far what device k released moved against dialogue i's own gradient, at length 1.

    Where devices trust the server, K is 1: what was released are the changes of all together.
    """

    seen: Federated
    scores: np.ndarray
    devices: list[int]  # of each dialogue

    @property
    def diagonal(self) -> np.ndarray:
        """(n,): of each dialogue with its own device."""
        own: np.ndarray = self.scores[np.arange(len(self.scores)), self._places]
        return own

    @property
    def _places(self) -> list[int]:
        return self.devices if self.scores.shape[1] > 1 else [0] * len(self.devices)

    def exposure(self, members: np.ndarray) -> np.ndarray:
        """(n,) bits: log2 of how many there are by a dialogue's rank among those that nobody met, for its device.

        1.44 on average for one that was not met either.
        """
        strangers, found = self.scores[~members], np.zeros(len(self.scores))
        for i, (place, member) in enumerate(zip(self._places, members, strict=True)):
            above = int((strangers[:, place] > self.scores[i, place]).sum())
            found[i] = np.log2((len(strangers) + member) / (1 + above))
        return found


def gradient_scores(seen: Federated, dialogues: Sequence[Canary]) -> Matches:
    """How well each dialogue's gradient matches what each device released."""
    site = seen.site
    released = [c[None] for c in seen.aggregated] if trusted(seen) else seen.cohort.changes  # by round, (K or 1, P)
    examples = site.lm.format.dialogues([c.dialogue for c in dialogues])
    total = np.zeros((len(dialogues), len(released[0])))
    for received, changes in zip(seen.cohort.received, released, strict=True):
        adapters = site.lm.adapters(site.shared_layout, received)
        (gradients,), _ = site.lm.engine.dp_gradients(adapters, [], [examples])
        total -= (torch.nn.functional.normalize(gradients, dim=1) @ changes.T).double().numpy()
    return Matches(seen, total, [c.device for c in dialogues])


def reidentified(seen: Federated) -> np.ndarray:
    """(K, K): cosine of device i's first release with device j's second; the diagonal is the same device."""
    first, second = (torch.nn.functional.normalize(c, dim=1) for c in seen.cohort.changes[:2])
    similar: np.ndarray = (first @ second.T).numpy()
    return similar


def _losses(seen: Federated, texts: Sequence[Dialogue], slots: Sequence[int], rows: torch.Tensor | None) -> np.ndarray:
    """(n,) nats per token, each under the shared adapter rows[slot], or under none."""
    lm = seen.site.lm
    adapters = [] if rows is None else [lm.adapters(seen.site.shared_layout, rows)]
    found = lm.score(lm.format.dialogues(texts), slots, adapters)
    return np.array([s.nll / max(1, s.tokens) for s in found])


@torch.inference_mode()
def _min_k(seen: Federated, texts: Sequence[Dialogue], slots: Sequence[int], rows: torch.Tensor) -> np.ndarray:
    """Mean over the reply's least likely tokens of (log p − µ) / σ, both over the whole vocabulary."""
    lm, found = seen.site.lm, np.zeros(len(texts))
    examples, adapters = lm.format.dialogues(texts), [lm.adapters(seen.site.shared_layout, rows)]
    for i, hidden in lm.engine.hidden(examples, adapters, slots):
        start, targets = len(examples[i].prompt), torch.tensor(examples[i].reply, device=hidden.device)
        logits = lm.engine.logits(hidden[start - 1 : start - 1 + len(targets)]).float()
        found[i] = _least_likely(torch.log_softmax(logits, dim=1), targets)
    return found


def _least_likely(chances: torch.Tensor, targets: torch.Tensor) -> float:
    """Of log-probabilities (n, V) and what came (n,)."""
    mean = (chances.exp() * chances).sum(1)
    spread = ((chances.exp() * chances.square()).sum(1) - mean.square()).clamp_min(1e-6).sqrt()
    standing = (chances.gather(1, targets[:, None])[:, 0] - mean) / spread  # (n,)
    return float(standing.topk(max(1, round(LOWEST * len(standing))), largest=False).values.mean())
