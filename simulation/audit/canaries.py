"""One-run audit: canaries sent through the real round, and what the releases say about which of them were in.

A canary is a dialogue of random words. A fair coin decides whether it takes the place of one that the user really had:
the neighbours of the accounting ("replace one"). The attacker knows the model, every canary and every release, and
scores a canary by how far its device's releases moved against its gradient. (Steinke et al. 2023; with the canaries
spread over many devices, each of which is a mechanism of its own.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from client.config import DeviceConfig
from client.dialogue import Dialogue
from client.lm.model import LanguageModel
from client.phases import Site
from client.round import contribute
from privacy.ledger import Ledger
from privacy.plan import RoundPlan
from privacy.seeds import derive_seed

WORDS = 12  # of a canary's prompt and of its reply


@dataclass(frozen=True)
class Canary:
    """A dialogue that may have been met by one device."""

    device: int
    dialogue: Dialogue
    member: bool


@dataclass(frozen=True)
class Federated:
    """What a server saw: the adapter before each round and every device's change in it."""

    site: Site
    received: list[torch.Tensor]  # by round, (P,)
    changes: list[torch.Tensor]  # by round, (K, P); zero for a device that sent nothing

    @property
    def last(self) -> torch.Tensor:
        """The shared adapter (P,) after all rounds."""
        return self.received[-1] + self.changes[-1].mean(0)


def plant(
    streams: Sequence[Sequence[Dialogue]], each: int, lm: LanguageModel, seed: int
) -> tuple[list[list[Dialogue]], list[Canary]]:
    """The streams with `each` of a device's dialogues up for replacement, and the canaries."""
    rng = np.random.Generator(np.random.Philox(key=derive_seed(seed, "canaries")))
    words = sorted({w for stream in streams for d in stream for w in d.prompt.split() if w.isalpha()})
    planted, canaries = [list(stream) for stream in streams], []
    for device, stream in enumerate(planted):
        for place in rng.choice(len(stream), size=each, replace=False):
            prompt, reply = (" ".join(rng.choice(words, size=WORDS)) for _ in range(2))
            canary = Canary(device, Dialogue(stream[place].id, prompt, reply), bool(rng.random() < 0.5))
            canaries.append(canary)
            if canary.member:
                stream[place] = canary.dialogue
    return planted, canaries


def federate(lm: LanguageModel, config: DeviceConfig, streams: Sequence[Sequence[Dialogue]], seed: int) -> Federated:
    """All rounds of all devices, each with its whole stream from the first round on; the server takes means."""
    names = [f"audited-{k:05d}" for k in range(len(streams))]
    replies = {name: {d.id: d.response for d in stream} for name, stream in zip(names, streams, strict=True)}
    with TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.db")
        site = Site.of(lm, config, seed, lambda device, dialogue: replies[device][dialogue], ledger=ledger)
        states = [site.new_state(name) for name in names]
        shared = site.shared_layout.start(derive_seed(seed, "shared"))
        received, changes = [], []
        for number in range(1, config.rounds + 1):
            arrived = streams if number == 1 else [()] * len(streams)
            states, releases, _ = contribute(states, arrived, shared, RoundPlan(number, number - 1), site)
            schema, rows = site.schema.of_round(number), np.zeros((len(streams), len(shared)), np.float32)
            for k, r in enumerate(releases):
                if r:
                    rows[k, site.schema.places(number)] = schema.join(r.arrays)
            received.append(shared)
            changes.append(torch.from_numpy(rows))
            shared = shared + changes[-1].mean(0)
    return Federated(replace(site, ledger=None), received, changes)


def scores(seen: Federated, canaries: Sequence[Canary]) -> np.ndarray:
    """(m,): over the rounds, the inner product of −change with the canary's own gradient at length 1."""
    site, total = seen.site, np.zeros(len(canaries))
    examples = site.lm.format.dialogues([c.dialogue for c in canaries])
    owners = [c.device for c in canaries]
    for received, changes in zip(seen.received, seen.changes, strict=True):
        adapters = site.lm.adapters(site.shared_layout, received)
        (gradients,), _ = site.lm.engine.dp_gradients(adapters, [], [examples])
        directions = torch.nn.functional.normalize(gradients, dim=1)  # (m, P)
        total -= (directions * changes[owners]).sum(1).double().numpy()
    return total
