"""pfl-research (Granqvist et al. 2024, arXiv 2404.06430): users one after the other in one resident model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.bridge import FrameworkBridgeFactory
from pfl.model.pytorch import PyTorchModel
from pfl.stats import MappedVectorStatistics
from torch import nn

from florilegium.simulation.benchmarks.engine_peft import OneByOne
from florilegium.simulation.benchmarks.engine_workload import LEARNING_RATE, Workload, adapter_rows


class Pfl(OneByOne):
    """Local training as pfl's FederatedAveraging does it for one user, on PEFT's model."""

    def __init__(self, model: str, dtype: torch.dtype, device: str) -> None:
        super().__init__(model, dtype, device)
        module = _WithLoss(self.model)
        self.pfl = PyTorchModel(
            module,
            local_optimizer_create=lambda parameters, lr: torch.optim.AdamW(
                [p for p in parameters if p.requires_grad], lr=lr, weight_decay=0.0, fused=True
            ),
            central_optimizer=torch.optim.SGD(self.parameters, lr=1.0),
        )
        self.module = module

    def prepare(self, work: Workload) -> Callable[[], list[Any]]:
        users = [self._user([e for step in work.batches(k) for e in step]) for k in range(work.devices)]
        rows = adapter_rows(self.layout, work.devices, work.first).to(self.device)
        size = work.examples_per_step
        return lambda: [self._train(row, user, size) for row, user in zip(rows, users, strict=True)]

    def _user(self, examples: Sequence[Any]) -> PyTorchTensorDataset:
        batch = self.padded(examples)
        ids = batch["input_ids"]
        return PyTorchTensorDataset((ids, batch.get("attention_mask", torch.ones_like(ids)), batch["labels"]))

    def _train(self, row: torch.Tensor, user: PyTorchTensorDataset, size: int) -> float:
        named = dict(zip((id(p) for p in self.parameters), row.split(self.layout.sizes), strict=True))
        start = MappedVectorStatistics({
            n: named[id(p)].view_as(p) for n, p in self.module.named_parameters() if p.requires_grad
        })  # fmt: skip
        self.pfl.set_parameters(start)
        parameters = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=LEARNING_RATE, local_batch_size=size)
        FrameworkBridgeFactory.sgd_bridge().do_sgd(self.pfl, user, parameters)
        self.pfl.get_model_difference(start)
        return self.module.last


class _WithLoss(nn.Module):
    """The interface that pfl asks for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.last = model, 0.0

    def loss(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor, is_eval: bool = False) -> torch.Tensor:
        width = int(mask.sum(1).max())  # a batch is no wider than its longest example
        ids, mask, labels = ids[:, :width], mask[:, :width], labels[:, :width]
        attention = None if bool(mask.all()) else mask
        loss: torch.Tensor = self.model(input_ids=ids, attention_mask=attention, labels=labels, use_cache=False).loss
        self.last = float(loss.detach())
        return loss

    def metrics(self, *data: torch.Tensor) -> dict[str, float]:
        return {}
