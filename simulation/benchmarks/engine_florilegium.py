"""Our arm: all devices in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from florilegium.client.lm import layers
from florilegium.client.lm.adapter import Adapters
from florilegium.client.lm.contrast import Contrast
from florilegium.client.lm.engine import Engine
from florilegium.client.lm.hub import load
from florilegium.client.lm.training_data import TrainingSet
from florilegium.simulation.benchmarks.engine_workload import (
    CLIP_NORM_L2,
    LEARNING_RATE,
    NEW_TOKENS,
    NOISE_MULTIPLIER,
    ModelSize,
    Workload,
    adapter_layout,
    adapter_rows,
)


class Cohort:
    """`client.lm.engine.Engine` as the rounds use it."""

    contrast: Contrast | None = None

    def __init__(self, model: str, dtype: torch.dtype, device: str) -> None:
        loaded, _ = load(model, dtype=dtype, device=device)
        self.engine = Engine(loaded)
        self.layout = adapter_layout(layers.adapted_layers(self.engine.modules))
        self.size = ModelSize.of(self.engine.head, self.layout)

    def prepare(self, work: Workload) -> Callable[[], list[Any]]:
        batches = [work.batches(k) for k in range(work.devices)]
        rows = adapter_rows(self.layout, work.devices, work.first).to(self.engine.device)
        run: Callable[..., list[Any]] = getattr(self, work.kind)
        return lambda: run(batches, Adapters(self.layout, rows))

    def training(self, batches: list[Any], adapters: Adapters) -> list[float]:
        sets = []
        for steps in batches:
            size = len(steps[0])
            order = [list(range(s * size, (s + 1) * size)) for s in range(len(steps))]
            sets.append(TrainingSet([e for step in steps for e in step], order))
        rates = [[LEARNING_RATE] * len(x.batches) for x in sets]
        return [losses[-1] for losses in self.engine.finetune(adapters, [], sets, rates).losses]

    def embedding(self, batches: list[Any], adapters: Adapters) -> list[float]:
        examples = [e for steps in batches for e in steps[0]]
        sums = {i: float(hidden.float().mean(0).sum()) for i, hidden in self.engine.hidden(examples)}
        each = len(batches[0][0])
        return [sum(sums[i] for i in range(k * each, (k + 1) * each)) for k in range(len(batches))]

    def generation(self, batches: list[Any], adapters: Adapters) -> list[list[int]]:
        prompts = [e.prompt for steps in batches for e in steps[0]]
        slots = [k for k, steps in enumerate(batches) for _ in steps[0]]
        written = self.engine.generate(
            prompts,
            slots,
            [adapters],
            seeds=[0] * len(prompts),
            max_new_tokens=NEW_TOKENS,
            temperature=0.0,
            stop=(),  # never: all arms write as much
            contrast=self.contrast,
        )
        each = len(batches[0][0])
        return [[i for ids in written[k * each : (k + 1) * each] for i in ids] for k in range(len(batches))]

    def dp_training(self, batches: list[Any], adapters: Adapters) -> list[float]:
        from florilegium.privacy.dpsgd import PrivateRow  # needs Opacus

        each = len(batches[0][0])
        rows = [
            PrivateRow(
                row,
                learning_rate=LEARNING_RATE,
                clip_norm_l2=CLIP_NORM_L2,
                noise_multiplier=NOISE_MULTIPLIER,
                expected_batch=each,
                key=k,
            )
            for k, row in enumerate(adapters.rows.cpu())
        ]
        for step in range(len(batches[0])):
            now = Adapters(self.layout, torch.stack([r.row for r in rows]).to(self.engine.device))
            gradients, losses = self.engine.dp_gradients(now, [], [steps[step] for steps in batches])
            for row, gradient in zip(rows, gradients, strict=True):
                row.step(gradient)
        return losses


class Contrasting(Cohort):
    """Writes by contrast with the model without adapters, of so little strength that it writes the same."""

    contrast = Contrast(1e-6, 0.1)
