"""What all baselines have in common: one layout, the same batches, one optimizer, and what a server makes of uploads.

A baseline is pure functions over a cohort: what is held between rounds goes in, and comes out with what was sent. Where
`privacy.mode` is `user-central` a device clips its whole change and the server adds noise to the sum; in `none`
neither is done. Not covered: devices that miss rounds, weights by the number of examples (all weigh the same).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from florilegium.client.calibration import release_noise
from florilegium.client.dialogue import Dialogue
from florilegium.client.lm.adapter import AdapterLayout, Adapters, Layout
from florilegium.client.lm.batching import schedule_steps
from florilegium.client.lm.model import LanguageModel
from florilegium.client.lm.training_data import TrainingSet
from florilegium.client.state import DeviceState
from florilegium.privacy.dpsgd import clipped
from florilegium.privacy.noise import ReleaseNoise
from florilegium.privacy.seeds import derive_key, derive_seed
from florilegium.server.aggregation import Mean
from florilegium.simulation.config import ExperimentConfig

Lessons = Sequence[TrainingSet]  # by device: the batches of one round


@dataclass(frozen=True)
class Held:
    """What there is between rounds."""

    shared: torch.Tensor  # (1, S), the same for all, or (K, S): what the devices received last
    own: torch.Tensor  # (K, Q): what stays on each device


@dataclass(frozen=True)
class BaselineContext:
    """What a cohort of one baseline works with."""

    lm: LanguageModel
    config: ExperimentConfig
    layout: AdapterLayout  # of every adapter
    seed: int
    diverged: dict[int, str] = field(default_factory=dict)  # of the cohort's devices, by place: why a training ended

    @classmethod
    def of(cls, lm: LanguageModel, config: ExperimentConfig, seed: int) -> BaselineContext:
        return cls(lm, config, lm.lora_layout(config.shared.adapter), seed)

    @property
    def first(self) -> torch.Tensor:
        """The adapter (1, P) that all devices begin with; it changes nothing yet."""
        return self.layout.start(derive_seed(self.seed, "shared"))[None]

    def train(
        self,
        layout: Layout,
        rows: torch.Tensor,
        sets: Lessons,
        frozen: Sequence[Adapters] = (),
        proximal: float = 0.0,
        anchor: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rows (K, P) after all batches of the lessons; `rows` are (K, P), or (1, P) where all begin with the same.

        A device whose loss or row stops being a number keeps the row that it came with, and is noted in `diverged`.
        """
        rates = [[self.config.baseline.learning_rate] * len(x.batches) for x in sets]
        start = self.lm.adapters(layout, rows.expand(len(sets), -1))
        near = None if anchor is None else anchor.to(start.rows.device)
        trained = self.lm.engine.finetune(start, frozen, sets, rates, proximal=proximal, anchor=near)
        self.diverged.update(trained.failed)
        after: torch.Tensor = trained.adapters.rows.cpu()
        return after

    def training_set(self, state: DeviceState, number: int) -> TrainingSet:
        """What a device trains on in a round: what it has kept, each with its user's reply."""
        settings = self.config.baseline
        dialogues = [Dialogue("", k.prompt, state.replies[k.id]) for k in state.annotated]
        seed = derive_seed(self.seed, state.id, number, "order")
        order = schedule_steps(len(dialogues), settings.batch_size, settings.steps, seed)
        return TrainingSet(self.lm.format.dialogues(dialogues), order)


def halves(sets: Lessons) -> tuple[list[TrainingSet], list[TrainingSet]]:
    """The first and the second half of each device's batches."""
    first = [TrainingSet(x.examples, x.batches[: len(x.batches) // 2]) for x in sets]
    return first, [TrainingSet(x.examples, x.batches[len(x.batches) // 2 :]) for x in sets]


def upload(changes: torch.Tensor, context: BaselineContext) -> torch.Tensor:
    """What devices send of their changes (K, S): where they are protected, each scaled to norm C at most."""
    if context.config.privacy.mode == "none":
        return changes
    return clipped(changes, context.config.privacy.clip_norm_l2)


def aggregate(sent: torch.Tensor, context: BaselineContext, number: int) -> torch.Tensor:
    """The mean (1, S) of what was sent (K, S) in a round, with the server's noise (FedAvg, arXiv 1602.05629)."""
    config, mean = context.config, Mean(sent.shape[1])
    for k, row in enumerate(sent.numpy()):
        mean.add(f"device {k}", row)
    protected = config.privacy.mode != "none"
    noise = release_noise(config, 1, derive_key(context.seed, "server")) if protected else ReleaseNoise()
    return torch.from_numpy(mean.change(noise.drawn(number, sent.shape[1])))[None]
