"""Canaries in the worst case: one release that spends the whole budget, every slot of the pool drawn.

An attacker who knows everything but the coins and the noise (model, settings, all dialogues, both that may stand in
each place) explains what was released by the coins, in the sense of least squares under noise of the claimed size.
Where dialogues are protected each canary has a device of its own, with a few real dialogues; where devices are, each
device has a coin for its whole stream, over as many repetitions as it takes. Bounds: `simulation.audit.bounds`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from florilegium.client.calibration import planned_event
from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.model import LanguageModel
from florilegium.privacy.dpsgd import clipped
from florilegium.privacy.seeds import derive_seed
from florilegium.simulation.audit.canaries import Canary, Streams, plant
from florilegium.simulation.audit.checks import (
    named,
    one_round,
    summed_over,
    with_privacy,
    without_clipping,
    without_noise,
)
from florilegium.simulation.config import ExperimentConfig
from florilegium.simulation.engines.in_memory import Federated, federate_in_memory
from florilegium.simulation.settings import ConfigError


@dataclass(frozen=True)
class Guesses:
    """For each coin how strongly the attacker believes in heads, and what it was."""

    scores: np.ndarray  # (m,)
    members: np.ndarray  # (m,) bool

    def exposure(self) -> float:
        """Mean bits of what was in: log2 of how many there are by its rank among what was not (Carlini et al. 2019).

        1.44 for what was not in either.
        """
        inside, outside = self.scores[self.members], self.scores[~self.members]
        above = (outside[None] > inside[:, None]).sum(1)
        return float(np.log2((len(outside) + 1) / (1 + above)).mean())


@dataclass(frozen=True)
class Mistake:
    """What is wrong with a control: no clipping, and noise that its settings do not know of (a deviation)."""

    unclipped: bool = False
    added_noise: float = 0.0


NONE = Mistake()


def worst_case(config: ExperimentConfig, epsilon: float) -> ExperimentConfig:
    """The settings for one release of one step on every slot, with all of a budget of `epsilon`."""
    one = one_round(config, sampling_rate=1.0, synthetic=0)
    everybody = one.server.model_copy(update={"noise_bands": 1, "sampled_share": 1.0})
    return with_privacy(one.model_copy(update={"server": everybody}), epsilon=epsilon, releases=0)


def release_scale(config: ExperimentConfig) -> float:
    """What a release of such settings is to be multiplied by to be the sum that noise was added to."""
    shared = config.shared
    return shared.pool_capacity / shared.learning_rate if config.privacy.by_dialogue else 1.0


class DialogueCoins:
    """A coin for each of so many devices with a few of the people's dialogues each.

    Mechanisms of their own, or, where the attacker has a round's sum alone, one for all.
    """

    @property
    def independent(self) -> bool:
        """Whether each coin is in a mechanism of its own, and not in the sum of all."""
        return not self.config.privacy.seen_as_sums

    def __init__(self, lm: LanguageModel, config: ExperimentConfig, streams: Streams, canaries: int, seed: int) -> None:
        """Raises `ConfigError` where there are fewer dialogues."""
        self.lm, self.config, self.seed = lm, config, seed
        every = [d for stream in streams for d in stream]
        if canaries > len(every):
            raise ConfigError(f"{len(every)} dialogues have no place for {canaries} canaries; ask for fewer")
        size = min(len(every) // canaries, config.shared.pool_capacity)
        self.streams = [every[k * size : (k + 1) * size] for k in range(canaries)]
        self.planted, self.known = plant(self.streams, canaries, seed)

    @property
    def held_bytes(self) -> int:
        """That `guessed` holds at one time beside the model: all gradients and twice what was made of them."""
        return 3 * sum(g.nbytes for g in self._gradients)

    def guessed(self, settings: ExperimentConfig, mistake: Mistake = NONE) -> Guesses:
        """All canaries on one federation with these settings."""
        seen = _played(self.lm, settings, self.planted, mistake, self.seed)
        clip = float("inf") if mistake.unclipped else settings.privacy.clip_norm_l2
        deviation = _deviation(settings, mistake)
        scores, pieces = np.zeros(len(self.known)), self._pieces(clip)
        if not self.independent:
            total = -_total(seen) * release_scale(settings) - sum(expected for _, expected, _ in pieces)
            order = [place for places, _, _ in pieces for place in places]
            scores[order] = explained(total, torch.cat([moved for _, _, moved in pieces]), deviation)
            return Guesses(scores, np.array([c.member for c in self.known]))
        for device, (places, expected, differences) in enumerate(pieces):
            found = -seen.cohort.changes[0][device].double() * release_scale(settings) - expected
            scores[places] = explained(found, differences, deviation)
        return Guesses(scores, np.array([c.member for c in self.known]))

    def _pieces(self, clip: float) -> list[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """Of each device: its canaries, the sum to be expected (P,), and what each coin changes in it (m, P)."""
        canaries, pieces = clipped(self._gradients[0], clip), []
        reals = torch.split(clipped(self._gradients[1], clip), [len(s) for s in self.streams])
        for device, real in enumerate(reals):
            places = [i for i, c in enumerate(self.known) if c.device == device]
            replaced = real[[_place(self.streams[device], self.known[i]) for i in places]]
            differences = canaries[places] - replaced
            pieces.append((places, real.sum(0) + differences.sum(0) / 2, differences))
        return pieces

    @cached_property
    def _gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of all canaries and of all real dialogues, at the adapter that everybody begins with."""
        layout = self.lm.lora_layout(self.config.shared.adapter, public_seed=derive_seed(self.seed, "shared"))
        start = self.lm.adapters(layout, layout.start(derive_seed(self.seed, "shared")))
        texts = [[c.dialogue for c in self.known], [d for s in self.streams for d in s]]
        found = [self.lm.engine.dp_gradients(start, [], [self.lm.format.dialogues(t)])[0][0].double() for t in texts]
        return found[0], found[1]


