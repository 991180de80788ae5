"""What somebody could learn from what left the devices: each attack gives scores, higher where it believes "yes".

Membership: loss; loss against the base model's (reference ratio, Carlini et al. 2022); Min-K%++ (Zhang et al. 2024,
arXiv 2404.02936); each on the aggregated adapter and on what the device itself released; and the inner product of
what was released with the dialogue's own gradient. Re-identification: which later release is of the same device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from florilegium.client.dialogue import Dialogue
from florilegium.simulation.audit.canaries import Canary
from florilegium.simulation.engines.in_memory import Federated

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
    return found | {"gradient, releases": gradient_scores(seen, dialogues)}


def _released(seen: Federated) -> dict[str, torch.Tensor]:
    """Shared adapters as the server has them: the last aggregate (1, P), and each device's own last release (K, P)."""
    aggregate = {"aggregate": seen.shared[None]}
    if trusted(seen):
        return aggregate
    own = seen.cohort.received[0].repeat(len(seen.cohort.streams), 1)
    for received, changes in zip(seen.cohort.received, seen.cohort.changes, strict=True):
        sent = changes.any(1)  # a device need not be asked in the last round
        own[sent] = (received + changes)[sent]
    return aggregate | {"own release": own}


def trusted(seen: Federated) -> bool:
    """Whether the server is, or learns a sum alone: then only what it makes of releases is there to be attacked."""
    return seen.context.config.privacy.seen_as_sums


def gradient_scores(seen: Federated, dialogues: Sequence[Canary]) -> np.ndarray:
    """(n,): over the rounds, how far what was released moved against a dialogue's own gradient, at length 1.

    What was released are the changes of the dialogue's own device; where devices trust the server, those of all
    together.
    """
    context, total = seen.context, np.zeros(len(dialogues))
    released = [c[None] for c in seen.aggregated] if trusted(seen) else seen.cohort.changes  # by round, (K or 1, P)
    owners = [0 if trusted(seen) else c.device for c in dialogues]
    examples = context.lm.format.dialogues([c.dialogue for c in dialogues])
    for received, changes in zip(seen.cohort.received, released, strict=True):
        adapters = context.lm.adapters(context.shared_layout, received)
        (gradients,), _ = context.lm.engine.dp_gradients(adapters, [], [examples])
        directions = torch.nn.functional.normalize(gradients, dim=1)  # (n, P)
        total -= (directions * changes[owners]).sum(1).double().numpy()
    return total


def reidentified(seen: Federated) -> np.ndarray:
    """(K, K): cosine of device i's first release with device j's second; the diagonal is the same device."""
    first, second = (torch.nn.functional.normalize(c, dim=1) for c in seen.cohort.changes[:2])
    similar: np.ndarray = (first @ second.T).numpy()
    return similar


def _losses(seen: Federated, texts: Sequence[Dialogue], slots: Sequence[int], rows: torch.Tensor | None) -> np.ndarray:
    """(n,) nats per token, each under the shared adapter rows[slot], or under none."""
    lm = seen.context.lm
    adapters = [] if rows is None else [lm.adapters(seen.context.shared_layout, rows)]
    found = lm.score(lm.format.dialogues(texts), slots, adapters)
    return np.array([s.nll / max(1, s.tokens) for s in found])


@torch.inference_mode()
def _min_k(seen: Federated, texts: Sequence[Dialogue], slots: Sequence[int], rows: torch.Tensor) -> np.ndarray:
    """Mean over the reply's least likely tokens of (log p − µ) / σ, both over the whole vocabulary."""
    lm, found = seen.context.lm, np.zeros(len(texts))
    examples, adapters = lm.format.dialogues(texts), [lm.adapters(seen.context.shared_layout, rows)]
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
