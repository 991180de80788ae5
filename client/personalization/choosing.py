"""Methods that let the model write several replies and say the one that is worth most to the person (best of n).

The model is a black box to them: nothing of it is trained. The likelihood of a right reply is therefore the model's
own; what a method is worth shows in what is said. One candidate is greedy, the others are drawn at temperature 1.
Where a question has options these are the candidates, and nothing is written.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch

from florilegium.client.lm.config import SamplingConfig
from florilegium.client.personalization.history import Asked
from florilegium.client.personalization.method import Served
from florilegium.client.personalization.prompting import Prompting
from florilegium.privacy.seeds import derive_seed

CANDIDATES = 4


class Choosing(Prompting):
    """Prompts as they are set; of the candidates the one of the greatest worth, of equals the greedy one."""

    candidates = CANDIDATES

    @abstractmethod
    def worth(self, asked: Sequence[tuple[int, Asked]], replies: Sequence[str]) -> torch.Tensor:
        """(n,) of each of these replies to each of these people's questions; greater is better."""

    def reply(
        self,
        asked: Sequence[tuple[int, Asked]],
        prompts: Sequence[str],
        served: Served,
        sampling: SamplingConfig,
        seeds: Sequence[int],
    ) -> list[str]:
        written = [i for i, (_, question) in enumerate(asked) if not question.options]
        found = [list(question.options) for _, question in asked]
        some = Served([served.slots[i] for i in written], served.arm)
        drawn = SamplingConfig(max_new_tokens=sampling.max_new_tokens, temperature=1.0)
        for number in range(CANDIDATES):
            how = drawn if number else sampling
            own = [derive_seed(seeds[i], "candidate", number) >> 1 if number else seeds[i] for i in written]
            said = super().reply([asked[i] for i in written], [prompts[i] for i in written], some, how, own)
            for i, text in zip(written, said, strict=True):
                found[i].append(text)
        best = self.best(asked, found)
        return [q.labels[b] if q.options else of[b] for (_, q), of, b in zip(asked, found, best, strict=True)]

    def best(self, asked: Sequence[tuple[int, Asked]], candidates: Sequence[Sequence[str]]) -> list[int]:
        """Of each question's candidates the place of the one that is worth most."""
        every = [(question, text) for question, some in zip(asked, candidates, strict=True) for text in some]
        worth = self.worth([question for question, _ in every], [text for _, text in every])
        return [int(own.argmax()) for own in worth.split([len(some) for some in candidates])]
