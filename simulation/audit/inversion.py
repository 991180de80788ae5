"""Gradient inversion: somebody who reads a release writes down what the device's user said.

The hardest case for a device: it met one dialogue, trained one step on it, and the attacker knows the prompt, how long
the reply is and a list of words that it is made of. The reply is searched word by word for the one whose gradient
points where the release does (the discrete part of LAMP, Balunović et al. 2022, arXiv 2202.08827). Guessing finds one
word of the list's length. Not covered: attacks by optimization of embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from florilegium.client.config import DeviceConfig
from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.model import LanguageModel
from florilegium.client.words import bare
from florilegium.privacy.seeds import derive_seed
from florilegium.server.config import ServerConfig
from florilegium.simulation.audit.attacks import trusted
from florilegium.simulation.audit.checks import named, one_round, summed_over
from florilegium.simulation.engines.in_memory import Federated, federate_in_memory

LISTED = 64  # words that the attacker chooses from
LONG = 5  # words of the reply
SWEEPS = 2


def reconstructed(
    lm: LanguageModel, config: DeviceConfig, streams: Sequence[Sequence[Dialogue]], targets: int, seed: int
) -> tuple[float, float]:
    """The share of words that are found in so many replies, and the one that guessing finds."""
    rng = np.random.Generator(np.random.Philox(key=derive_seed(seed, "inversion")))
    often, counts = np.unique([w for s in streams for d in s for w in bare(d.response)], return_counts=True)
    words = often[np.argsort(-counts, kind="stable")][:LISTED].tolist()
    said = [rng.choice(len(words), size=LONG).tolist() for _ in range(targets)]
    prompts = [streams[k % len(streams)][0] for k in range(targets)]
    met = [[Dialogue(p.id, p.prompt, _reply(words, chosen))] for p, chosen in zip(prompts, said, strict=True)]
    one = summed_over(one_round(config, sampling_rate=1.0, pool_capacity=1), targets)
    seen = federate_in_memory(lm, one, ServerConfig(), named(met), seed, at_once=True)
    found = [
        _searched(seen, k, prompts[k].prompt, words, rng.choice(len(words), size=LONG).tolist()) for k in range(targets)
    ]
    right = float(
        np.mean([a == b for one, two in zip(found, said, strict=True) for a, b in zip(one, two, strict=True)])
    )
    return right, 1 / len(words)


def _searched(seen: Federated, device: int, prompt: str, words: Sequence[str], guess: list[int]) -> list[int]:
    """Each place of the guess in turn takes the word with which the gradient matches the release best."""
    lm = seen.context.lm
    released = -(seen.aggregated[0] if trusted(seen) else seen.cohort.changes[0][device])  # (P,)
    adapters = lm.adapters(seen.context.shared_layout, seen.cohort.received[0])
    for _ in range(SWEEPS):
        for place in range(len(guess)):
            tried = [[*guess[:place], w, *guess[place + 1 :]] for w in range(len(words))]
            replies = [_reply(words, chosen) for chosen in tried]
            guess = tried[int(_match(lm, adapters, prompt, replies, released).argmax())]
    return guess


def _match(
    lm: LanguageModel, adapters: Adapters, prompt: str, replies: Sequence[str], released: torch.Tensor
) -> torch.Tensor:
    """(n,): cosine of each reply's gradient with what was released."""
    examples = lm.format.dialogues([Dialogue("", prompt, reply) for reply in replies])
    (gradients,), _ = lm.engine.dp_gradients(adapters, [], [examples])
    return torch.nn.functional.cosine_similarity(gradients, released[None], dim=1)


def _reply(words: Sequence[str], chosen: Sequence[int]) -> str:
    return " ".join(words[w] for w in chosen)
