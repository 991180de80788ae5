"""One adapter a person, that learns what the person would rather have said (RPO, Yin et al. 2024, arXiv 2402.10958).

A person's own replies are chosen over those that the model would have given. Within a batch each chosen reply is
compared with each rejected one, by w_ij = exp(cos_ij / τ) / Σ_j exp(cos_ij / τ), cos_ij that of the embeddings of their
prompts: replies to prompts that have nothing to do with each other hardly count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.batching import schedule
from florilegium.client.personalization.oppu import Oppu
from florilegium.client.personalization.preference import Preferences, prefer
from florilegium.privacy.seeds import derive_seed


class Rpo(Oppu):
    """Prompts as they are set, and an adapter trained on pairs of replies."""

    def adapt(self, examples: Sequence[Sequence[Dialogue]]) -> None:
        config, lm = self.context.config, self.context.lm
        training, layout = config.training, lm.layout(config.adapter)
        start = torch.stack([layout.start(derive_seed(self.context.seed, "personal", "start")) for _ in examples])
        rejected = self.replies_of_model(examples)
        batches = [
            schedule(len(own), training.batch_size, training.epochs, derive_seed(self.context.seed, p.id, "rpo"))
            for own, p in zip(examples, self.people, strict=True)
        ]
        told = [
            [self._preferences(own, said, batch) for batch in order]
            for own, said, order in zip(examples, rejected, batches, strict=True)
        ]
        tokens = training.epochs * sum(
            self.tokens([*own, *(replace(e, response=r) for e, r in zip(own, replies, strict=True))])
            for own, replies in zip(examples, rejected, strict=True)
        )
        self.count(trained=tokens, read=2 * tokens)  # the rewards before and now
        self.adapters, _ = prefer(
            lm.engine, lm.adapters(layout, start), self.context.beneath, told, rate=training.learning_rate,
            beta=config.preference.beta, nll_weight=config.preference.nll_weight,
        )  # fmt: skip

    def _preferences(self, own: Sequence[Dialogue], said: Sequence[str], batch: Sequence[int]) -> Preferences:
        lm = self.context.lm
        chosen = [own[i] for i in batch]
        rejected = [replace(own[i], response=said[i]) for i in batch]
        vectors = torch.stack([f.readings["mean"].vector for f in lm.embed([d.prompt for d in chosen])])
        pairs = nearness(vectors, self.context.config.preference.temperature)
        return Preferences(lm.format.dialogues(chosen), lm.format.dialogues(rejected), pairs)


def nearness(prompts: torch.Tensor, temperature: float) -> torch.Tensor:
    """w (n, n) of prompts' embeddings (n, H): softmax over each row of their cosines by τ."""
    unit = torch.nn.functional.normalize(prompts, dim=1)
    return torch.softmax(unit @ unit.T / temperature, dim=1)
