"""Votes as a release: a device's dialogues choose among candidates that the server has sent, and the counts leave it.

Private Evolution (arXiv 2305.15560) and PrE-Text (2406.02958): each dialogue of the pool votes for the candidate that
is nearest to it, the noised histogram is the release, and what the server does with it is post-processing. One
dialogue replaced takes a vote from one candidate and gives it to another: the counts move by √2 at most, whatever the
candidates are. For that a dialogue's vote must follow from itself and the candidates alone, so each is read in a pass
of its own. Not covered: real devices, parts of a sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from florilegium.client.calibration import planned_event
from florilegium.client.context import CohortContext
from florilegium.client.dialogue import Dialogue
from florilegium.client.state import DeviceState
from florilegium.privacy.plan import RoundPlan
from florilegium.privacy.release import Schema

if TYPE_CHECKING:
    from florilegium.client.lm.model import LanguageModel

PER_SIGMA = math.sqrt(2) / 2  # noise for a noise multiplier of 1, which is for what moves by 2: the counts move by √2


@dataclass(frozen=True)
class VotingContext(CohortContext):
    """What a cohort works with that is asked for votes; what it receives is a row of as many numbers as candidates."""

    candidates: tuple[Dialogue, ...] = ()

    @classmethod
    def about(cls, candidates: Sequence[Dialogue], context: CohortContext) -> VotingContext:
        """The same cohort, asked about these."""
        own = {x.name: getattr(context, x.name) for x in fields(CohortContext)}
        return cls(**own, candidates=tuple(candidates))

    @cached_property
    def schema(self) -> Schema:
        """One column of counts."""
        return Schema((("votes", (len(self.candidates), 1)),))

    @cached_property
    def places(self) -> torch.Tensor:
        """(N, H): where the candidates lie, of length 1."""
        return torch.stack([place(c, self.lm) for c in self.candidates])

    @property
    def noise_std(self) -> float:
        """Of each count in a release."""
        return planned_event(self.config).noise_multiplier * PER_SIGMA


def place(dialogue: Dialogue, lm: LanguageModel) -> torch.Tensor:
    """(H,), of length 1: the mean hidden state of prompt and reply, in a pass without any other text."""
    (found,) = lm.embed([f"{dialogue.prompt}\n{dialogue.response}"], ["mean"])
    return torch.nn.functional.normalize(found.readings["mean"].vector, dim=0)


def cast_votes(
    states: Sequence[DeviceState], received: torch.Tensor, plan: RoundPlan, context: CohortContext
) -> dict[str, torch.Tensor]:
    """The noised counts (N,) of each device: a vote for each dialogue of its pool in its user's own words."""
    if not isinstance(context, VotingContext):
        raise TypeError("votes are cast in a VotingContext")
    shared = context.config.shared
    if (shared.sampling_rate, shared.steps_per_round) != (1.0, 1):
        raise ValueError("all of a pool votes, once: set shared.sampling_rate = 1 and shared.steps_per_round = 1")
    return {s.id: _noised(counts(s, context), s, plan, context) for s in states}


def counts(state: DeviceState, context: VotingContext) -> torch.Tensor:
    """(N,): how many of the device's dialogues are nearest to each candidate."""
    own, found = state.own, torch.zeros(len(context.candidates))
    for identity, prompt in state.pool.slots:
        if identity in own:
            found[int((context.places @ place(Dialogue(identity, prompt, own[identity]), context.lm)).argmax())] += 1
    return found


def _noised(votes: torch.Tensor, state: DeviceState, plan: RoundPlan, context: VotingContext) -> torch.Tensor:
    draws = np.random.Generator(np.random.Philox(key=context.coins.noise_key(state, plan, context)))
    noise = torch.from_numpy(draws.standard_normal(len(votes)))
    return (votes.double() + context.noise_std * noise).float()
