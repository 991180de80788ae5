"""A soft prompt as a profile, of which each token is one of a shared codebook's (after UserIP-Tuning).

With e_j token j of a person's soft prompt and C_j the codes of that place (UserIP-Tuning, arXiv 2408.06577): q_j is
the c in C_j with the least ‖e_j − c‖². The loss is L(q) + β ‖e − sg(q)‖² / H, whose derivative by q is taken as that
by e (straight through, van den Oord et al. 2017, arXiv 1711.00937); a code follows the mean of the tokens that it
stands for, c ← γ c + (1 − γ) mean e. The codebook is made with a pool's people, and stays. What a device would tell a
server is then `TOKENS` indices, `TOKENS` · log₂ `CODES` bits.

That is few bits, and no privacy by itself: an index is a function of all of a history, and says to which group of
people somebody belongs. Under ε-DP for a person's whole history each index is kept with the chance `kept(CODES, ε_j)`
and otherwise any other (k-ary randomised response, Kairouz et al. 2014), the ε_j adding up to ε. Nothing leaves in
this project.

Of the paper's causal model of what lies behind behaviour only the codebook is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.config import AdapterConfig
from florilegium.client.lm.soft_prompt import PromptLayout
from florilegium.client.personalization.history import Asked, Person
from florilegium.client.personalization.method import MethodContext, Served
from florilegium.client.personalization.prompting import Prompting
from florilegium.client.personalization.through import train_through
from florilegium.privacy.seeds import derive_seed

TOKENS, CODES = 4, 16
COMMITMENT, MEMORY = 0.25, 0.9  # β, γ


class UserIp(Prompting):
    """Prompts as they are set behind the codes of a soft prompt of one's own."""

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        layout = context.lm.layout(AdapterConfig(kind="prompt", virtual_tokens=TOKENS))
        assert isinstance(layout, PromptLayout)
        self.layout = layout
        starts = [layout.start(derive_seed(context.seed, "userip", c) >> 1) for c in range(CODES)]
        self.codes = torch.stack(starts).view(CODES, TOKENS, layout.hidden)
        self.adapters: Adapters | None = None

    def learn(self, others: Sequence[Person]) -> None:
        """Prompts of these people, each from codes of its own, and the codebook with them."""
        Prompting.prepare(self, others)
        generator = torch.Generator().manual_seed(derive_seed(self.context.seed, "userip", "starts") >> 1)
        drawn = torch.randint(CODES, (len(others), TOKENS), generator=generator)
        start = self.codes[drawn, torch.arange(TOKENS)].flatten(1)
        self._trained(start, self.examples(), [p.id for p in others], self._follow)

    def adapt(self, examples: Sequence[Sequence[Dialogue]]) -> None:
        """From the codes' mean; of each token the nearest code is what is left."""
        start = self.codes.mean(0).flatten().repeat(len(examples), 1)
        self.count(trained=self.context.config.training.epochs * sum(self.tokens(own) for own in examples))
        learned = self._trained(start, examples, [p.id for p in self.people])
        self.adapters = self.context.lm.adapters(self.layout, quantised(learned, self.codes))

    def serving(self, asked: Sequence[tuple[int, Asked]]) -> Served:
        return self.served(asked, self.adapters)

    @property
    def kept_bytes(self) -> float:
        """The indices."""
        return super().kept_bytes + TOKENS * math.log2(CODES) / 8

    @property
    def fetched_bytes(self) -> float:
        """The codebook."""
        return 4.0 * self.codes.numel()

    def _trained(
        self,
        start: torch.Tensor,
        examples: Sequence[Sequence[Dialogue]],
        names: Sequence[str],
        after: Callable[[torch.Tensor], None] = lambda tokens: None,
    ) -> torch.Tensor:
        """Tokens (K, TOKENS · H) before they are quantised."""

        def expand(tokens: torch.Tensor) -> torch.Tensor:
            return straight(tokens, quantised(tokens.detach(), self.codes))

        return train_through(self.context, self.layout, start, expand, examples, names, after)

    def _follow(self, tokens: torch.Tensor) -> None:
        self.codes = followed(self.codes, tokens)


def nearest(tokens: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Of tokens (K, m · H) the indices (K, m) of the nearest of codes (C, m, H)."""
    parts = tokens.view(len(tokens), 1, *codes.shape[1:])
    return (parts - codes).square().sum(3).argmin(1)


def quantised(tokens: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """q (K, m · H)."""
    return codes[nearest(tokens, codes), torch.arange(codes.shape[1])].flatten(1)


def straight(tokens: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The codes (K, P); a derivative by them goes on as that by the tokens, with 2 β (e − q) / H of the commitment."""
    pull = 2 * COMMITMENT * TOKENS / tokens.shape[1] * (tokens.detach() - codes)
    tokens.register_hook(lambda slope: slope + pull)
    return tokens + (codes - tokens).detach()


def followed(codes: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Codes (C, m, H) moved towards the mean of those tokens (K, m · H) that each stands for; others stay."""
    chosen = torch.nn.functional.one_hot(nearest(tokens, codes), len(codes)).float()  # (K, m, C)
    count = chosen.sum(0).T[:, :, None]  # (C, m, 1)
    mean = torch.einsum("kmc,kmh->cmh", chosen, tokens.view(len(tokens), *codes.shape[1:])) / count.clamp(min=1)
    return torch.where(count > 0, MEMORY * codes + (1 - MEMORY) * mean, codes)


def kept(codes: int, epsilon: float) -> float:
    """The chance that an index survives randomised response over so many codes at ε."""
    return 1 / (1 + (codes - 1) * math.exp(-epsilon))
