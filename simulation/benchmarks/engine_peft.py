"""What a user would write today: transformers and PEFT, one device after the other; for DP with Opacus.

One model stays in memory; a device's adapter is copied into it in place, trained and copied out, which is the
cheapest swap that PEFT allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from florilegium.client.lm.adapter import AdaptedLayer
from florilegium.client.lm.hub import load
from florilegium.client.lm.layers import head_of
from florilegium.client.lm.packing import Example
from florilegium.simulation.benchmarks.engine_workload import (
    ALPHA,
    CLIP_NORM_L2,
    LEARNING_RATE,
    NEW_TOKENS,
    NOISE_MULTIPLIER,
    RANK,
    ModelSize,
    Workload,
    adapter_layout,
    adapter_rows,
)

IGNORED = -100


class OneByOne:
    """PEFT's model and, for each device in turn, its adapter in it."""

    def __init__(self, model: str, dtype: torch.dtype, device: str) -> None:
        plain, _ = load(model, dtype=dtype, device=device)
        head = head_of(plain)
        linear = {n: m for n, m in plain.named_modules() if isinstance(m, nn.Linear) and m is not head}
        self.layout = adapter_layout(tuple(AdaptedLayer(n, m.in_features, m.out_features) for n, m in linear.items()))
        self.size = ModelSize.of(head, self.layout)
        config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=list(linear))
        self.model = get_peft_model(plain, config, autocast_adapter_dtype=False).train()
        named = dict(self.model.named_parameters())
        self.parameters: list[torch.Tensor] = [
            named[f"base_model.model.{n}.lora_{x}.default.weight"] for n in linear for x in "AB"
        ]
        self.device = plain.device

    def prepare(self, work: Workload) -> Callable[[], list[Any]]:
        batches = [[self.padded(step) for step in work.batches(k)] for k in range(work.devices)]
        rows = adapter_rows(self.layout, work.devices, work.first).to(self.device)
        run: Callable[..., Any] = getattr(self, work.kind)
        return lambda: [run(row, steps) for row, steps in zip(rows, batches, strict=True)]

    def padded(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Ids, mask and labels, (b, T) each; without a mask where nothing is padded."""
        width = max(e.length for e in examples)
        ids = torch.zeros(len(examples), width, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for row, e in enumerate(examples):
            begin = width - e.length if not e.reply else 0  # prompts to be continued are padded on the left
            ids[row, begin : begin + e.length] = torch.tensor([*e.prompt, *e.reply])
            mask[row, begin : begin + e.length] = 1
            labels[row, len(e.prompt) : e.length] = torch.tensor(e.reply, dtype=torch.long)
        batch = {"input_ids": ids, "labels": labels}
        if not mask.all():
            batch["attention_mask"] = mask
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def swap_in(self, row: torch.Tensor) -> None:
        self._parts(row, lambda parts: torch._foreach_copy_(self.parameters, parts))

    def swap_out(self, row: torch.Tensor) -> None:
        self._parts(row, lambda parts: torch._foreach_copy_(parts, self.parameters))

    def _parts(self, row: torch.Tensor, copy: Callable[[list[torch.Tensor]], None]) -> None:
        pieces = row.split(self.layout.sizes)
        with torch.no_grad():
            copy([piece.view_as(p) for piece, p in zip(pieces, self.parameters, strict=True)])

    def training(self, row: torch.Tensor, batches: Sequence[dict[str, torch.Tensor]]) -> float:
        self.swap_in(row)
        optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        for batch in batches:
            loss = self.model(**batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.swap_out(row)
        return float(loss.detach())

    @torch.inference_mode()
    def embedding(self, row: torch.Tensor, batches: Sequence[dict[str, torch.Tensor]]) -> float:
        batch = batches[0]
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        with self.model.disable_adapter():
            body: Any = self.model.get_base_model()
            hidden = body.base_model(
                input_ids=ids, attention_mask=mask, use_cache=False
            ).last_hidden_state.float()  # (b, T, H)
        real = torch.ones_like(ids) if mask is None else mask
        return float(((hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True)).sum())

    @torch.inference_mode()
    def generation(self, row: torch.Tensor, batches: Sequence[dict[str, torch.Tensor]]) -> list[int]:
        self.swap_in(row)
        ids = batches[0]["input_ids"]
        mask = batches[0].get("attention_mask", torch.ones_like(ids))
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        written = self.model.train(False).generate(input_ids=ids, attention_mask=mask, **settings)
        self.model.train()
        return [int(i) for text in written[:, ids.shape[1] :] for i in text]


class OpacusOneByOne(OneByOne):
    """The same with Opacus' hooks for per-example gradients."""

    def __init__(self, model: str, dtype: torch.dtype, device: str) -> None:
        from opacus import GradSampleModule

        super().__init__(model, dtype, device)
        self.hooked = GradSampleModule(self.model)

    def dp_training(self, row: torch.Tensor, batches: Sequence[dict[str, torch.Tensor]]) -> float:
        from opacus.optimizers import DPOptimizer

        self.swap_in(row)
        optimizer = DPOptimizer(
            torch.optim.SGD(self.parameters, lr=LEARNING_RATE),
            noise_multiplier=NOISE_MULTIPLIER,
            max_grad_norm=CLIP_NORM_L2,
            expected_batch_size=len(batches[0]["input_ids"]),
        )
        for batch in batches:
            loss = self._sum_of_means(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.swap_out(row)
        return float(loss.detach()) / len(batches[0]["input_ids"])

    def _sum_of_means(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Each example's own mean loss: a mean over the batch would let one example rescale the others."""
        labels = batch["labels"][:, 1:]
        logits = self.hooked(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[:, :-1]
        losses = nn.functional.cross_entropy(
            logits.transpose(1, 2).float(), labels, ignore_index=IGNORED, reduction="none"
        )
        return (losses.sum(1) / (labels != IGNORED).sum(1)).sum()