class DeviceCoins:
    """A coin for each device: its own stream, or that of the next device; repeated until there are enough coins."""

    @property
    def independent(self) -> bool:
        """Whether each coin is in a mechanism of its own, and not in the sum of all."""
        return not self.config.privacy.seen_as_sums

    def __init__(self, lm: LanguageModel, config: ExperimentConfig, streams: Streams, canaries: int, seed: int) -> None:
        self.lm, self.config, self.seed = lm, config, seed
        self.own = [s[: config.shared.pool_capacity] for s in streams]  # no coin of the pool is to be guessed too
        self.other = [*self.own[1:], self.own[0]]
        self.repetitions = -(-canaries // len(streams))

    @property
    def held_bytes(self) -> int:
        """That `guessed` holds at one time beside the model: of each device what it sends, in four versions."""
        return 4 * 8 * len(self.own) * self.lm.lora_layout(self.config.shared.adapter).width

    def guessed(self, settings: ExperimentConfig, mistake: Mistake = NONE) -> Guesses:
        """All devices in each repetition; coins and noise are new in each, all else is the same."""
        secretly = with_privacy(settings, secret="os")
        own, other = (self._plain(settings, streams, mistake) for streams in (self.own, self.other))
        differences, deviation = other - own, _deviation(settings, mistake)
        rng, scores, members = np.random.default_rng(derive_seed(self.seed, "coins")), [], []
        for number in range(self.repetitions):
            coins = rng.random(len(self.own)) < 0.5
            met = [b if heads else a for a, b, heads in zip(self.own, self.other, coins, strict=True)]
            seen = _played(self.lm, secretly, met, mistake, self.seed, number)
            scores.append(self._scores(seen, own + differences / 2, differences, deviation))
            members.append(coins)
        return Guesses(np.concatenate(scores), np.concatenate(members))

    def _scores(
        self, seen: Federated, expected: torch.Tensor, differences: torch.Tensor, deviation: float
    ) -> np.ndarray:
        if not self.independent:  # the attacker has the sum alone
            return explained(_total(seen) - expected.sum(0), differences, deviation)
        found = seen.cohort.changes[0].double() - expected
        return np.concatenate([explained(f, d[None], deviation) for f, d in zip(found, differences, strict=True)])

    def _plain(
        self, settings: ExperimentConfig, streams: Sequence[Sequence[Dialogue]], mistake: Mistake
    ) -> torch.Tensor:
        """(K, P): what devices with these streams would send without noise."""
        seen = _played(self.lm, without_noise(settings), streams, Mistake(mistake.unclipped), self.seed)
        return seen.cohort.changes[0].double()


def explained(found: torch.Tensor, differences: torch.Tensor, deviation: float) -> np.ndarray:
    """(m,): coins of ±1/2 that explain what was found (P,) by what each changes (m, P), in units of their error.

    Least squares with noise of this deviation: of each coin what is left after the others are guessed too.
    """
    gram = differences @ differences.T  # (m, m)
    ridge = 4 * deviation**2 + 1e-9 * float(gram.diagonal().mean())
    inverse = torch.linalg.inv(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    scores: np.ndarray = (inverse @ (differences @ found)).numpy()
    return scores


def _played(
    lm: LanguageModel, settings: ExperimentConfig, streams: Streams, mistake: Mistake, seed: int, number: int = 0
) -> Federated:
    if mistake.unclipped:
        settings = without_clipping(settings)
    settings = summed_over(settings, len(streams))
    seen = federate_in_memory(lm, settings, settings.server, named(streams), seed, at_once=True)
    if mistake.added_noise:
        generator = torch.Generator().manual_seed(derive_seed(seed, "added", number) >> 1)
        changes, scale = seen.cohort.changes[0], release_scale(settings)
        changes += mistake.added_noise / scale * torch.randn(changes.shape, generator=generator)
        seen.shared.add_(
            mistake.added_noise / scale / len(changes) * torch.randn(seen.shared.shape, generator=generator)
        )
    return seen


def _total(seen: Federated) -> torch.Tensor:
    """(P,): the sum of the first round's releases, as the server made it."""
    return seen.aggregated[0].double() * len(seen.cohort.streams) / seen.server.learning_rate


def _deviation(settings: ExperimentConfig, mistake: Mistake) -> float:
    return mistake.added_noise or planned_event(settings).noise_multiplier * settings.privacy.clip_norm_l2


def _place(stream: Sequence[Dialogue], canary: Canary) -> int:
    return next(i for i, d in enumerate(stream) if d.id == canary.dialogue.id)
